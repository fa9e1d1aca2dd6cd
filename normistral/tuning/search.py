"""Which of some settings is fastest, on a machine that is never quiet: races, duels, and a search of them.

It knows no engine: seconds come from a function. Nothing is compared across time. In a race every candidate is
measured in the same rounds as the best so far, and counts by its ratio to it in that round; the slower half drops out
after each (successive halving; Jamieson and Talwalkar, AISTATS 2016). Who is left meets the best so far in a duel of
pairs, and wins only if the pairs agree, 5 of 5 or 7 of 8, and their median is at least 2 % faster. By the pairs alone,
settings that are equally fast would win in 1 of 20 duels: 1/32 + 5/32 · 1/8.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from normistral.tuning.space import Settings, Stage

PAIRS, MORE_PAIRS = 5, 3  # the latter only after exactly one lost pair
LEAST_GAIN = 0.02
_HOPELESS = 1.25  # times as slow in one round: not measured again

Measure = Callable[[Settings], float]
"""Seconds of the work. Raises `UnusableError` for settings that the engine refuses, `OutOfTimeError` in the end."""


class UnusableError(Exception):
    """These settings cannot be measured; its text says why."""


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Pairs of measurements: seconds of the champion and of the challenger, taken in turn."""

    champion: tuple[float, ...]
    challenger: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The challenger's seconds as a multiple of the champion's: median of the pairs."""
        return statistics.median(b / a for a, b in zip(self.champion, self.challenger, strict=True))

    @property
    def lost(self) -> int:
        """Pairs in which the challenger was not faster."""
        return sum(b >= a for a, b in zip(self.champion, self.challenger, strict=True))

    @property
    def is_won(self) -> bool:
        """Whether the challenger is faster by more than the noise."""
        pairs = len(self.champion)
        return pairs >= PAIRS and self.lost <= (pairs > PAIRS) and self.ratio <= 1 - LEAST_GAIN


@dataclass
class Found:
    """What a search has found so far; `best` only ever changes by a duel that was won."""

    best: dict[str, str]
    wins: list[str] = field(default_factory=list)  # stages that changed `best`
    ratio: float = 1.0  # seconds of `best` as a multiple of those at the beginning
    complete: bool = False


def search(
    found: Found,
    stages: Sequence[Stage],
    measure: Measure,
    is_good: Callable[[Settings], bool],
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Go through the stages and improve `found.best`; what was won stays won when this is interrupted.

    Args:
        is_good: whether settings keep the quality; may raise as `measure`.
        say: is told of what was tried and won.

    Raises:
        OutOfTimeError: from `measure`.
    """
    for stage in stages:
        challengers = [variant for variant in stage.variants if not variant.items() <= found.best.items()]
        for variant in race(found.best, challengers, measure, say):
            settings = {**found.best, **variant}
            if not is_good(settings):
                continue
            fought = duel(found.best, settings, measure)
            if fought.is_won:
                say(f"{stage.name}: {describe(variant)} is {1 / fought.ratio - 1:.0%} faster")
                found.best, found.ratio = settings, found.ratio * fought.ratio
                found.wins.append(stage.name)
            break  # the others were slower than this one
    found.complete = True


def race(
    champion: Settings,
    challengers: Sequence[dict[str, str]],
    measure: Measure,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, str]]:
    """Challengers (as changes to the champion) that were faster, fastest first; what the engine refuses is left out.

    A round measures the champion and all that are left; then the slower half drops out, until one is left.
    """
    ratios: dict[int, list[float]] = {i: [] for i in range(len(challengers))}
    alive = list(ratios)
    ranked: list[int] = []  # those that dropped out, slowest first
    while alive:
        before = measure(champion)
        for i in list(alive):
            try:
                ratios[i].append(measure({**champion, **challengers[i]}) / before)
            except UnusableError as exc:
                say(f"{describe(challengers[i])}: {exc}")
                alive.remove(i)
        alive = [i for i in alive if ratios[i][-1] < _HOPELESS]
        alive.sort(key=lambda i: statistics.median(ratios[i]))
        if len(alive) <= 1:
            break
        kept = len(alive) // 2
        ranked[:0] = alive[kept:]
        alive = alive[:kept]
    ordered = alive + ranked
    return [challengers[i] for i in ordered if statistics.median(ratios[i]) < 1.0]


def duel(champion: Settings, challenger: Settings, measure: Measure) -> Duel:
    """Pairs of measurements; who goes first changes, so that a drift helps neither."""
    pairs: list[tuple[float, float]] = []

    def fight(count: int) -> Duel:
        for _ in range(count):
            if len(pairs) % 2:
                second, first = measure(challenger), measure(champion)
            else:
                first, second = measure(champion), measure(challenger)
            pairs.append((first, second))
        return Duel(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))

    fought = fight(PAIRS)
    return fight(MORE_PAIRS) if fought.lost == 1 else fought


def describe(settings: Mapping[str, str]) -> str:
    """KEY=VALUE, KEY=VALUE."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
