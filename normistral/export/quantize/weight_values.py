"""Values of a checkpoint's weights, checked once before anything is made of them: finite, and within the stored types.

This is the only place that looks for NaN and infinities: writers, calibration and verification rely on it, whatever the
format. Floats of a sign, an exponent and a fraction are ordered as the integers of their bits are, so the pass takes no
arithmetic (6 to 12 GB/s of one core, where SHA-256 runs at 0.9).

OpenVINO's quantized weights are integers times scales in float16, which cannot hold all values of bfloat16. A group of
weights far below its matrix's others becomes zeros, which is as near as the type comes; a whole matrix that would, or a
scale beyond the range, is refused before the first weight is quantized.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import CheckpointError, ExportError
from normistral.export.checkpoint.families.base import OUTPUT_LAYER
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import STORED_DTYPES, Dtype, Tensor, shown, widen_bfloat16
from normistral.export.quantize.scheme import smallest_representable
from normistral.export.recipe import Recipe
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
    raw = np.array([bits], _BITS[dtype])
    return float((widen_bfloat16(raw) if dtype == "bfloat16" else raw.view(STORED_DTYPES[dtype]))[0])


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


LARGEST_FLOAT16 = 65504.0
_LARGEST = 2.0**126  # the distance of a lowest and a highest value has to be a float32
_RANGE = f"6e-08 to {LARGEST_FLOAT16:g}, in full precision from 6.1e-05"


def require_range(largest: Mapping[str, float], checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse weights that the recipe's stored types cannot hold.

    Args:
        largest: magnitude in every tensor, as `read_magnitudes` has it.

    Raises:
        ExportError: naming the tensor, its largest magnitude and the range.
    """
    for name, shape in checkpoint.tensor_shapes.items():
        value = largest[name]
        if value > _LARGEST:
            raise ExportError(
                f"{name} has values up to {value:.3g}, too large for sums in float32",
                "the checkpoint may be damaged: compare it with what its authors published",
            )
        bits = _stored_bits(name, len(shape), checkpoint, recipe)
        if bits is None or value == 0:
            continue
        part = "its weights" if bits == 16 else "the scales of its weights"
        if value > LARGEST_FLOAT16 * (1 if bits == 16 else 2 ** (bits - 1) - 1):
            problem = f"has values up to {value:.6g}, beyond the range of float16"
        elif value < smallest_representable(bits, float16=True) and not name.endswith(".bias"):
            problem = f"has no value above {value:.3g}, which is below the range of float16"
        else:
            continue
        raise ExportError(
            f"{name} {problem}, in which {recipe.format} {recipe.weights} stores {part} ({_RANGE})",
            "use --weights fp32, or int8 or int4, whose scales are float32 in ONNX"
            if recipe.format == "onnx"
            else "use --format onnx with int8 or int4, whose scales are float32 there, or with fp32",
        )


def _stored_bits(name: str, dimensions: int, checkpoint: Checkpoint, recipe: Recipe) -> int | None:
    """4 or 8: the bits of codes whose scales are float16; 16: the weights themselves are; None: float16 has no part."""
    if recipe.format == "onnx":
        return 16 if recipe.weights == "fp16" else None
    if dimensions < 2:  # as in the checkpoint
        return 16 if checkpoint.tensors[name].dtype == "float16" else None
    if recipe.weights != "int4":
        return 16 if recipe.weights == "fp16" else 8
    if name not in (checkpoint.family.embedding, OUTPUT_LAYER):
        return 4 if recipe.ratio == 1 else 8
    if recipe.output_layer_bits == 4 and (name == OUTPUT_LAYER or checkpoint.config["tie_word_embeddings"]):
        return 4
    return None if recipe.backup == "fp" else 8
