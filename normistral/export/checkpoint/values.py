"""The values of a checkpoint's weights, looked at once and before anything is made of them.

It is the only place that looks for values that are no finite numbers: writers, calibration and proofs rely on it,
whatever the format. Floats of a sign, an exponent and a fraction are ordered as the integers of their bits are, so that
it takes no arithmetic (6 to 12 GB/s of one core, where SHA-256 runs at 0.9).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import Dtype, Tensor, shown, widen_bfloat16
from normistral.progress import OnBytes, ignore_bytes

_BLOCK_BYTES = 4 * 2**20  # a multiple of every item's size
_BITS: dict[Dtype, str] = {"bfloat16": "<u2", "float16": "<u2", "float32": "<u4"}
_INFINITY: dict[Dtype, int] = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # NaNs lie above


def read_magnitudes(checkpoint: Checkpoint, on_bytes: OnBytes = ignore_bytes) -> dict[str, float]:
    """Read all weights once: the largest magnitude of each tensor, by the names of the causal language model.

    Args:
        on_bytes: called with the number of bytes just read.

    Raises:
        CheckpointError: a tensor holds values that are no finite numbers; it is named, and the first of them.
    """
    largest: dict[str, float] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        bits = 0
        for block in _blocks(tensor):
            bits = max(bits, _largest_bits(block))
            on_bytes(block.nbytes)
        if bits >= _INFINITY[tensor.dtype]:
            raise _not_finite(name, tensor)
        largest[name] = _magnitude(bits, tensor.dtype)
    return largest


def _blocks(tensor: Tensor) -> Iterator[NDArray[Any]]:
    """A tensor's items in order, as the unsigned integers of their bits; every block is gone with the next one."""
    buffer = bytearray(min(_BLOCK_BYTES, tensor.nbytes))
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for start in range(0, tensor.nbytes, _BLOCK_BYTES):
            block = memoryview(buffer)[: min(_BLOCK_BYTES, tensor.nbytes - start)]
            if file.readinto(block) != len(block):
                raise CheckpointError(f"{tensor.file.name} ended while it was read", DOWNLOAD_AGAIN)
            yield np.frombuffer(block, _BITS[tensor.dtype])


def _largest_bits(block: NDArray[Any]) -> int:
    """Bits of the largest magnitude without its sign: as signed integers, the largest positive; unsigned, negative."""
    sign = 1 << (8 * block.itemsize - 1)
    positive, all_bits = int(block.view(f"<i{block.itemsize}").max()), int(block.max())
    return max(positive, all_bits - sign if all_bits >= sign else all_bits)


def _magnitude(bits: int, dtype: Dtype) -> float:
    if dtype == "float16":
        return float(np.uint16(bits).view(np.float16))
    if dtype == "bfloat16":
        return float(widen_bfloat16(np.array([bits], np.uint16))[0])
    return float(np.uint32(bits).view(np.float32))


def _not_finite(name: str, tensor: Tensor) -> CheckpointError:
    """The error that names the tensor, how many of its values are no numbers, and the first of them."""
    infinity, count, first, position = _INFINITY[tensor.dtype], 0, -1, 0
    what = ""
    for block in _blocks(tensor):
        magnitudes = block & (np.iinfo(block.dtype).max >> 1)
        bad = np.flatnonzero(magnitudes >= infinity)
        if len(bad) and first < 0:
            first = position + int(bad[0])
            what = "NaN" if magnitudes[bad[0]] > infinity else "-inf" if block[bad[0]] > infinity else "inf"
        count, position = count + len(bad), position + len(block)
    place = ", ".join(map(str, np.unravel_index(first, tensor.shape)))
    values = "a value that is no finite number:" if count == 1 else f"{count} values that are no finite numbers, first"
    return CheckpointError(
        f"{shown(name)[1:-1]} in {tensor.file.name} holds {values} {what} at [{place}]",
        "download or copy the file again; if it is the same again, no format can hold it: tell its authors",
    )
