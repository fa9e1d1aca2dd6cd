"""From logits to a token, and to log-probabilities: numpy.

Where transformers has a logits processor, with its semantics; otherwise with those of the program that the function
names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.engines.base import Logits
from normistral.runtime.options import GenerationConfig

_LONGEST_MATCH = 64  # tokens of a repeated sequence that count; of a text that repeats one token there would be all
_MOST_PENALTY = 1e4  # far beyond any logit, and within float32


class Sampler:
    """Draws the next token of one generation; holds the random state and the tokens seen.

    First what changes logits: repetition penalty, presence and frequency penalties, DRY, bias. Then, unless the
    temperature is 0, what leaves out tokens, in transformers' order: temperature, top_k, top_p, min_p, typical_p; and
    XTC.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int]) -> None:
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._seen = set(prompt_ids) if config.repetition_penalty != 1.0 else None
        self._counts: dict[int, int] | None = {} if config.presence_penalty or config.frequency_penalty else None
        self._tokens = list(prompt_ids) if config.dry_multiplier else None
        self._breakers = np.array([one for one in config.dry_sequence_breakers if isinstance(one, int)], np.int64)

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
        logits = self._penalise(logits)
        token_id = int(np.argmax(logits)) if self._config.temperature == 0 else self._draw(logits)
        self.observe(token_id)
        return token_id

    def observe(self, token_id: int) -> None:
        """Take note of a token of the answer that was not drawn here."""
        if self._seen is not None:
            self._seen.add(token_id)
        if self._counts is not None:
            self._counts[token_id] = self._counts.get(token_id, 0) + 1
        if self._tokens is not None:
            self._tokens.append(token_id)

    def _penalise(self, logits: Logits) -> Logits:
        config = self._config
        if self._seen is not None:
            logits = penalise_repetition(logits, self._seen, config.repetition_penalty)
        if self._counts:
            logits = penalise_counts(logits, self._counts, config.presence_penalty, config.frequency_penalty)
        if self._tokens and config.dry_penalty_last_n:
            last = np.array(self._tokens[-config.dry_penalty_last_n :], np.int64)
            penalties = dry_penalties(
                last, self._breakers, config.dry_multiplier, config.dry_base, config.dry_allowed_length
            )
            logits = add_to_logits(logits, {token_id: -penalty for token_id, penalty in penalties.items()})
        if config.logit_bias:
            logits = add_to_logits(logits, dict(config.logit_bias))
        return logits

    def _draw(self, logits: Logits) -> int:
        config = self._config
        candidates, probabilities = most_likely(logits, config.temperature, config.top_k)
        keep = nucleus(probabilities, config.top_p) & (probabilities >= config.min_p * probabilities[0])
        keep &= probabilities > 0.0  # what may not be drawn
        candidates, probabilities = candidates[keep], probabilities[keep]
        if config.typical_p < 1.0:
            keep = locally_typical(probabilities / probabilities.sum(), config.typical_p)
            candidates, probabilities = candidates[keep], probabilities[keep]
        if config.xtc_probability > 0.0 and self._random.random() < config.xtc_probability:
            keep = exclude_top_choices(probabilities / probabilities.sum(), config.xtc_threshold)
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


def penalise_counts(logits: Logits, counts: dict[int, int], presence: float, frequency: float) -> Logits:
    """Subtract `presence` once, and `frequency` for each time, from the logits of tokens that came (OpenAI's API).

    Args:
        counts: how often each token stands in the answer; the prompt does not count, as in vLLM.
    """
    return add_to_logits(logits, {token_id: -(presence + frequency * count) for token_id, count in counts.items()})


def add_to_logits(logits: Logits, terms: dict[int, float]) -> Logits:
    """Logits plus a term for some tokens, as OpenAI's logit_bias."""
    ids = np.fromiter(terms.keys(), np.int64, len(terms))
    values = np.fromiter(terms.values(), np.float32, len(terms))
    known = ids < len(logits)
    changed = logits.copy()
    changed[ids[known]] += values[known]
    return changed


def dry_penalties(
    tokens: NDArray[np.int64], breakers: NDArray[np.int64], multiplier: float, base: float, allowed_length: int
) -> dict[int, float]:
    """Penalty of each token that would go on with a sequence that came before: DRY ("don't repeat yourself").

    By p-e-w for text-generation-webui (pull request 5677), as in llama.cpp: where the end of `tokens` stands earlier
    too, with n tokens in common, the token behind that place gets multiplier * base ** (n - allowed_length); of several
    places the longest counts. A sequence never goes across a breaker.
    """
    if len(tokens) == 0 or tokens[-1] in breakers:
        return {}
    ends = np.flatnonzero(tokens[:-1] == tokens[-1])  # last place of each earlier occurrence
    lengths = np.ones(len(ends), np.int64)
    growing = np.arange(len(ends))
    for common in range(1, min(len(tokens), _LONGEST_MATCH)):
        token = tokens[-1 - common]
        if token in breakers:
            break
        growing = growing[ends[growing] >= common]
        growing = growing[tokens[ends[growing] - common] == token]
        if len(growing) == 0:
            break
        lengths[growing] += 1
    longest: dict[int, int] = {}
    for token_id, length in zip(tokens[ends + 1].tolist(), lengths.tolist(), strict=True):
        if length >= allowed_length:
            longest[token_id] = max(length, longest.get(token_id, 0))
    return {
        token_id: min(multiplier * base ** (length - allowed_length), _MOST_PENALTY)
        for token_id, length in longest.items()
    }


def locally_typical(probabilities: NDArray[np.float64], mass: float) -> NDArray[np.bool_]:
    """Mask of the tokens whose surprise is closest to the entropy, as many as reach `mass` (Meister et al. 2022)."""
    surprise = -np.log(probabilities)
    away = np.abs(surprise - float(np.sum(probabilities * surprise)))
    order = np.argsort(away, kind="stable")
    last = int(np.sum(np.cumsum(probabilities[order]) < mass))
    keep: NDArray[np.bool_] = away <= away[order[min(last, len(order) - 1)]]
    return keep


def exclude_top_choices(probabilities: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Mask without the tokens (given best first) that reach the threshold, except the least likely of those: XTC.

    By p-e-w for text-generation-webui (pull request 6335), as in llama.cpp. Fewer than two such tokens change nothing.
    """
    keep = np.ones(len(probabilities), np.bool_)
    keep[: max(int(np.sum(probabilities >= threshold)) - 1, 0)] = False
    return keep


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
