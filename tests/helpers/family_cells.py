"""One cell of the family's table: an exported tiny checkpoint, run in many ways, against transformers.

    cell = make_cell(checkpoint, tmp_path / "artifact", "onnx", "int4")
    cell.errors()        # {"at once": 3e-7, "token by token": ...}, shares of the logits' spread

The reference is transformers in float32 with the matrices that the artifact holds; the engine runs in exact mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dequantise
import dequantise_ir
import numpy as np
from tiny_family import TOKENS, WINDOW, reference_logits, source_of, stored_tensors

import normistral
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.runtime.engines.base import Backend, Engine
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

FORMATS = ("openvino", "onnx")
WEIGHTS = ("int8", "int4")
TOLERANCE = 1e-3  # of the logits' spread
# Distance of a rounded matrix from the stored one, as a share of its norm. A normal distribution loses 0.005 and 0.09
# in groups of 16 to 128; a matrix whose rows are in another order is 1.4 away.
ROUNDING = {"int8": 0.02, "int4": 0.2}
JUNK = [7, 8, 9]


@dataclass
class Cell:
    source: Path
    folder: Path
    weights: str

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    @cached_property
    def backend(self) -> Backend:
        return load_backend(Artifact(self.folder, self.manifest), EngineConfig(exact=True))

    @cached_property
    def rounded(self) -> dict[str, np.ndarray]:
        reader = dequantise if self.manifest.format == "onnx" else dequantise_ir
        return reader.dequantised(self.folder)

    @cached_property
    def expected(self) -> np.ndarray:
        return reference_logits(self.source, self.rounded)

    def errors(self) -> dict[str, float]:
        """Largest difference of a logit, as a share of the logits' spread, for every way to feed 48 tokens."""
        return {name: self._error_of(name) for name in WAYS}

    def rounding_error(self) -> float:
        """Largest distance of a matrix of the artifact from the checkpoint's, as a share of its norm.

        Without it, rows in a wrong order would go unnoticed: the reference has the artifact's matrices.
        """
        stored = {name: tensor.numpy() for name, tensor in stored_tensors(self.source).items() if tensor.ndim == 2}
        if stored.keys() != self.rounded.keys():
            return np.inf
        return max(
            float(np.linalg.norm(self.rounded[name] - matrix) / np.linalg.norm(matrix))
            for name, matrix in stored.items()
        )

    def problems(self) -> Iterator[str]:
        """What is beyond its bound."""
        for name in WAYS:
            if not (error := self._error_of(name)) <= TOLERANCE:
                yield f"{name}: {error:.1e}"
        if not (distance := self.rounding_error()) <= ROUNDING[self.weights]:
            yield f"matrices: {distance:.1e}"

    def _error_of(self, way: str) -> float:
        logits = WAYS[way](self.backend.create_engine())
        expected = self.expected[-len(logits) :]
        return float(np.abs(logits - expected).max() / np.ptp(self.expected))


def make_cell(given: Path, folder: Path, format: str, weights: str, *, verify: bool = True) -> Cell:
    """Export it."""
    recipe = "fast" if weights == "int4" else None
    normistral.export_model(str(given), folder, format=format, weights=weights, recipe=recipe, verify=verify)
    return Cell(source_of(given), folder, weights)


def at_once(engine: Engine) -> np.ndarray:
    return engine.forward(TOKENS, last=len(TOKENS))


def token_by_token(engine: Engine) -> np.ndarray:
    return np.concatenate([engine.forward([token]) for token in TOKENS])


def second_turn(engine: Engine) -> np.ndarray:
    """A prompt that crosses the window's edge, an answer, a second prompt."""
    first = engine.forward(TOKENS[:20], last=20)
    answer = [engine.forward([token]) for token in TOKENS[20:26]]
    return np.concatenate([first, *answer, engine.forward(TOKENS[26:], last=22)])


def after_a_trim(engine: Engine) -> np.ndarray:
    engine.forward(TOKENS[:30] + JUNK * 3)
    engine.trim(30)
    return engine.forward(TOKENS[30:], last=18)


def after_rejected_drafts(engine: Engine) -> np.ndarray:
    """Before, at and behind the window's edge: a good token, and three drafts that are computed and taken back."""
    engine.forward(TOKENS[: WINDOW - 3])
    logits = []
    for length in range(WINDOW - 2, WINDOW + 3):
        logits.append(engine.forward([TOKENS[length - 1], *JUNK], last=4)[:1])
        engine.trim(length)
    return np.concatenate([*logits, engine.forward(TOKENS[WINDOW + 2 :], last=len(TOKENS) - WINDOW - 2)])


WAYS = {
    "at once": at_once,
    "token by token": token_by_token,
    "second turn": second_turn,
    "after a trim": after_a_trim,
    "after rejected drafts": after_rejected_drafts,
}
