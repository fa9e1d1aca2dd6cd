"""Races and duels on made-up seconds: noise, drift, refusals, the end of the time."""

import itertools

import numpy as np
import pytest

from normistral.tuning.search import Duel, Found, OutOfTimeError, UnusableError, duel, race, search
from normistral.tuning.space import Stage

START = {"threads": "2", "groups": "0"}


class MadeUp:
    """Seconds of settings: a base, a factor for each KEY=VALUE, noise and a drift; counts what was measured."""

    def __init__(self, factors, noise=0.0, drift=0.0, seed=0, refused=(), budget=10_000):
        self.factors, self.noise, self.drift = factors, noise, drift
        self.refused, self.budget = refused, budget
        self.measured = []
        self._random = np.random.default_rng(seed)

    def __call__(self, settings):
        if len(self.measured) >= self.budget:
            raise OutOfTimeError
        pairs = {f"{name}={value}" for name, value in settings.items()}
        if pairs & set(self.refused):
            raise UnusableError("the engine does not take it")
        self.measured.append(dict(settings))
        seconds = 10.0
        for pair in pairs:
            seconds *= self.factors.get(pair, 1.0)
        slower_and_slower = 1 + self.drift * len(self.measured)
        return seconds * slower_and_slower * float(np.exp(self._random.normal(0, self.noise)))


def good(settings):
    return True


def pairs(*seconds):
    return Duel(tuple(10.0 for _ in seconds), tuple(map(float, seconds)))


@pytest.mark.parametrize(
    ("fought", "won"),
    [
        (pairs(9, 9, 9, 9, 9), True),
        (pairs(9.9, 9.9, 9.9, 9.9, 9.9), False),  # faster, but by less than is worth it
        (pairs(9, 9, 9, 9, 10), False),
        (pairs(5, 5, 5, 5, 11), False),
        (pairs(9, 9, 9, 9, 11, 9, 9, 9), True),
        (pairs(9, 9, 9, 9, 11, 9, 9, 11), False),
        (pairs(5, 5, 5), False),  # too few to tell
        (pairs(11, 11, 11, 11, 11), False),
    ],
)
def test_a_duel_is_won_when_the_pairs_agree(fought, won):
    assert fought.is_won == won


def test_a_drift_helps_neither():
    """Each measurement 3 % slower than the one before: who is second in every pair would lose 1 of 5 and more."""
    fought = duel(START, {**START, "groups": "64"}, MadeUp({}, drift=0.03))
    assert not fought.is_won
    assert 2 <= fought.lost <= 3


def test_a_pair_that_was_lost_is_looked_at_again():
    seconds = iter([10, 9, 9, 10, 10, 9, 9, 10, 10, 12, 9, 10, 10, 9, 9, 10])
    fought = duel(START, {}, lambda settings: next(seconds))
    assert len(fought.champion) == 8
    assert (fought.lost, fought.is_won) == (1, True)
    assert next(seconds, None) is None


def test_equal_settings_seldom_win():
    """1 in 20 by the pairs alone (0.0508) and fewer with the 2 %: of 400 duels more than 34 have a chance of 0.2 %."""
    measure = MadeUp({}, noise=0.05)
    assert sum(duel(START, {"groups": "64"}, measure).is_won for _ in range(400)) <= 34


def test_what_is_a_tenth_faster_mostly_wins_under_noise():
    measure = MadeUp({"groups=64": 0.9}, noise=0.03)
    assert sum(duel(START, {**START, "groups": "64"}, measure).is_won for _ in range(100)) >= 90


def test_a_race_orders_by_speed_and_leaves_out_what_is_slower():
    measure = MadeUp({"groups=32": 0.95, "groups=64": 0.8, "groups=128": 0.9, "groups=256": 1.1})
    variants = [{"groups": size} for size in ("32", "256", "64", "128")]
    assert race(START, variants, measure) == [{"groups": "64"}, {"groups": "128"}, {"groups": "32"}]


def test_a_race_wastes_little_on_losers():
    measure = MadeUp({"groups=64": 0.8, "groups=1": 3.0})
    race(START, [{"groups": size} for size in ("1", "2", "3", "4", "64")], measure)
    counts = {size: sum(done["groups"] == size for done in measure.measured) for size in ("1", "2", "64", "0")}
    assert counts["1"] == 1  # hopeless after one
    assert counts["64"] == counts["0"] == 3  # five, two, one


def test_what_the_engine_refuses_is_said_and_left_out():
    said = []
    measure = MadeUp({"groups=64": 0.8}, refused=["groups=7"])
    assert race(START, [{"groups": "7"}, {"groups": "64"}], measure, said.append) == [{"groups": "64"}]
    assert said == ["groups=7: the engine does not take it"]
    assert race(START, [{"groups": "7"}], measure) == []


STAGES = [
    Stage("arithmetic", ({"groups": "0"}, {"groups": "32"}, {"groups": "64"})),
    Stage("threads", ({"threads": "1"}, {"threads": "4"})),
]
FACTORS = {"groups=32": 0.9, "groups=64": 0.8, "threads=1": 1.6, "threads=4": 0.9}


@pytest.mark.parametrize("seed", range(5))
def test_a_search_finds_the_best_of_every_stage(seed):
    found, measure = Found(START), MadeUp(FACTORS, noise=0.01, drift=0.002, seed=seed)
    search(found, STAGES, measure, good)
    assert found.best == {"threads": "4", "groups": "64"}
    assert (found.wins, found.complete) == (["arithmetic", "threads"], True)
    assert found.ratio == pytest.approx(0.72, rel=0.05)


def test_nothing_is_changed_where_nothing_is_faster():
    found = Found(START)
    search(found, STAGES, MadeUp({"threads=1": 1.4}, noise=0.002), good)
    assert (found.best, found.wins, found.ratio, found.complete) == (START, [], 1.0, True)


def test_what_is_in_force_already_is_not_measured_against_itself():
    measure = MadeUp({})
    search(Found(START), [Stage("arithmetic", ({"groups": "0"},))], measure, good)
    assert measure.measured == []


def test_what_costs_too_much_gives_way_to_the_next():
    found = Found(START)
    search(found, STAGES, MadeUp(FACTORS), lambda settings: settings["groups"] != "64")
    assert found.best == {"threads": "4", "groups": "32"}


def test_nothing_that_costs_too_much_is_ever_best():
    found = Found(START)
    search(found, STAGES, MadeUp(FACTORS), lambda settings: settings == START)
    assert (found.best, found.wins) == (START, [])


@pytest.mark.parametrize("budget", range(0, 40, 3))
def test_when_the_time_is_up_only_what_won_a_duel_stands(budget):
    found = Found(START)
    measure = MadeUp(FACTORS, budget=budget)
    try:
        search(found, STAGES, measure, good)
    except OutOfTimeError:
        assert not found.complete
    measured = [settings for settings, again in itertools.groupby(measure.measured)]
    if found.best != START:
        assert sum(settings == found.best for settings in measure.measured) >= 5
    else:
        assert found.ratio == 1.0
    assert measured or budget == 0


def test_an_interrupt_leaves_what_was_won():
    found, measure = Found(START), MadeUp(FACTORS)

    def interrupted(settings):
        if found.wins:
            raise KeyboardInterrupt
        return measure(settings)

    with pytest.raises(KeyboardInterrupt):
        search(found, STAGES, interrupted, good)
    assert found.best == {"threads": "2", "groups": "64"}
    assert not found.complete
