"""Samplers on small arrays; the filters against transformers' own."""

import numpy as np
import pytest

from normistral.errors import EngineError
from normistral.runtime.options import GenerationConfig
from normistral.runtime.sampling import Sampler, log_softmax, most_likely, nucleus, penalise_repetition

LOGITS = np.array([1.0, 3.0, 2.0, -1.0], np.float32)


def draw_many(config: GenerationConfig, logits: np.ndarray, count: int) -> np.ndarray:
    sampler = Sampler(config, [])
    return np.bincount([sampler.sample(logits) for _ in range(count)], minlength=len(logits)) / count


def test_greedy_takes_the_most_likely_token_and_the_first_of_equals():
    assert Sampler(GenerationConfig(temperature=0.0), []).sample(LOGITS) == 1
    assert Sampler(GenerationConfig(temperature=0.0), []).sample(np.array([0.0, 5.0, 5.0], np.float32)) == 1


def test_same_seed_same_tokens_and_another_seed_others():
    logits = np.zeros(1000, np.float32)

    def tokens(seed):
        sampler = Sampler(GenerationConfig(temperature=1.0, seed=seed), [])
        return [sampler.sample(logits) for _ in range(20)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)


def test_frequencies_follow_the_softmax_at_the_temperature():
    # 20,000 draws: the standard error of each frequency is below 0.0036; a deviation of 5 of them happens by
    # chance in less than one run in 10^5. (The seed is fixed, so it does not happen now and then.)
    expected = np.exp(log_softmax(LOGITS / 0.7))
    found = draw_many(GenerationConfig(temperature=0.7, seed=1), LOGITS, 20_000)
    assert np.abs(found - expected).max() < 0.018


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {1}),  # the best token alone has 0.66
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),  # exp(2 - 3) = 0.37 of the best, exp(1 - 3) = 0.14
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.1}, {0, 1, 2}),
    ],
)
def test_filters_keep_what_they_should(options, allowed):
    found = draw_many(GenerationConfig(temperature=1.0, seed=0, **options), LOGITS, 3000)
    assert set(np.flatnonzero(found)) == allowed


@pytest.mark.parametrize("seed", range(5))
def test_filters_agree_with_transformers(seed):
    import torch
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(seed).normal(0, 3, 200).astype(np.float32)
    seen = {3, 50, 199}
    reference = torch.tensor(logits)[None]
    ids = torch.tensor([sorted(seen)])
    for process in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.6),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ):
        reference = process(ids, reference)
    expected = torch.softmax(reference[0].double(), -1).numpy()

    candidates, probabilities = most_likely(penalise_repetition(logits, seen, 1.3), 0.6, 40)
    keep = nucleus(probabilities, 0.9) & (probabilities >= 0.02 * probabilities[0])
    found = np.zeros(200)
    found[candidates[keep]] = probabilities[keep] / probabilities[keep].sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_repetition_penalty_reaches_prompt_and_answer():
    config = GenerationConfig(temperature=0.0, repetition_penalty=2.0)
    sampler = Sampler(config, prompt_ids=[1])
    assert [sampler.sample(LOGITS) for _ in range(3)] == [2, 1, 1]  # 3/2 < 2; then 2/2 < 3/2


def test_the_smallest_temperature_there_is_takes_the_most_likely_token():
    config = GenerationConfig(temperature=5e-324, top_p=5e-324, seed=0)
    assert Sampler(config, []).sample(np.array([0.0, 400.0, 3.0], np.float32)) == 1


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(EngineError, match="not finite"):
        Sampler(GenerationConfig(), []).sample(np.array([np.nan, 1.0], np.float32))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 50.0}, {"temperature": 50.0, "top_k": 3}, {"temperature": 1e-9}]
)
def test_only_what_is_allowed_is_drawn(options):
    allowed = np.array([True, False, False, True] + [False] * (len(LOGITS) - 4))
    sampler = Sampler(GenerationConfig(**options, seed=1, repetition_penalty=1.1), [0, 1])
    assert {sampler.sample(LOGITS, allowed) for _ in range(200)} <= {0, 3}
