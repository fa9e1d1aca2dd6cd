"""Rounded matrices in a scratch folder, between the calibration that makes them and the format that stores them.

They are mapped when they are read: an export that copies them row by row holds no more than those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.export.quantize.scheme import Grid, Rounded, Steps, pack


@dataclass(slots=True)
class RoundedTables:
    """The matrices of one export, under the checkpoint's names ("model.layers.0.self_attn.q_proj.weight")."""

    folder: Path
    _grids: dict[str, Grid] = field(default_factory=dict)

    @classmethod
    def make(cls, workspace: Path) -> RoundedTables:
        """An empty collection in a folder of its own."""
        folder = workspace / "rounded"
        folder.mkdir()
        return cls(folder)

    @property
    def grids(self) -> Mapping[str, Grid]:
        """How each matrix was rounded."""
        return self._grids

    def write(self, name: str, codes: NDArray[np.uint8], steps: Steps, grid: Grid) -> None:
        """Keep a matrix: codes [rows, columns], one to a byte."""
        rounded = pack(codes, steps, grid)
        np.save(self.folder / f"{name}.codes.npy", rounded.codes)
        np.save(self.folder / f"{name}.scales.npy", rounded.scales)
        if rounded.zero_points is not None:
            np.save(self.folder / f"{name}.zero_points.npy", rounded.zero_points)
        self._grids[name] = grid

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Rounded:
        """Rows of a matrix, mapped."""
        rows = slice(start, stop)
        zeros = None if self._grids[name].symmetric else self._map(name, "zero_points")[rows]
        return Rounded(self._map(name, "codes")[rows], self._map(name, "scales")[rows], zeros)

    def _map(self, name: str, part: str) -> NDArray[Any]:
        values: NDArray[Any] = np.load(self.folder / f"{name}.{part}.npy", mmap_mode="r")
        return values
