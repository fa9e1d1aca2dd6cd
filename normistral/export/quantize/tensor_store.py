"""Quantized matrices in a scratch folder, between quantization and the writer of the format.

They are memory-mapped when read: an export that copies them row by row holds no more than those rows.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.export.quantize.scheme import QuantizedTensor, QuantParams, QuantScheme, pack
from normistral.files import open_file


@dataclass(slots=True)
class QuantizedTensorStore:
    """The matrices of one export, under the checkpoint's names ("model.layers.0.self_attn.q_proj.weight").

    Attributes:
        schemes: of each matrix whose files are in the folder.
    """

    folder: Path
    schemes: dict[str, QuantScheme] = field(default_factory=dict)

    def write(self, name: str, qweight: NDArray[np.uint8], params: QuantParams, scheme: QuantScheme) -> None:
        """Keep a matrix: values [rows, columns], one to a byte."""
        rounded = pack(qweight, params, scheme)
        self.schemes[name] = scheme
        parts = (rounded.qweight, rounded.scales, rounded.zero_points)
        for path, part in zip(self.files(name), parts, strict=False):
            assert part is not None
            _save(path, part)

    def files(self, name: str) -> list[Path]:
        """The files of a matrix: packed values, scales, and zero points if its scheme has them."""
        parts = ("codes", "scales") if self.schemes[name].symmetric else ("codes", "scales", "zero_points")
        return [self.folder / f"{name}.{part}.npy" for part in parts]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> QuantizedTensor:
        """Rows of a matrix, mapped."""
        rows = slice(start, stop)
        zeros = None if self.schemes[name].symmetric else self._map(name, "zero_points")[rows]
        return QuantizedTensor(self._map(name, "codes")[rows], self._map(name, "scales")[rows], zeros)

    def _map(self, name: str, part: str) -> NDArray[Any]:
        values: NDArray[Any] = np.load(self.folder / f"{name}.{part}.npy", mmap_mode="r")
        return values


def _save(path: Path, values: NDArray[Any]) -> None:
    """Write a .npy file; np.save into a file would not say why the system refused it."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, follow=False), "wb") as file:
        file.write(buffer.getbuffer())
