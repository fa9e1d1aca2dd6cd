"""Writes weights into the one file beside model.onnx, in the order in which they come, never holding more than a block.

Format: "External Data" of the ONNX specification (TensorProto.external_data: location, offset, length).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray

ALIGNMENT = 4096  # of each tensor in the file: a page, so that mapped tensors share none


class ExternalData:
    """An open data file; a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, dtype: int, shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]) -> onnx.TensorProto:
        """Append a tensor.

        Args:
            dtype: a TensorProto.DataType.
            shape: of the whole tensor; the blocks come in its row-major order.

        Returns:
            the initializer that points to it.
        """
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)  # the gap reads as zeros
        for block in blocks:
            self._file.write(np.ascontiguousarray(block).data)
        return point_to(name, dtype, shape, self._path.name, offset, self._file.tell() - offset)


def point_to(
    name: str, dtype: int, shape: tuple[int, ...], location: str, offset: int, length: int
) -> onnx.TensorProto:
    """An initializer whose bytes lie in a file; several may point to the same bytes with shapes of their own."""
    tensor = onnx.TensorProto(name=name, data_type=dtype, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
