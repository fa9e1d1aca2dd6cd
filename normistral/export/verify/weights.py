"""Some rows of every matrix, read back from the artifact and compared with the checkpoint's.

Rounding moves a weight by a part of its group's scale: a row stays near, and the best factor between the two rows of a
group stays near 1. Rows of another layer or checkpoint are far away. Scales of another layer leave codes that still fit
in direction, but each group's factor is the ratio of two scales: that is what the second figure sees. Neither says
anything of a group that is too small for the stored type to hold: it has to be as small in the artifact, and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import Manifest
from normistral.errors import ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import Rows, WeightReader
from normistral.export.onnx.bloom import split_heads
from normistral.export.verify import CAUSE
from normistral.export.verify.positions import check_positions
from normistral.export.verify.stored import OnnxWeights, OpenVINOWeights, StoredMatrix

_BLOCK_ROWS = 1024  # read at once: 60 MB of float32 at the 7B's widest
_ROWS = 16  # of every matrix; every file's bytes are hashed, so this looks for wrong matrices and not for wrong bits
_PACKED = re.compile(r"(.+\.)([qkv]{2,3})_proj")  # queries, keys and values, as far as they have one grid
# Least cosine between a group and its rounding that is taken for the same group, as a median; 4 bits leave 0.99,
# another matrix 0.1. And the groups' factors, root mean square of their distance from 1: plain rounding of a normal
# distribution leaves 0.02 at 4 bits in groups of 128 and 0.0005 at 8 bits; GPTQ, which moves a weight's error on to
# others, 0.035 and 0.0064 in the demo model's groups of 64; scales of another layer 0.1 and more.
_ALIGNED = 0.9
_FACTORS = {4: 0.06, 8: 0.02, 16: 1e-3, 32: 1e-6}


class ArtifactMatrices:
    """All matrices of a written artifact, under the checkpoint's names; the files are read when one is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
        self._manifest, self._checkpoint = manifest, checkpoint
        self._reader = WeightReader(checkpoint.tensors)
        self._stored = (
            OnnxWeights(folder, checkpoint.family.embedding) if manifest.format == "onnx" else OpenVINOWeights(folder)
        )
        self._shapes = {name: shape for name, shape in checkpoint.tensor_shapes.items() if len(shape) == 2}
        # What each stored matrix holds: itself, name of the checkpoint's, row at which that begins.
        self._held = [
            (matrix, name, offset)
            for matrix in self._stored.matrices()
            for name, offset in _parts(matrix, self._reader, manifest, checkpoint)
        ]
        self._parts: dict[str, list[tuple[StoredMatrix, int, list[int]]]] = {}
        for matrix, name, offset in self._held:
            whole, parts = self._reader.source(name)
            self._parts.setdefault(whole, []).append((matrix, offset, [row for part in parts for row in part]))

    def __contains__(self, name: str) -> bool:
        return name in self._parts and name in self._shapes

    def read(self, name: str) -> Rows:
        """A whole matrix, dequantised: float32 [out, in]."""
        values = np.empty(self._shapes[name], np.float32)
        for matrix, offset, rows in self._parts[name]:
            for start in range(0, len(rows), _BLOCK_ROWS):
                numbers = rows[start : start + _BLOCK_ROWS]
                values[numbers] = matrix.read(range(offset + start, offset + start + len(numbers)))
        return values

    def check(self) -> int:
        """Compare with the checkpoint's.

        Returns:
            how many matrices were compared.

        Raises:
            ExportError: naming the matrix, vector or table that is not the checkpoint's.
        """
        if isinstance(self._stored, OnnxWeights):
            _check_vectors(self._stored, self._reader, self._manifest, self._checkpoint)
        if self._checkpoint.architecture.positions == "rotary":
            check_positions(self._stored.positions(), self._checkpoint, self._manifest.context_length)
        for matrix, name, offset in self._held:
            _compare(matrix, name, offset, self._reader)
        absent = sorted(self._shapes.keys() - self._parts.keys())
        if absent:
            raise ExportError(f"the artifact has no matrix {absent[0]}", CAUSE)
        return len({name for _, name, _ in self._held})


def _parts(
    matrix: StoredMatrix, reader: WeightReader, manifest: Manifest, checkpoint: Checkpoint
) -> Iterator[tuple[str, int]]:
    """The checkpoint's matrices that this one holds, and at which row each begins."""
    names = [matrix.name]
    if manifest.recipe.graph == "fused":
        names = parts_of(matrix.name, reader, checkpoint)
    offset = 0
    for name in names:
        yield name, offset
        offset += reader.shape(name)[0]


def _compare(matrix: StoredMatrix, name: str, offset: int, reader: WeightReader) -> None:
    count = reader.shape(name)[0]
    rows = sorted({int(row) for row in np.linspace(0, count - 1, min(_ROWS, count))})
    original = reader.read_rows(name, rows)
    found = matrix.read([offset + row for row in rows])
    factors, cosines = compare_groups(original, found, matrix.group_size)
    held = _largest_of_groups(original, matrix.group_size) >= matrix.smallest
    if np.any(_largest_of_groups(found - original, matrix.group_size)[~held] > matrix.smallest):
        raise ExportError(f"{name} is not the checkpoint's: weights near zero have become large", CAUSE)
    if not held.any():
        return
    factors, cosines = factors[held], cosines[held]
    if np.median(np.abs(cosines)) < _ALIGNED:
        distance = float(np.linalg.norm(found - original) / max(float(np.linalg.norm(original)), 1e-30))
        raise ExportError(
            f"{name} is not the checkpoint's: its rows are {distance:.2g} of their norm away, and point elsewhere",
            CAUSE,
        )
    spread = float(np.sqrt(np.mean((factors - 1) ** 2)))
    if not spread <= _FACTORS[matrix.bits]:
        raise ExportError(
            f"the scales of {name} are not those of its weights: groups are off by {spread:.2g}, at most "
            f"{_FACTORS[matrix.bits]:g} is rounding",
            CAUSE,
        )


def compare_groups(original: Rows, found: Rows, group_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For every group of a row: the factor that brings `found` nearest to `original`, and the cosine between them.

    A group of zeros counts as right where both are zeros.

    Args:
        original, found: float32 [rows, columns].
    """
    shape = (len(original), -1, group_size)
    wanted, have = original.reshape(shape).astype(np.float64), found.reshape(shape).astype(np.float64)
    products = np.sum(wanted * have, axis=-1)
    lengths, wanted_lengths = np.linalg.norm(have, axis=-1), np.linalg.norm(wanted, axis=-1)
    both_zero = np.where((lengths == 0) & (wanted_lengths == 0), 1.0, 0.0)
    factors = np.divide(products, lengths**2, out=both_zero.copy(), where=lengths > 0)
    cosines = np.divide(products, lengths * wanted_lengths, out=both_zero, where=lengths * wanted_lengths > 0)
    return factors, cosines


def _largest_of_groups(rows: Rows, group_size: int) -> Rows:
    """Largest magnitude of every group: [rows, groups]."""
    return np.asarray(np.abs(rows).reshape(len(rows), -1, group_size).max(axis=-1))


def parts_of(name: str, reader: WeightReader, checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's tensors that the fused graph packs into one, in their order; others stand for themselves."""
    stem, _, kind = name.rpartition(".")
    if stem.endswith("query_key_value"):
        return [f"{part}.{kind}" for part in split_heads(reader, stem, checkpoint.architecture)]
    if packed := _PACKED.fullmatch(stem):
        return [f"{packed[1]}{part}_proj.{kind}" for part in packed[2]]
    return [name]


def _check_vectors(stored: OnnxWeights, reader: WeightReader, manifest: Manifest, checkpoint: Checkpoint) -> None:
    for name, values in stored.vectors().items():
        parts = parts_of(name, reader, checkpoint) if manifest.recipe.graph == "fused" else [name]
        if all(part in reader for part in parts):
            original = np.concatenate([reader.read(part) for part in parts])
            if not np.allclose(values, original, rtol=1e-3, atol=1e-6):
                raise ExportError(f"{name} is not the checkpoint's", CAUSE)
