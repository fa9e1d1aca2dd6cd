"""Position constants of attention: inverse frequencies, factor of cosines and sines, sliding window.

Computed here from config.json as it was given, by the published formulas, and compared with what transformers computes
for the reference and with the constants of the artifact.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import CheckpointError, ExportError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import WeightReader, shown
from normistral.export.reference.layerwise import empty_model
from normistral.export.verify import CAUSE
from normistral.export.verify.stored import StoredPositions

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
    _compare(
        "transformers' reference", rotary.inv_freq.numpy(), rotary.attention_scaling, frequencies, factor, "float32"
    )
    _compare("the artifact", stored.frequencies, stored.factor, frequencies, factor, stored.dtype)
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


def _compare(
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
