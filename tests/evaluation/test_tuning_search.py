"""Paired tests on made-up seconds: noise, drift, pairs that do not agree."""

import numpy as np
import pytest

from normistral.tuning import paired_gain

BEST, CHALLENGER = {"groups": "0"}, {"groups": "64"}


def made_up(factor, noise=0.0, drift=0.0, seed=0):
    """Seconds: 10, times a factor for the challenger, times noise and a drift."""
    random, calls = np.random.default_rng(seed), []

    def measure(settings):
        calls.append(settings)
        seconds = 10.0 * (factor if settings == CHALLENGER else 1.0) * (1 + drift * len(calls))
        return seconds * float(np.exp(random.normal(0, noise)))

    return measure


def of_pairs(*challenger):
    """Seconds of the challenger in each pair, beside 10 of the best; fails when more are asked for."""
    seconds = {"0": iter([10.0] * len(challenger)), "64": iter(map(float, challenger))}
    return lambda settings: next(seconds[settings["groups"]])


@pytest.mark.parametrize(
    ("seconds", "ratio"),
    [
        ((9, 9, 9, 9, 9), 0.9),
        ((9.9, 9.9, 9.9, 9.9, 9.9), None),  # faster, but by less than is worth it
        ((9, 9, 9, 9, 10, 9, 9, 9), 0.9),  # one pair was lost: three more
        ((9, 9, 9, 9, 10, 9, 9, 10), None),
        ((11, 9, 9, 9, 9, 9, 9, 9), 0.9),
        ((11, 11), None),  # it ends where it cannot be won any more
        ((5, 5, 11, 11), None),
    ],
)
def test_it_is_won_when_the_pairs_agree(seconds, ratio):
    measure = of_pairs(*seconds)
    assert paired_gain(BEST, CHALLENGER, measure) == ratio
    with pytest.raises(StopIteration):
        measure(CHALLENGER)


def test_a_drift_helps_neither():
    """Each measurement 3 % slower than the one before: who is second in every pair would lose 1 of 5 and more."""
    assert paired_gain(BEST, CHALLENGER, made_up(1.0, drift=0.03)) is None
    assert paired_gain(BEST, CHALLENGER, made_up(0.9, drift=0.03)) is not None


def test_equal_settings_seldom_win():
    """1 in 20 by the pairs alone (0.0508) and fewer with the 2 %: of 400 tests more than 34 have a chance of 0.2 %."""
    measure = made_up(1.0, noise=0.05)
    assert sum(paired_gain(BEST, CHALLENGER, measure) is not None for _ in range(400)) <= 34


def test_what_is_a_tenth_faster_mostly_wins_under_noise():
    measure = made_up(0.9, noise=0.03)
    assert sum(paired_gain(BEST, CHALLENGER, measure) is not None for _ in range(100)) >= 90
