"""Penalties, bias, typical_p, DRY and XTC: against plain references on four tokens, and by statistics."""

import itertools
import math

import numpy as np
import pytest

from normistral.runtime.options import GenerationConfig
from normistral.runtime.sampling import (
    Sampler,
    dry_penalties,
    exclude_top_choices,
    locally_typical,
    log_softmax,
    penalise_counts,
)

LOGITS = np.array([1.0, 3.0, 2.0, -1.0], np.float32)
NONE = np.array([], np.int64)
DRAWS = 20_000
# The standard error of a frequency of so many draws is below 0.0036. A deviation of 5 of them has a probability below
# 10^-6, so one of the four frequencies deviates in less than one run in 10^5. (Seeds are fixed.)
TOLERANCE = 0.018


def frequencies(logits=LOGITS, *, observed=(), prompt=(), **options) -> np.ndarray:
    sampler = Sampler(GenerationConfig(**{"temperature": 1.0, "seed": 3} | options), prompt)
    drawn = []
    for _ in range(DRAWS):
        sampler._counts = None if sampler._counts is None else {}
        sampler._tokens = None if sampler._tokens is None else list(prompt)
        for token_id in observed:
            sampler.observe(token_id)
        drawn.append(sampler.sample(logits))
    return np.bincount(drawn, minlength=len(logits)) / DRAWS


def softmax(logits) -> np.ndarray:
    return np.exp(log_softmax(np.asarray(logits, np.float32)))


def test_counts_are_penalised_as_openai_writes_it() -> None:
    found = penalise_counts(LOGITS, {1: 2, 3: 1}, 0.5, 0.25)
    assert found.tolist() == [1.0, 3.0 - 0.5 - 2 * 0.25, 2.0, -1.0 - 0.5 - 0.25]
    assert LOGITS.tolist() == [1.0, 3.0, 2.0, -1.0]  # not in place


def test_penalties_look_at_the_answer_and_not_at_the_prompt() -> None:
    expected = softmax([1.0, 3.0 - 1.0 - 2 * 0.5, 2.0, -1.0])
    found = frequencies(observed=(1, 1), prompt=(0, 2, 2), presence_penalty=1.0, frequency_penalty=0.5)
    assert np.abs(found - expected).max() < TOLERANCE


def test_negative_penalties_ask_for_repetition() -> None:
    sampler = Sampler(GenerationConfig(presence_penalty=-2.0), [])
    sampler.observe(2)
    assert sampler.sample(LOGITS) == 2


def test_a_bias_is_added_and_may_decide_alone() -> None:
    found = frequencies(logit_bias=((0, 2.0), (1, -1.0)))
    assert np.abs(found - softmax([3.0, 2.0, 2.0, -1.0])).max() < TOLERANCE
    assert Sampler(GenerationConfig(logit_bias=((3, 100.0),)), []).sample(LOGITS) == 3
    assert Sampler(GenerationConfig(logit_bias=((1, -100.0),)), []).sample(LOGITS) == 2


def test_a_bias_does_not_allow_what_a_structure_forbids() -> None:
    allowed = np.array([True, True, True, False])
    assert Sampler(GenerationConfig(logit_bias=((3, 100.0),)), []).sample(LOGITS, allowed) == 1


def plain_dry(tokens, breakers, multiplier, base, allowed) -> dict[int, float]:
    """By its definition: for every earlier place, count backwards."""
    longest: dict[int, int] = {}
    for place in range(len(tokens) - 1):
        length = 0
        while (
            length <= place
            and tokens[place - length] == tokens[len(tokens) - 1 - length]
            and tokens[place - length] not in breakers
        ):
            length += 1
        if length >= allowed:
            longest[tokens[place + 1]] = max(length, longest.get(tokens[place + 1], 0))
    return {token: multiplier * base ** (length - allowed) for token, length in longest.items()}


def test_dry_is_its_definition_on_every_short_text_of_four_tokens() -> None:
    for length in range(7):
        for tokens in itertools.product(range(4) if length < 6 else range(3), repeat=length):
            for breakers, allowed in (((), 1), ((), 2), ((2,), 1), ((0, 2), 2)):
                found = dry_penalties(np.array(tokens, np.int64), np.array(breakers, np.int64), 0.8, 1.75, allowed)
                assert found == pytest.approx(plain_dry(tokens, breakers, 0.8, 1.75, allowed)), (tokens, breakers)


def test_dry_by_hand() -> None:
    # "0 1 2 0 1" goes on with 2 after the two tokens "0 1".
    assert dry_penalties(np.array([0, 1, 2, 0, 1]), NONE, 0.8, 1.75, 2) == {2: 0.8}
    assert dry_penalties(np.array([3, 0, 1, 2, 3, 0, 1]), NONE, 0.8, 1.75, 2) == {2: pytest.approx(0.8 * 1.75)}
    assert dry_penalties(np.array([0, 1, 2, 0, 1]), np.array([1]), 0.8, 1.75, 1) == {}
    long = dry_penalties(np.zeros(5000, np.int64), NONE, 100.0, 100.0, 1)
    assert math.isfinite(long[0])


def test_dry_looks_at_prompt_and_answer_within_its_window() -> None:
    options = {"dry_multiplier": 5.0, "dry_allowed_length": 2}
    assert Sampler(GenerationConfig(**options), [0, 2, 1, 0, 2]).sample(LOGITS) == 2  # not 1
    for window in (0, 3):
        config = GenerationConfig(**options, dry_penalty_last_n=window)
        assert Sampler(config, [0, 2, 1, 0, 2]).sample(LOGITS) == 1
    sampler = Sampler(GenerationConfig(**options), [0, 2, 1])
    sampler.observe(0)
    sampler.observe(2)
    assert sampler.sample(LOGITS) == 2
    assert Sampler(GenerationConfig(**options, dry_sequence_breakers=(2,)), [0, 2, 1, 0, 2]).sample(LOGITS) == 1


def plain_typical(probabilities, mass) -> set[int]:
    entropy = -sum(p * math.log(p) for p in probabilities)
    order = sorted(range(len(probabilities)), key=lambda i: abs(-math.log(probabilities[i]) - entropy))
    kept, reached = set(), 0.0
    for token in order:
        kept.add(token)
        reached += probabilities[token]
        if reached >= mass:
            break
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_typical_is_its_definition_on_four_tokens(seed) -> None:
    probabilities = np.sort(np.random.default_rng(seed).dirichlet(np.ones(4)))[::-1]
    for mass in (0.05, 0.3, 0.6, 0.95):
        assert set(np.flatnonzero(locally_typical(probabilities, mass))) == plain_typical(probabilities, mass)


def test_typical_agrees_with_transformers() -> None:
    import torch
    from transformers.generation.logits_process import TypicalLogitsWarper

    logits = np.random.default_rng(1).normal(0, 3, 200).astype(np.float32)
    expected = TypicalLogitsWarper(0.4)(None, torch.tensor(logits)[None])[0].numpy()
    probabilities = softmax(logits)
    order = np.argsort(-probabilities)
    kept = order[locally_typical(probabilities[order].astype(np.float64), 0.4)]
    assert set(kept) == set(np.flatnonzero(np.isfinite(expected)))


def test_typical_draws_the_rest_in_proportion() -> None:
    kept = plain_typical(list(softmax(LOGITS)), 0.3)
    expected = np.array([p if i in kept else 0.0 for i, p in enumerate(softmax(LOGITS))])
    assert np.abs(frequencies(typical_p=0.3) - expected / expected.sum()).max() < TOLERANCE


@pytest.mark.parametrize(
    ("probabilities", "threshold", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.1, [False, False, True, True]),
        ([0.5, 0.3, 0.15, 0.05], 0.2, [False, True, True, True]),
        ([0.5, 0.3, 0.15, 0.05], 0.4, [True, True, True, True]),  # only one is good
        ([0.5, 0.3, 0.15, 0.05], 0.0, [False, False, False, True]),
    ],
)
def test_xtc_leaves_the_least_likely_of_the_good_ones(probabilities, threshold, kept) -> None:
    assert exclude_top_choices(np.array(probabilities), threshold).tolist() == kept


def test_xtc_acts_as_often_as_it_should() -> None:
    probabilities = softmax(LOGITS)  # 0.09, 0.66, 0.24, 0.01
    without = np.array([p if i != 1 else 0.0 for i, p in enumerate(probabilities)])
    expected = 0.7 * probabilities + 0.3 * without / without.sum()
    assert np.abs(frequencies(xtc_probability=0.3, xtc_threshold=0.2) - expected).max() < TOLERANCE


def test_filters_go_before_xtc() -> None:
    """With top_k 1 there is one good token, and nothing to leave out."""
    assert frequencies(top_k=1, xtc_probability=1.0, xtc_threshold=0.0)[1] == 1.0


def test_greedy_is_not_touched_by_what_only_leaves_out_tokens() -> None:
    config = GenerationConfig(temperature=0.0, typical_p=0.1, xtc_probability=1.0, xtc_threshold=0.0)
    assert Sampler(config, []).sample(LOGITS) == 1
