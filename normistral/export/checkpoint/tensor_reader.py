"""Reads the values of a checkpoint's tensors, a few rows at a time, as float32.

An export that streams never holds more of the model than the rows it works on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.tensor import Tensor, widen_bfloat16

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

    def blocks(self, names: Sequence[str]) -> Iterator[Rows]:
        """Matrices [out, in] below each other, in blocks of rows: float32 [rows, in]. A block never spans two."""
        for name in names:
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
        row_values = int(np.prod(tensor.shape[1:], dtype=np.int64))
        count = (stop - start) * row_values
        stored = np.dtype("<f4" if tensor.dtype == "float32" else "<f2" if tensor.dtype == "float16" else "<u2")
        # Read and not mapped: a mapped checkpoint counts as resident until the kernel needs the pages elsewhere.
        values = np.fromfile(tensor.file, stored, count, offset=tensor.start + start * tensor.row_bytes)
        if values.size != count:
            raise CheckpointError(f"{tensor.file.name} ended while it was read", DOWNLOAD_AGAIN)
        rows = widen_bfloat16(values) if tensor.dtype == "bfloat16" else values.astype(np.float32, copy=False)
        return rows.reshape(stop - start, *tensor.shape[1:])
