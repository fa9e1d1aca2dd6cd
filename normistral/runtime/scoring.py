"""Log-probabilities of given tokens, out of the logits before each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.engines.base import Logits


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What `Model.score` gives.

    Attributes:
        logprobs: float64 [n], in nats, under the model's own distribution.
        greedy: bool [n], whether the token is the most likely one (of several, the one with the lowest id).
    """

    logprobs: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def score_tokens(pieces: Iterable[Logits], token_ids: Sequence[int]) -> TokenScores:
    """Score n tokens.

    Args:
        pieces: logits [m, vocabulary] before each token, in order, m adding up to n.
        token_ids: the n tokens.

    Raises:
        EngineError: logits that are not finite.
    """
    targets = np.asarray(token_ids)
    logprobs, greedy = np.empty(len(targets)), np.empty(len(targets), np.bool_)
    done = 0
    for logits in pieces:
        rows, scored = np.arange(len(logits)), slice(done, done + len(logits))
        highest = logits.max(axis=-1)  # [m]
        if not np.isfinite(highest).all():
            raise EngineError("the model returned logits that are not finite", "load it with exact=True")
        sums = np.exp(logits - highest[:, None]).sum(axis=-1, dtype=np.float64)
        logprobs[scored] = logits[rows, targets[scored]] - (highest + np.log(sums))
        greedy[scored] = logits.argmax(axis=-1) == targets[scored]
        done += len(logits)
    assert done == len(targets)
    return TokenScores(logprobs, greedy)
