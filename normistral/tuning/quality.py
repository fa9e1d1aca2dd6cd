"""What settings cost: how far a model's predictions are from its own in exact arithmetic, and how far they may be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normistral.artifact.manifest import Manifest
from normistral.evaluation.metrics import compare_logits
from normistral.runtime.engines.base import Logits
from normistral.runtime.model import Model

PROBE_TOKENS = 300
# Settings may take a rounded model's distance from its checkpoint to 1.5 times what exact arithmetic has. Both errors
# are small and independent, KL is quadratic in them, and so they add: half of the rounding's is left for the settings.
_SHARE_OF_ROUNDING = 0.5
_LEAST_BOUND = 0.001  # of float weights, whose own rounding is next to nothing; bf16 arithmetic costs about this
_LARGEST_BOUND = 0.02  # a model that rounding already hurt badly is no reason to hurt it more
_UNKNOWN_BOUND = 0.005  # where the manifest says nothing of the rounding


def quality_bound(manifest: Manifest) -> float:
    """Mean KL divergence (nats) from exact arithmetic that settings may cost at most."""
    rounding = (manifest.quality or {}).get("probe_kl_nats")
    if rounding is None:
        return _UNKNOWN_BOUND
    return min(max(_SHARE_OF_ROUNDING * rounding, _LEAST_BOUND), _LARGEST_BOUND)


def take_probe(token_ids: Sequence[int], context_length: int) -> list[int]:
    """The tokens that are predicted: the first of a text, as many as fit."""
    return list(token_ids[: min(PROBE_TOKENS, context_length)])


def predict(model: Model, token_ids: Sequence[int]) -> Logits:
    """Logits [n, vocabulary] behind every token, in pieces of the model's own size."""
    sequence = model.create_sequence()
    try:
        return np.concatenate(list(sequence.logits_of_last(token_ids, len(token_ids), from_scratch=True)))
    finally:
        sequence.close()


def settings_kl(exact: Logits, model: Model, token_ids: Sequence[int]) -> float:
    """Mean KL(exact || these settings) in nats; infinite where they compute nonsense."""
    logits = predict(model, token_ids)
    return compare_logits(exact, logits)[0] if np.isfinite(logits).all() else float("inf")
