"""One tensor of a weight file: type, shape, place of its bytes; tools' names for it; its values, a few rows at a time.

An export that streams never holds more of the model than the rows it works on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.files import ForeignFile

if TYPE_CHECKING:
    import torch

Dtype = Literal["bfloat16", "float16", "float32"]

_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# numpy's types of the stored bytes; it has no bfloat16, which comes as the integers of its bits.
STORED_DTYPES: dict[Dtype, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """Row-major and little-endian; shape as stored; `start` is where its bytes begin in the file."""

    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Size of one of `shape[0]` rows."""
        return math.prod(self.shape[1:]) * STORED_DTYPES[self.dtype].itemsize


def make_tensor(file: Path, name: str, dtype: object, shape: object, start: int) -> Tensor:
    """A tensor from what a header says of it.

    Args:
        dtype: as safetensors writes it: "BF16", "F16" or "F32".
        shape: a list of widths.

    Raises:
        CheckpointError: the shape is none, or the type is not one of the three.
    """
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(width, int) and not isinstance(width, bool) and 0 <= width < 2**40 for width in shape)
    ):
        raise CheckpointError(f"{file.name} is damaged: the shape of {shown(name)} is wrong", DOWNLOAD_AGAIN)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        if (other := recognise_tensors([name])) is not None:
            raise CheckpointError(f"the weights of {file.name} are {other.what}: they hold {shown(name)}", other.hint)
        raise CheckpointError(
            f"{file.name}: {shown(name)} is stored as {ascii(dtype)[:20]}, not as bfloat16, float16 or float32",
            "export the original checkpoint with its floating-point weights",
        )
    return Tensor(_DTYPES[dtype], tuple(shape), file, start)


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16, which is the upper half of a float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def map_tensor(tensor: Tensor) -> torch.Tensor:
    """The values, mapped and not read: pages come from the file when they are touched, and writing copies them."""
    import torch

    kind = getattr(torch, tensor.dtype)
    if tensor.nbytes == 0:  # nothing to map
        return torch.empty(tensor.shape, dtype=kind)
    values = np.memmap(tensor.file, STORED_DTYPES[tensor.dtype], mode="c", offset=tensor.start, shape=tensor.shape)
    # No writer that is in use leaves a tensor between two items; torch does not promise to read one from there.
    return torch.from_numpy(values if values.flags.aligned else np.array(values)).view(kind)


def some_names(names: Sequence[str], kind: str = "") -> str:
    """Up to three names out of a file for a one-line message, and how many more (of a `kind`)."""
    first = ", ".join(ascii(name)[1:-1][:80] for name in names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more{' ' if kind else ''}{kind}"


def shown(name: str) -> str:
    """A name out of a file, in quotes, fit for a one-line message."""
    return ascii(name[:80])


_ORIGINAL = "export the original checkpoint, from which it was made"
_MERGE = "merge it into its base model first"
_HEADLESS = "save the language model without that head (with TRL: model.pretrained_model.save_pretrained)"
# Parts of tensors' names that tell who wrote them: who, and a hint.
_TENSORS = {
    r"\.(?:qweight|qzeros|g_idx)$": ("quantised by GPTQ or AWQ", _ORIGINAL),
    r"\.(?:absmax|quant_map|nested_absmax|SCB)$|\.quant_state\.": ("quantised by bitsandbytes", _ORIGINAL),
    r"\.weight_(?:packed|scale|scale_inv|zero_point|shape)$|\.input_scale$": (
        "quantised (compressed-tensors or fp8)",
        _ORIGINAL,
    ),
    r"\.W_q$": ("quantised by HQQ", _ORIGINAL),
    r"\.lora_(?:(?:embedding_)?[AB]|magnitude_vector)\b": ("a LoRA adapter, not a whole model", _MERGE),
    r"\.(?:base_layer|original_module|modules_to_save)\.": ("a model with a LoRA adapter that was not merged", _MERGE),
    r"\.scales$": ("quantised by MLX", _ORIGINAL),
    r"^(?:v_head|value_head|score|classifier)\.": ("a model with a classifier's or a value head", _HEADLESS),
}
_PREFIXES = {"_orig_mod.": "torch.compile", "module.": "torch's DataParallel"}


def recognise_tensors(names: Iterable[str]) -> ForeignFile | None:
    """The tool that wrote tensors which config.json does not describe; None if unknown."""
    names = list(names)
    for pattern, (what, hint) in _TENSORS.items():
        if any(re.search(pattern, name) for name in names):
            return ForeignFile(what, hint)
    for prefix, writer in _PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            return ForeignFile(
                f"saved from inside {writer}: every name begins with {prefix}",
                f"take {prefix} off the names, or save the model itself",
            )
    return None


Rows = NDArray[np.float32]

_BLOCK_VALUES = 4 * 2**20  # 16 MiB of float32: large enough for numpy, small enough to keep a few of them


class WeightReader:
    """Reads a checkpoint's tensors.

    Args:
        tensors: their headers by name, as `Checkpoint.tensors` has them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._views: dict[str, tuple[str, tuple[range, ...]]] = {}

    def add_view(self, name: str, whole: str, rows: Sequence[range]) -> None:
        """Give some rows of a tensor, in the order of `rows`, a name of their own; they can be read like a tensor."""
        self._views[name] = (whole, tuple(rows))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored, [out, in] for a matrix."""
        tensor, rows = self._place(name)
        return (sum(map(len, rows)), *tensor.shape[1:])

    def __contains__(self, name: str) -> bool:
        return name in self._views or name in self._tensors

    def nbytes(self, names: Sequence[str]) -> int:
        """Stored size of some tensors."""
        return sum(self._place(name)[0].row_bytes * self.shape(name)[0] for name in names)

    def read(self, name: str) -> Rows:
        """A whole tensor; for vectors and small matrices."""
        tensor, rows = self._place(name)
        parts = [self._read_rows(tensor, part.start, part.stop) for part in rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read_rows(self, name: str, rows: Sequence[int]) -> Rows:
        """Some rows of a matrix, by their numbers: float32 [n, in]."""
        tensor, parts = self._place(name)
        numbers = [number for part in parts for number in part]
        return np.concatenate([self._read_rows(tensor, numbers[row], numbers[row] + 1) for row in rows])

    def blocks(self, name: str) -> Iterator[Rows]:
        """A matrix [out, in] in blocks of rows: float32 [rows, in]."""
        tensor, parts = self._place(name)
        rows = max(1, _BLOCK_VALUES // tensor.shape[1])
        for part in parts:
            for start in range(part.start, part.stop, rows):
                yield self._read_rows(tensor, start, min(start + rows, part.stop))

    def source(self, name: str) -> tuple[str, tuple[range, ...]]:
        """The tensor of the checkpoint that `name` stands for, and which of its rows, in order."""
        return self._views[name] if name in self._views else (name, (range(self._tensors[name].shape[0]),))

    def _place(self, name: str) -> tuple[Tensor, tuple[range, ...]]:
        """The stored tensor, and which of its rows are meant."""
        whole, rows = self.source(name)
        return self._tensors[whole], rows

    def _read_rows(self, tensor: Tensor, start: int, stop: int) -> Rows:
        stored = STORED_DTYPES[tensor.dtype]
        count = (stop - start) * math.prod(tensor.shape[1:])
        # Read and not mapped: a mapped checkpoint counts as resident until the kernel needs the pages elsewhere.
        values = np.fromfile(tensor.file, stored, count, offset=tensor.start + start * tensor.row_bytes)
        if values.size != count:
            raise CheckpointError(f"{tensor.file.name} ended while it was read", DOWNLOAD_AGAIN)
        rows = widen_bfloat16(values) if tensor.dtype == "bfloat16" else values.astype(np.float32, copy=False)
        return rows.reshape(stop - start, *tensor.shape[1:])
