"""The figures of an evaluation, against values worked out by hand."""

import numpy as np
import pytest

from normistral.errors import UsageError
from normistral.evaluation.metrics import ScoredTokens, compare_logits, kl_divergences, summarise, token_nll
from normistral.runtime.sampling import log_softmax

HALVES, QUARTERS = np.log([0.5, 0.5]), np.log([0.25, 0.75])
KL = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)  # KL(halves || quarters)


def logits(*rows):
    """Unnormalised: every row is shifted by another constant, which must not matter."""
    return np.array([row + 3.0 * i for i, row in enumerate(rows)], np.float32)


def scores(nll, nbytes=None, **more):
    nll = np.asarray(nll, np.float64)
    return ScoredTokens(nll, np.ones(len(nll), np.int64) if nbytes is None else np.asarray(nbytes), **more)


def test_the_nll_is_that_of_the_token_that_came():
    found = token_nll(logits(HALVES, QUARTERS, QUARTERS), np.array([0, 0, 1]))
    np.testing.assert_allclose(found, [np.log(2), np.log(4), np.log(4 / 3)], rtol=1e-6)


def test_kl_is_the_reference_against_the_artifact_and_not_the_other_way():
    found = kl_divergences(log_softmax(logits(HALVES, QUARTERS, HALVES)), logits(QUARTERS, QUARTERS, HALVES))
    np.testing.assert_allclose(found, [KL, 0.0, 0.0], atol=1e-6)
    backwards = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert kl_divergences(log_softmax(logits(QUARTERS)), logits(HALVES)) == pytest.approx(backwards, rel=1e-6)
    assert backwards != pytest.approx(KL, rel=0.05)


def test_rows_of_every_piece_are_there_and_in_order():
    """More rows than are in float64 at one time."""
    noise = np.random.default_rng(0)
    p, q = (noise.normal(0, 3, (150, 7)).astype(np.float32) for _ in range(2))
    targets = noise.integers(0, 7, 150)
    direct = np.exp(p.astype(np.float64))
    direct /= direct.sum(axis=1, keepdims=True)
    other = np.exp(q.astype(np.float64))
    other /= other.sum(axis=1, keepdims=True)
    kl = (direct * np.log(direct / other)).sum(axis=1)
    np.testing.assert_allclose(kl_divergences(log_softmax(p), q), kl, rtol=1e-10)
    np.testing.assert_allclose(token_nll(q, targets), -np.log(other[np.arange(150), targets]), rtol=1e-10)
    mean, agreement = compare_logits(p, q)
    assert mean == pytest.approx(kl.mean(), rel=1e-10)
    assert agreement == np.mean(direct.argmax(axis=1) == other.argmax(axis=1))


def test_a_uniform_model_has_the_vocabulary_for_perplexity():
    nll = token_nll(np.zeros((4, 320), np.float32), np.array([0, 5, 100, 319]))
    assert summarise(scores(nll)).perplexity.value == pytest.approx(320)


def test_perplexity_of_tokens_and_of_bytes():
    quality = summarise(scores(np.log([2.0, 8.0, 4.0]), [1, 4, 1]))
    assert (quality.tokens, quality.nbytes) == (3, 6)
    assert quality.perplexity.value == pytest.approx(4.0)  # 64 ** (1 / 3)
    assert quality.byte_perplexity.value == pytest.approx(2.0)  # 64 ** (1 / 6)
    assert quality.bits_per_byte.value == pytest.approx(1.0)
    assert quality.comparison is None


def test_the_comparison_has_mean_median_p99_and_largest():
    kl = np.arange(101) / 100
    nll = np.full(101, np.log(6.0))
    agrees = np.arange(101) < 25
    compared = summarise(scores(nll, reference_nll=np.full(101, np.log(4.0)), kl=kl, agrees=agrees)).comparison
    assert compared.kl_mean.value == pytest.approx(0.5)
    assert compared.kl_median.value == pytest.approx(0.5)
    assert compared.kl_p99.value == pytest.approx(0.99)
    assert compared.kl_max == 1.0
    assert compared.top1_agreement.value == pytest.approx(25 / 101)
    assert compared.reference_perplexity.value == pytest.approx(4.0)
    assert compared.perplexity_ratio.value == pytest.approx(1.5)


def test_independent_tokens_have_the_interval_of_the_normal_approximation():
    nll = np.random.default_rng(1).normal(3.0, 0.5, 64 * 400)
    perplexity = summarise(scores(nll)).perplexity
    half = 1.96 * nll.std() / np.sqrt(len(nll))
    assert np.log(perplexity.high) - nll.mean() == pytest.approx(half, rel=0.15)
    assert nll.mean() - np.log(perplexity.low) == pytest.approx(half, rel=0.15)


def test_tokens_that_err_together_widen_the_interval():
    """Runs of 32 equal values are worth a 32nd of the tokens: their standard error is √32 times as large."""
    kl = np.repeat(np.random.default_rng(2).exponential(0.1, 800), 32)
    agrees = np.ones(len(kl), bool)
    mean = summarise(scores(kl, reference_nll=kl, kl=kl, agrees=agrees)).comparison.kl_mean
    naive = 2 * 1.96 * kl.std() / np.sqrt(len(kl))
    assert (mean.high - mean.low) / naive == pytest.approx(np.sqrt(32), rel=0.15)


def test_a_paired_ratio_is_surer_than_either_perplexity():
    noise = np.random.default_rng(3)
    reference = noise.exponential(3.0, 64 * 40)
    nll = reference + noise.normal(0.1, 0.05, len(reference))
    zeros = np.zeros(len(nll))
    quality = summarise(scores(nll, reference_nll=reference, kl=zeros, agrees=zeros == 0))
    ratio = quality.comparison.perplexity_ratio
    assert ratio.low < np.exp(0.1) < ratio.high
    assert np.log(ratio.high / ratio.low) < 0.1 * np.log(quality.perplexity.high / quality.perplexity.low)


def test_quantiles_lie_in_their_intervals_and_the_seed_fixes_them():
    kl = np.random.default_rng(4).exponential(0.1, 64 * 20 + 17)
    given = scores(kl, reference_nll=kl, kl=kl, agrees=kl > 0)
    compared = summarise(given).comparison
    for estimate in (compared.kl_median, compared.kl_p99):
        assert estimate.low < estimate.value < estimate.high
    assert summarise(given).comparison == compared
    assert summarise(given, seed=1).comparison.kl_median != compared.kl_median


@pytest.mark.parametrize(("tokens", "known"), [(639, False), (640, True)])
def test_few_tokens_have_no_interval(tokens, known):
    estimate = summarise(scores(np.ones(tokens))).perplexity
    assert (estimate.low is not None, estimate.high is not None) == (known, known)


def test_tokens_without_a_whole_character_are_refused():
    with pytest.raises(UsageError, match="no whole character"):
        summarise(scores([1.0, 2.0], [0, 0]))
