"""From logits to a token, and to log-probabilities: numpy, with the semantics of transformers' logits processors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.engines.base import Logits
from normistral.runtime.options import GenerationConfig


class Sampler:
    """Draws the next token of one generation; holds the random state and the tokens seen.

    Filters apply in transformers' order: repetition penalty, temperature, top_k, top_p, min_p.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int]) -> None:
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._seen = set(prompt_ids) if config.repetition_penalty != 1.0 else None

    def sample(self, logits: Logits, allowed: NDArray[np.bool_] | None = None) -> int:
        """The next token id for logits [vocabulary].

        Args:
            allowed: of each token whether it may be drawn, before any filter; at least one may. None allows all.

        Raises:
            EngineError: the logits are not finite.
        """
        if not np.isfinite(logits.max()):
            raise EngineError(
                "the model returned logits that are not finite",
                "try --exact; if that helps, this device cannot run this artifact",
            )
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen, self._config.repetition_penalty)
        token_id = int(np.argmax(logits)) if self._config.temperature == 0 else self._draw(logits)
        self.observe(token_id)
        return token_id

    def observe(self, token_id: int) -> None:
        """Take note of a token of the answer that was not drawn here."""
        if self._seen is not None:
            self._seen.add(token_id)

    def _draw(self, logits: Logits) -> int:
        config = self._config
        candidates, probabilities = most_likely(logits, config.temperature, config.top_k)
        keep = nucleus(probabilities, config.top_p) & (probabilities >= config.min_p * probabilities[0])
        keep &= probabilities > 0.0  # what may not be drawn
        candidates, probabilities = candidates[keep], probabilities[keep]
        # Inverse of the cumulative distribution: one uniform number a token, so a seed fixes the text.
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(candidates[min(int(drawn), len(candidates) - 1)])


def penalise_repetition(logits: Logits, seen: set[int], penalty: float) -> Logits:
    """Make seen tokens less likely (CTRL, Keskar et al. 2019): divide what is positive, multiply what is negative."""
    ids = np.fromiter(seen, np.int64, len(seen))
    ids = ids[ids < len(logits)]
    penalised = logits.copy()
    penalised[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return penalised


def most_likely(logits: Logits, temperature: float, top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Token ids of the top_k (0: all) largest logits, best first, and their probabilities at this temperature."""
    if 0 < top_k < len(logits):
        ids = np.argpartition(logits, -top_k)[-top_k:]
        ids = ids[np.argsort(-logits[ids], kind="stable")]
    else:
        ids = np.argsort(-logits, kind="stable")
    below_best = logits[ids].astype(np.float64) - float(logits[ids[0]])
    with np.errstate(over="ignore"):  # next to 0 the temperature leaves nothing but the best
        weights = np.exp(below_best / temperature)
    return ids, weights / weights.sum()


def nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Mask of the smallest set of tokens (given best first) that reaches top_p (Holtzman et al. 2020)."""
    if top_p >= 1.0:
        return np.ones(len(probabilities), np.bool_)
    before: NDArray[np.float64] = np.cumsum(probabilities) - probabilities
    keep: NDArray[np.bool_] = before < top_p
    return keep


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log-probabilities (nats) of logits [..., vocabulary], in float64."""
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normaliser: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - normaliser


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of given tokens; result of `Model.score`.

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
