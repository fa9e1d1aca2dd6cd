"""A recipe translated for the quantizer: scheme, method, calibration tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from typing import Literal

from normistral.export.quantize.scheme import QuantScheme
from normistral.export.recipe import PER_CHANNEL, Recipe, RecipeName
from normistral.export.texts import load_texts

Method = Literal["scale_search", "gptq"]

CALIBRATION_TOKENS = 8192
CORRECTION = 0.5  # share of GPTAQ's that is made: more fits the calibration's own tokens, and less other texts
SENSITIVITY_TOKENS = 2048  # of these, for the mixed-precision selection
WINDOW_TOKENS = 512
_METHODS: dict[RecipeName, Method | None] = {"fast": None, "balanced": "scale_search", "best": "gptq"}


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """Quantization of the matrices inside the layers.

    Attributes:
        method: "scale_search" searches scales and rounds to nearest; "gptq" searches scales, and GPTQ chooses the
            values.
        bits, symmetric: of the scheme.
        group_size: weights that share a scale; None is a whole row.
        float16_scales: of the scheme.
        ratio: share of the weights in that scheme; the others take `int8_scheme`.
        correction: with "gptq", the share of the error of the inputs that weights take over (`gptq.factorize`).
    """

    method: Method
    bits: int
    group_size: int | None
    symmetric: bool
    float16_scales: bool = False
    ratio: float = 1.0
    correction: float = 0.0

    def scheme(self, columns: int) -> QuantScheme:
        """The scheme of a matrix."""
        return QuantScheme(self.bits, self.group_size or columns, self.symmetric, self.float16_scales)

    def int8_scheme(self, columns: int) -> QuantScheme:
        """The scheme of a matrix that is kept in 8 bits; without zero points, which would take a byte each."""
        return QuantScheme(8, self.group_size or columns, symmetric=True, float16_scales=self.float16_scales)


def choose_plan(recipe: Recipe, group_size: int | None) -> QuantPlan | None:
    """The plan of a recipe with calibration; None for "fast", which rounds to nearest while weights are streamed."""
    method = _METHODS[recipe.recipe_name]
    if method is None:
        return None
    groups = None if group_size in (None, PER_CHANNEL) else group_size
    bits, float16_scales = 4 if recipe.weights == "int4" else 8, recipe.format == "openvino"
    correction = CORRECTION if method == "gptq" else 0.0
    return QuantPlan(method, bits, groups, recipe.is_symmetric, float16_scales, recipe.ratio, correction)


def calibration_windows(encode: Callable[[str], list[int]], context: int) -> list[list[int]]:
    """Calibration windows: token ids of one length, taken from every text in turn, about 8,192 tokens in all.

    Args:
        encode: text to token ids, as the checkpoint does it.
        context: the most tokens of a piece.
    """
    width = min(WINDOW_TOKENS, context)
    texts = []
    for text in load_texts().values():
        ids = encode(text)
        texts.append([ids[start : start + width] for start in range(0, len(ids) - width + 1, width)])
    in_turn = [window for window in chain.from_iterable(zip_longest(*texts)) if window is not None]
    return in_turn[: max(1, CALIBRATION_TOKENS // width)]


def calibration_sha256() -> str:
    """SHA-256 of the concatenated calibration texts in UTF-8, for the manifest."""
    return hashlib.sha256("".join(load_texts().values()).encode()).hexdigest()


def list_by_kind(names: Iterable[str], layer_prefix: str) -> dict[str, str]:
    """Matrices of layers as the manifest lists them: {"mlp.down_proj": "0-3,7"}."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number, _, kind = name.removeprefix(layer_prefix).removesuffix(".weight").partition(".")
        layers.setdefault(kind, []).append(int(number))
    return {kind: _ranges(sorted(layers[kind])) for kind in sorted(layers)}


def _ranges(numbers: list[int]) -> str:
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
