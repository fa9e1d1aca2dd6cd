"""Weights and position constants of an artifact, read back and compared with the checkpoint's.

Of every matrix some rows. Rounding moves a weight by a part of its group's scale: a row stays near, and the best factor
between the two rows of a group stays near 1. Rows of another layer or checkpoint are far away. Scales of another layer
leave codes that still fit in direction, but each group's factor is the ratio of two scales: that is what the second
figure sees. Neither says anything of a group that is too small for the stored type to hold: it has to be as small in
the artifact, and no more.

Position constants (inverse frequencies, factor of cosines and sines, sliding window) are computed here from config.json
as it was given, by the published formulas, and compared with what transformers computes for the reference as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.manifest import Manifest
from normistral.errors import CheckpointError, ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import Rows, WeightReader, shown
from normistral.export.onnx.bloom import split_heads
from normistral.export.reference.layerwise import empty_model
from normistral.export.verify import CAUSE
from normistral.export.verify.stored import OnnxWeights, OpenVINOWeights, StoredMatrix, StoredPositions

# Relative difference of a frequency: transformers computes in float32, float16 tables keep 11 bits.
_TOLERANCE = {"float32": 1e-4, "float16": 2e-3}
_SMALLEST = {"float32": 1e-9, "float16": 1e-6}
_DEFAULT_WINDOW = 4096  # of transformers' MistralConfig, where config.json does not name one


def check_positions(stored: StoredPositions, checkpoint: Checkpoint, context: int) -> None:
    """Compare the artifact and transformers' reference with what config.json says.

    Args:
        context: tokens of the artifact.

    Raises:
        ExportError: naming what differs.
    """
    raw = checkpoint.raw_config
    frequencies, factor = published_frequencies(raw)
    rotary = empty_model(checkpoint).get_submodule("model.rotary_emb")
    _compare_angles(
        "transformers' reference", rotary.inv_freq.numpy(), rotary.attention_scaling, frequencies, factor, "float32"
    )
    _compare_angles("the artifact", stored.frequencies, stored.factor, frequencies, factor, stored.dtype)
    window = published_window(raw)
    if window is not None and window >= context and stored.window is None:
        return  # a window that no text of this artifact fills
    if stored.window != window:
        raise ExportError(f"attention reaches {stored.window} tokens back, config.json says {window}", CAUSE)


def published_frequencies(raw: dict[str, Any]) -> tuple[NDArray[np.float64], float]:
    """Inverse frequencies [head_dim/2] and the factor of cosines and sines.

    Sources: Su et al. 2021 (RoPE); Chen et al. 2023 (linear); Peng et al. 2023 (YaRN, equations 17 to 22); Llama 3's
    published `apply_scaling`. Dynamic scaling (bloc97 2023) is plain up to max_position_embeddings.
    """
    form = (raw.get("rope_parameters") or {}) | (raw.get("rope_scaling") or {})
    theta = form.get("rope_theta") or raw.get("rope_theta") or 10000.0
    width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    frequencies = float(theta) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    kind = form.get("rope_type") or form.get("type") or "default"
    if kind == "linear":
        return frequencies / form["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, form), 1.0
    if kind == "yarn":
        trained = form.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        return _yarn(frequencies, form, float(theta), width, trained), _yarn_factor(form)
    return frequencies, 1.0


def published_window(raw: dict[str, Any]) -> int | None:
    """Tokens that attention reaches back, the token itself included; None is all."""
    name = f"{raw.get('model_type')} {raw.get('architectures')}".lower()
    return raw.get("sliding_window", _DEFAULT_WINDOW) if "mistral" in name else None


def _llama3(frequencies: NDArray[np.float64], form: dict[str, Any]) -> NDArray[np.float64]:
    """Long waves are stretched, short ones are not, and between the two bounds there is a straight line."""
    turns = form["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the trained context
    low, high = form["low_freq_factor"], form["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(frequencies * (kept + (1 - kept) / form["factor"]))


def _yarn(
    frequencies: NDArray[np.float64], form: dict[str, Any], theta: float, width: int, trained: int
) -> NDArray[np.float64]:
    """As `_llama3`, with the ramp over the number of the dimension, from beta_fast to beta_slow turns."""

    def dimension(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(form.get("beta_fast") or 32), dimension(form.get("beta_slow") or 1)
    if form.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0.0
    stretched = np.clip((np.arange(len(frequencies)) - first) / (last - first), 0.0, 1.0)
    return np.asarray(frequencies * (1 - stretched + stretched / form["factor"]))


def _yarn_factor(form: dict[str, Any]) -> float:
    if form.get("attention_factor") is not None:
        return float(form["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if form["factor"] <= 1 else 0.1 * weight * math.log(form["factor"]) + 1.0

    if form.get("mscale") and form.get("mscale_all_dim"):
        return scale(form["mscale"]) / scale(form["mscale_all_dim"])
    return scale(1.0)


def _compare_angles(
    whose: str,
    frequencies: NDArray[Any] | None,
    factor: float | None,
    published: NDArray[np.float64],
    published_factor: float,
    dtype: str,
) -> None:
    if frequencies is None or factor is None or frequencies.shape != published.shape:
        raise ExportError(f"the angles that positions are turned by cannot be found in {whose}", CAUSE)
    if not np.allclose(frequencies, published, rtol=_TOLERANCE[dtype], atol=_SMALLEST[dtype]):
        worst = int(np.argmax(np.abs(frequencies / published - 1)))
        raise ExportError(
            f"{whose} turns positions by other angles than config.json says: frequency {worst} is "
            f"{frequencies[worst]:.4g} instead of {published[worst]:.4g}",
            CAUSE,
        )
    if not math.isclose(factor, published_factor, rel_tol=_TOLERANCE[dtype]):
        raise ExportError(
            f"{whose} multiplies cosines and sines by {factor:.5g}, config.json says {published_factor:.5g}", CAUSE
        )


# Buffers were saved in the type of the weights: bfloat16 keeps 8 bits, and float16 counts in steps of 6e-8 near zero.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-6


def check_rotary_buffers(checkpoint: Checkpoint) -> None:
    """Compare every stored `rotary_emb.inv_freq` with config.json; scaled or, as transformers once kept them, not.

    Raises:
        CheckpointError: one belongs to other rotary angles, so that config.json may not be this model's.
    """
    names = [name for name in checkpoint.tensors if checkpoint.family.is_computed(name)]
    if not names:
        return
    reader, raw = WeightReader(checkpoint.tensors), checkpoint.raw_config
    theta = (raw.get("rope_parameters") or raw.get("rope_scaling") or {}).get("rope_theta") or raw.get("rope_theta")
    unscaled = {**raw, "rope_parameters": None, "rope_scaling": None, "rope_theta": theta}
    allowed = [published_frequencies(raw)[0], published_frequencies(unscaled)[0]]
    for name in names:
        found = reader.read(name).reshape(-1)
        if not any(len(f) == len(found) and np.allclose(found, f, _RELATIVE, _ABSOLUTE) for f in allowed):
            raise CheckpointError(
                f"{shown(name)} holds other rotary frequencies than config.json describes: "
                f"{found[min(1, len(found) - 1)]:.4g} and not {allowed[0][min(1, len(allowed[0]) - 1)]:.4g} at 1",
                "config.json and weights belong to different models: compare rope_theta and head_dim with the authors'",
            )


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

    def read(self, name: str) -> Rows | None:
        """A whole matrix, dequantised: float32 [out, in]; None where the artifact has none of this name."""
        if name not in self._parts or name not in self._shapes:
            return None
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
