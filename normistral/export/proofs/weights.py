"""Some rows of every matrix, read back from the artifact and compared with the checkpoint's.

Rounding moves a weight by a part of its group's scale: a row stays near, and the best factor between the two rows of a
group stays near 1. Rows of another layer or checkpoint are far away. Scales of another layer leave codes that still fit
in direction, but each group's factor is the ratio of two scales: that is what the second figure sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.checkpoint import Checkpoint
from normistral.export.config import expected_tensors
from normistral.export.onnx.bloom import split_heads
from normistral.export.onnx.llama import rotary_tables
from normistral.export.onnx.reader import Rows, WeightReader
from normistral.export.proofs.stored import StoredMatrix
from normistral.export.proofs.stored_ir import IRWeights
from normistral.export.proofs.stored_onnx import OnnxWeights, packed_parts
from normistral.manifest import Manifest

_ROWS = 16  # of every matrix; every file's bytes are hashed, so this looks for wrong matrices and not for wrong bits
_POSITIONS = 64  # of the rotary tables
# Largest distance of the rows, as a share of their norm; and of the groups' best factors from 1 (root mean square).
# Plain rounding of a normal distribution: 0.11 and 0.02 at 4 bits in groups of 128, 0.007 and 0.0005 at 8 bits; GPTQ
# 0.16 and 0.03 (demo model). Other scales of the same model: 0.1 and more in the factors.
_DISTANCE = {4: 0.4, 8: 0.03, 16: 1e-3, 32: 1e-6}
_FACTORS = {4: 0.06, 8: 0.005, 16: 1e-4, 32: 1e-6}
_CAUSE = "the artifact was changed after it was written, or the exporter has a bug: export again, and report it"


def check_weights(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> int:
    """Compare.

    Returns:
        how many matrices were compared.

    Raises:
        ExportError: naming the matrix, vector or table that is not the checkpoint's.
    """
    reader = WeightReader(checkpoint.folder, checkpoint.family)
    expected = {name for name, shape in expected_tensors(checkpoint.config).items() if len(shape) == 2}
    stored: OnnxWeights | IRWeights
    if manifest.format == "onnx":
        stored = OnnxWeights(folder, checkpoint.family.embedding)
        _check_vectors(stored, reader)
    else:
        stored = IRWeights(folder)
    _check_rotation(stored, checkpoint)
    seen: set[str] = set()
    for matrix in stored.matrices():
        for name, offset in _parts(matrix, reader, manifest, checkpoint):
            _compare(matrix, name, offset, reader)
            seen.add(name)
    absent = sorted(expected - {_owner(name) for name in seen})
    if absent:
        raise ExportError(f"the artifact has no matrix {absent[0]}", _CAUSE)
    return len(seen)


def _parts(
    matrix: StoredMatrix, reader: WeightReader, manifest: Manifest, checkpoint: Checkpoint
) -> Iterator[tuple[str, int]]:
    """The checkpoint's matrices that this one holds, and at which row each begins."""
    names = [matrix.name]
    if manifest.format == "onnx" and matrix.bits <= 8:
        if matrix.name.endswith("query_key_value.weight"):
            parts = split_heads(reader, matrix.name.removesuffix(".weight"), checkpoint.architecture)
            names = [f"{part}.weight" for part in parts]
        else:
            names = packed_parts(matrix.name) or names
    offset = 0
    for name in names:
        yield name, offset
        offset += reader.shape(name)[0]


def _owner(name: str) -> str:
    """The stored tensor that a part of BLOOM's packed projection belongs to."""
    for part in (".query.weight", ".key.weight", ".value.weight"):
        if name.endswith(f"query_key_value{part}"):
            return name.replace(part, ".weight")
    return name


def _compare(matrix: StoredMatrix, name: str, offset: int, reader: WeightReader) -> None:
    count = reader.shape(name)[0]
    rows = sorted({int(row) for row in np.linspace(0, count - 1, min(_ROWS, count))})
    original = reader.read_rows(name, rows)
    found = matrix.read([offset + row for row in rows])
    distance = float(np.linalg.norm(found - original) / max(float(np.linalg.norm(original)), 1e-30))
    if not distance <= _DISTANCE[matrix.bits]:
        raise ExportError(
            f"{name} is not the checkpoint's: its rows are {distance:.2g} of their norm away, at most "
            f"{_DISTANCE[matrix.bits]:g} is rounding",
            _CAUSE,
        )
    spread = spread_of_factors(original, found, matrix.group_size)
    if not spread <= _FACTORS[matrix.bits]:
        raise ExportError(
            f"the scales of {name} are not those of its weights: groups are off by a factor of {1 + spread:.3f}, at "
            f"most {1 + _FACTORS[matrix.bits]:g} is rounding",
            _CAUSE,
        )


def spread_of_factors(original: Rows, found: Rows, group_size: int) -> float:
    """How far the best factor between each group's two versions is from 1, root mean square.

    Args:
        original, found: float32 [rows, columns].
    """
    shape = (len(original), -1, group_size)
    wanted, have = original.reshape(shape).astype(np.float64), found.reshape(shape).astype(np.float64)
    norms: NDArray[np.float64] = np.sum(have * have, axis=-1)
    products = np.sum(wanted * have, axis=-1)
    factors = np.divide(products, norms, out=np.ones_like(norms), where=norms > 0)
    return float(np.sqrt(np.mean((factors - 1) ** 2)))


def _check_vectors(stored: OnnxWeights, reader: WeightReader) -> None:
    for name, values in stored.vectors().items():
        if name in reader and not np.allclose(values, reader.read(name), rtol=1e-3, atol=1e-6):
            raise ExportError(f"{name} is not the checkpoint's", _CAUSE)


def _check_rotation(stored: OnnxWeights | IRWeights, checkpoint: Checkpoint) -> None:
    """The angles that positions are turned by."""
    architecture, config = checkpoint.architecture, checkpoint.config
    if architecture.positions != "rotary":
        return
    cosines, sines = rotary_tables(config, architecture.head_dim, _POSITIONS)
    if isinstance(stored, OnnxWeights):
        tables = stored.rotary_tables(_POSITIONS)
        agree = tables is None or (np.allclose(tables[0], cosines, atol=2e-3) and np.allclose(tables[1], sines, atol=2e-3))
    else:
        frequencies = stored.rotary_frequencies()
        agree = frequencies is None or np.allclose(np.cos(frequencies), cosines[1] / max(cosines[0]), atol=1e-3)
    if not agree:
        raise ExportError(
            f"positions are turned by other angles than the checkpoint's (rope_theta {config['rope_theta']:g})", _CAUSE
        )
