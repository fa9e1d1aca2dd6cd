"""How many tokens are drafted, on made-up costs and made-up luck."""

import random

import pytest

from normistral.runtime.speculative.draft_length import (
    MOST_DRAFTED,
    Acceptance,
    StepCosts,
    choose_length,
    cost_curve,
)

# Milliseconds of a step of n tokens on half of a 7B, measured: OpenVINO tuned, onnxruntime.
OPENVINO = {1: 108.0, 2: 116.0, 3: 124.0, 4: 133.0, 6: 156.0, 8: 178.0, 16: 275.0}
ONNXRUNTIME = {1: 121.0, 2: 137.0, 3: 187.0, 4: 211.0, 6: 260.0, 8: 312.0, 16: 536.0}


def expected_speed(rates, costs, drafted):
    """Tokens a second, from the definition."""
    tokens, reached = 1.0, 1.0
    for rate in rates[:drafted]:
        reached *= rate
        tokens += reached
    return tokens / costs[drafted]


@pytest.mark.parametrize("measured", [OPENVINO, ONNXRUNTIME])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 0.6, 0.8, 0.95, 1.0])
def test_the_length_is_the_fastest_there_is(measured, rate):
    rates, costs = [rate] * MOST_DRAFTED, cost_curve(measured)
    chosen = choose_length(rates, costs)
    speeds = {drafted: expected_speed(rates, costs, drafted) for drafted in (0, 1, 2, 3, 5, 7, 11, 15)}
    best = max(speeds, key=speeds.get)
    assert chosen == (best if speeds[best] > 1.05 * speeds[0] else 0)


def test_a_good_draft_is_long_and_a_bad_one_is_none():
    costs = cost_curve(OPENVINO)
    chosen = [choose_length([rate] * MOST_DRAFTED, costs) for rate in (0.02, 0.3, 0.7, 0.9, 1.0)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (0, MOST_DRAFTED)


def test_a_step_whose_cost_is_all_arithmetic_is_never_drafted():
    assert choose_length([0.99] * MOST_DRAFTED, cost_curve({1: 1.0, 16: 16.0})) == 0


def test_a_dear_rejection_needs_surer_drafts():
    costs = cost_curve(OPENVINO)
    assert choose_length([0.6] * 3, costs) > 0
    assert choose_length([0.6] * 3, costs, rejection_s=300.0) == 0
    assert choose_length([1.0] * 3, costs, rejection_s=300.0) == 3  # never rejected


def test_no_more_is_drafted_than_was_proposed():
    assert choose_length([1.0] * 4, cost_curve(OPENVINO)) == 3  # a step of 5 tokens is not among those taken
    assert choose_length([], cost_curve(OPENVINO)) == 0


def test_a_cost_curve_goes_through_its_points_and_never_falls():
    curve = cost_curve(OPENVINO)
    assert [curve[size - 1] for size in OPENVINO] == pytest.approx(list(OPENVINO.values()))
    assert len(curve) == MOST_DRAFTED + 1
    assert curve == sorted(curve)
    noisy = cost_curve({1: 100.0, 2: 140.0, 4: 120.0, 8: 180.0})
    assert noisy[:4] == pytest.approx([100.0, 120.0, 120.0, 120.0])
    assert noisy == sorted(noisy)


def test_what_was_not_measured_is_taken_to_be_cheap_and_then_to_go_on_as_it_began():
    assert cost_curve({1: 100.0})[:3] == pytest.approx([100.0, 110.0, 120.0])
    assert cost_curve({1: 100.0, 2: 150.0})[:4] == pytest.approx([100.0, 150.0, 200.0, 250.0])


def test_the_first_step_of_a_size_is_not_learned():
    costs = StepCosts()
    costs.observe(1, 100.0)
    assert costs.choose([1.0] * 15) == 0  # nothing is known yet
    for _ in range(3):
        costs.observe(1, 1.0)
    costs.observe(16, 500.0)  # compiles
    assert costs.choose([1.0] * 15) == 15
    for _ in range(3):
        costs.observe(16, 3.0)
    assert costs.choose([1.0] * 15) == 15
    for _ in range(3):
        costs.observe(16, 50.0)
    assert costs.choose([1.0] * 15) < 15


def test_dear_steps_are_tried_again_for_at_most_a_hundredth_of_the_time():
    costs, plain_s, dear_s = StepCosts(), 0.1, 0.9
    for size in (1, 2, 3, 4, 6, 8, 12, 16):
        for _ in range(6):
            costs.observe(size, plain_s if size == 1 else dear_s)
    spent = probes = 0.0
    for _ in range(20_000):
        size = 1 + costs.choose([0.9] * MOST_DRAFTED)
        seconds = plain_s if size == 1 else dear_s
        probes += seconds - plain_s
        spent += seconds
        costs.observe(size, seconds)
    assert 0 < probes <= 0.011 * spent


def test_drafting_comes_back_when_steps_have_become_cheap():
    costs = StepCosts()
    for size in (1, 2, 3, 4, 6, 8, 12, 16):
        for _ in range(6):
            costs.observe(size, 0.1 if size == 1 else 0.9)
    drafted = 0
    for _ in range(5_000):
        size = 1 + costs.choose([0.9] * MOST_DRAFTED)
        costs.observe(size, 0.1 + 0.005 * size)  # the machine is ours again
        drafted += size > 1
    assert drafted > 2_000


def test_hopeless_drafts_are_never_probed():
    costs = StepCosts()
    for _ in range(1000):
        costs.observe(1, 0.1)
        assert costs.choose([0.02] * MOST_DRAFTED) == 0


def test_each_depth_has_the_draft_length_that_pays_there():
    """Answers after short and after long contexts take turns on the same weights: neither spoils the other's pacing.
    A step of n tokens costs 40 + 12 (n - 1) ms, and 10 µs for each token of context.
    """
    rates = [0.7] * MOST_DRAFTED
    curves = {
        context: [0.040 + 0.012 * further + 1e-5 * context for further in range(MOST_DRAFTED + 1)]
        for context in (300, 8000)
    }
    best = {context: choose_length(rates, curve) for context, curve in curves.items()}
    assert best == {300: 2, 8000: 5}
    costs, tokens, seconds = StepCosts(), dict.fromkeys(curves, 0.0), dict.fromkeys(curves, 0.0)
    for _ in range(20):
        for context, curve in curves.items():
            for _ in range(60):
                drafted = costs.choose(rates, context)
                costs.observe(1 + drafted, curve[drafted], context=context)
                tokens[context] += expected_speed(rates, curve, drafted) * curve[drafted]
                seconds[context] += curve[drafted]
    for context, curve in curves.items():
        assert tokens[context] / seconds[context] > 0.98 * expected_speed(rates, curve, best[context])


def test_a_new_depth_is_paced_from_the_measurements_of_others():
    costs = StepCosts()
    for size, seconds in {1: 0.040, 3: 0.064, 6: 0.100}.items():
        for _ in range(4):
            costs.observe(size, seconds, context=100)
    for _ in range(4):
        costs.observe(1, 0.120, context=8000)
    rates = [0.7] * MOST_DRAFTED
    assert costs.choose(rates, 8000) == choose_length(rates, cost_curve({1: 0.120, 3: 0.144, 6: 0.180})) == 5
    assert costs.choose(rates, 100) == 2  # as before


def test_rates_are_those_of_each_position_given_the_ones_before():
    acceptance = Acceptance()
    luck = random.Random(0)
    for _ in range(400):
        accepted = 0
        while accepted < 4 and luck.random() < (0.9, 0.5, 0.9, 0.2)[accepted]:
            accepted += 1
        acceptance.observe("lookup 3", accepted, 4)
    # Ten observations count, so a rate of 0.5 strays by 0.16 one time in three.
    assert acceptance.rates("lookup 3", 4) == pytest.approx([0.9, 0.5, 0.9, 0.2], abs=0.3)


def test_places_behind_a_wrong_token_say_nothing():
    acceptance = Acceptance()
    for _ in range(50):
        acceptance.observe("lookup 3", 1, 4)
    first, second, third, fourth = acceptance.rates("lookup 3", 4)
    assert first > 0.85
    assert second < 0.15
    assert second == third == fourth  # unseen places are as good as the one before


def test_a_source_has_rates_of_its_own_and_forgets():
    acceptance = Acceptance()
    prior = acceptance.rates("lookup 2", 1)
    for _ in range(20):
        acceptance.observe("lookup 5", 0, 1)
    assert acceptance.rates("lookup 2", 1) == prior
    assert acceptance.rates("lookup 5", 1)[0] < 0.15
    for _ in range(20):
        acceptance.observe("lookup 5", 1, 1)
    assert acceptance.rates("lookup 5", 1)[0] > 0.8
    assert acceptance.rates("lookup 5", 1)[0] > prior[0]


def test_longer_matches_are_trusted_more_before_anything_is_known():
    rates = [Acceptance().rates(f"lookup {length}", 1)[0] for length in (2, 3, 4, 5)]
    assert rates == sorted(rates)
    assert Acceptance().rates("table 3", 1)[0] > 0
