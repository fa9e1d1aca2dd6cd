"""Perplexity, KL divergence to a reference, and confidence intervals.

Intervals are 95 % percentile intervals of a block bootstrap (Künsch 1989): blocks of 64 consecutive scored tokens are
drawn with replacement, as many as there are, 1,000 times, from a fixed seed. Blocks, because neighbouring tokens err
together: on the demo model, blocks of 64 widen the standard error of int4's mean KL by half, on English and on Bokmål,
and longer ones by little more. Not windows, because a text of a few thousand tokens has only a handful of them. They
say how far the figure would move on more text of this kind, and nothing about other kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normistral.errors import UsageError
from normistral.runtime.engines.base import Logits
from normistral.runtime.sampling import log_softmax

Floats = NDArray[np.float64]

_BLOCK_TOKENS = 64
_FEWEST_BLOCKS = 10  # with fewer the interval would look surer than it is
_RESAMPLES = 1000
_ROWS = 64  # whose probabilities are there in float64 at one time: 17 MB each for a vocabulary of 32,768


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where there are too few tokens for one (640)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Scores of each token, in the order of the text; all arrays are [n].

    Attributes:
        nll: -log of the probability that it got, in nats.
        nbytes: UTF-8 bytes of text that it stands for.
        reference_nll: the reference's `nll`; None without one, as the following.
        kl: KL(reference || artifact) of the whole distribution at its place, in nats.
        agrees: whether both have the same most likely token.
    """

    nll: Floats
    nbytes: NDArray[np.int64]
    reference_nll: Floats | None = None
    kl: Floats | None = None
    agrees: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """An artifact beside its reference. KL is KL(reference || artifact) in nats per token.

    Attributes:
        perplexity_ratio: the artifact's perplexity as a multiple of the reference's.
        top1_agreement: share of tokens where both have the same most likely one.
    """

    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    kl_max: float
    top1_agreement: Estimate


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of one text.

    Attributes:
        tokens, nbytes: what was scored; bytes are those of the text in UTF-8.
        perplexity: exp of the mean nll of a token. Only comparable between models of one tokenizer.
        byte_perplexity: exp of the nll of a byte; comparable between tokenizers.
        bits_per_byte: the same as a length.
    """

    tokens: int
    nbytes: int
    perplexity: Estimate
    byte_perplexity: Estimate
    bits_per_byte: Estimate
    comparison: Comparison | None


def summarise(scores: ScoredTokens, seed: int = 0) -> Quality:
    """Figures and intervals of scored tokens.

    Raises:
        UsageError: they hold no whole character of the text.
    """
    tokens, nbytes = len(scores.nll), int(scores.nbytes.sum())
    if nbytes == 0:
        raise UsageError("the scored tokens hold no whole character of the text", "give a longer text")
    blocks = _Blocks(tokens, seed)
    per_byte = blocks.ratio(scores.nll, scores.nbytes)
    return Quality(
        tokens=tokens,
        nbytes=nbytes,
        perplexity=_map(np.exp, blocks.mean(scores.nll)),
        byte_perplexity=_map(np.exp, per_byte),
        bits_per_byte=_map(lambda nats: nats / np.log(2), per_byte),
        comparison=_compare(scores, blocks),
    )


def _compare(scores: ScoredTokens, blocks: _Blocks) -> Comparison | None:
    if scores.reference_nll is None or scores.kl is None or scores.agrees is None:
        return None
    return Comparison(
        reference_perplexity=_map(np.exp, blocks.mean(scores.reference_nll)),
        perplexity_ratio=_map(np.exp, blocks.mean(scores.nll - scores.reference_nll)),
        kl_mean=blocks.mean(scores.kl),
        kl_median=blocks.quantile(scores.kl, 0.5),
        kl_p99=blocks.quantile(scores.kl, 0.99),
        kl_max=float(scores.kl.max()),
        top1_agreement=blocks.mean(scores.agrees.astype(np.float64)),
    )


def token_nll(logits: Logits, targets: NDArray[np.int64]) -> Floats:
    """-log probability (nats) of the tokens that came.

    Args:
        logits: [n, vocabulary]; targets: token ids [n].
    """
    log_p = (
        np.take_along_axis(log_softmax(logits[rows]), targets[rows, None], axis=-1)[:, 0]
        for rows in _pieces(len(targets))
    )
    return -np.concatenate(list(log_p))


def kl_divergences(reference: Floats, logits: Logits) -> Floats:
    """KL(reference || logits) in nats, for each row.

    Args:
        reference: log-probabilities [n, vocabulary]; logits: [n, vocabulary].
    """
    pieces = ((reference[rows], log_softmax(logits[rows])) for rows in _pieces(len(logits)))
    kl: Floats = np.concatenate([np.sum(np.exp(p) * (p - q), axis=-1) for p, q in pieces])
    return np.maximum(kl, 0.0)  # float rounding can take it below


def compare_logits(reference: Logits, logits: Logits) -> tuple[float, float]:
    """Distance of two sets of predictions.

    Args:
        reference, logits: float32 [n, vocabulary].

    Returns:
        mean Kullback-Leibler divergence KL(reference || logits) in nats, and the share of positions with the same
        most likely token.
    """
    kl = np.concatenate([kl_divergences(log_softmax(reference[rows]), logits[rows]) for rows in _pieces(len(logits))])
    agreement = float(np.mean(reference.argmax(axis=-1) == logits.argmax(axis=-1)))
    return float(kl.mean()), agreement


def _pieces(rows: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, rows, _ROWS)]


class _Blocks:
    """Blocks of consecutive tokens, and which of them each resample has; the same for every figure."""

    def __init__(self, tokens: int, seed: int) -> None:
        count = max(tokens // _BLOCK_TOKENS, 1)  # what is left over goes to the last
        self._starts = np.arange(count) * _BLOCK_TOKENS
        self._members = np.split(np.arange(tokens), self._starts[1:])
        self._drawn: NDArray[np.int64] | None = None
        if count >= _FEWEST_BLOCKS:
            self._drawn = np.random.default_rng(seed).integers(count, size=(_RESAMPLES, count))

    def mean(self, values: Floats) -> Estimate:
        """Mean of `values` [tokens]."""
        return self.ratio(values, np.ones(len(values), np.int64))

    def ratio(self, values: Floats, sizes: NDArray[np.int64]) -> Estimate:
        """Sum of `values` by sum of `sizes`, both [tokens]."""
        above, below = np.add.reduceat(values, self._starts), np.add.reduceat(sizes, self._starts)
        value = float(values.sum() / sizes.sum())
        if self._drawn is None:
            return Estimate(value, None, None)
        return _with_interval(value, above[self._drawn].sum(axis=1) / below[self._drawn].sum(axis=1))

    def quantile(self, values: Floats, share: float) -> Estimate:
        """A quantile of `values` [tokens]."""
        value = float(np.quantile(values, share))
        if self._drawn is None:
            return Estimate(value, None, None)
        resamples = (values[np.concatenate([self._members[block] for block in drawn])] for drawn in self._drawn)
        return _with_interval(value, np.array([np.quantile(resample, share) for resample in resamples]))


def _with_interval(value: float, resampled: Floats) -> Estimate:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _map(function: Callable[[float], float], estimate: Estimate) -> Estimate:
    """An increasing function of a figure, and of the ends of its interval."""
    low, high = (None if end is None else float(function(end)) for end in (estimate.low, estimate.high))
    return Estimate(float(function(estimate.value)), low, high)
