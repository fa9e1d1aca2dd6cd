"""Draft length: the acceptance rates of drafts against the cost of a step of n tokens.

A step feeds the token just chosen and k drafted ones. If the i-th of these is right with the rate r_i, given that those
before it are, it yields 1 + r_1 + r_1 r_2 + ... tokens (Leviathan et al. 2023) in cost(1 + k) seconds, and when it ends
in a rejection, in the seconds that this takes too. The k with the most tokens a second is chosen; 0 is plain decoding.

The functions are pure; `StepCosts` lives as long as the loaded weights, `Acceptance` as long as a sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul

MOST_DRAFTED = 15
_STEP_SIZES = (2, 3, 4, 6, 8, 12, 16)  # tokens of a drafted step; engines compile kernels for each, so there are few
_GUESSED_SLOPE = 0.1  # of one token's cost, for each further one, until it was measured: 0.07 to 0.2 on two cores
_MEASUREMENTS = 5  # of each size at each depth, the latest; their median counts
_SHALLOW_BITS = 9  # contexts of fewer than 512 tokens cost about the same
_WORTH_IT = 1.05  # a draft must promise that much: its costs are only estimated
_PROBE_SHARE = 0.01  # of the time since the last one may go into a probe of a size that seems too dear
_FORGETTING = 0.9  # weight of what was seen, with each new observation
_PRIOR_WEIGHT = 1.5  # observations that the first guess of a rate counts for
_PRIOR_RATES = {"lookup 2": 0.2, "lookup 3": 0.4, "lookup 4": 0.5, "lookup 5": 0.7}
_OTHER_PRIOR_RATE = 0.3


def choose_length(rates: Sequence[float], costs: Sequence[float], rejection_s: float = 0.0) -> int:
    """Tokens to draft for the most tokens a second; 0 where no draft promises 5 % more than none.

    Args:
        rates: of each drafted token, how likely it is right if those before it are.
        costs: seconds of a step of 1, 2, ... tokens; at least one more than rates.
        rejection_s: what taking rejected tokens out of the cache costs.
    """
    reached = list(accumulate(rates, mul))  # how likely the first k are all right
    best, most = 0, _WORTH_IT / costs[0]
    for size in _STEP_SIZES:
        drafted = size - 1
        if drafted > len(rates):
            break
        tokens = 1.0 + sum(reached[:drafted])
        speed = tokens / (costs[drafted] + (1.0 - reached[drafted - 1]) * rejection_s)
        if speed > most:
            best, most = drafted, speed
    return best


def cost_curve(measured: Mapping[int, float], longest: int = MOST_DRAFTED + 1) -> list[float]:
    """Seconds of a step of 1 ... `longest` tokens, from measurements of some sizes.

    It never falls: what a larger step took is enough for a smaller one, whose measurement is older or was disturbed.

    Args:
        measured: size -> seconds; must hold 1.
    """
    sizes = sorted(measured)
    known = [(size, min(measured[larger] for larger in sizes[place:])) for place, size in enumerate(sizes)]
    slope = _GUESSED_SLOPE * known[0][1]
    last_size, last_cost = known[-1]
    if len(known) > 1:
        slope = max(slope, (last_cost - known[0][1]) / (last_size - 1))
    if last_size < longest:
        known.append((longest, last_cost + slope * (longest - last_size)))
    curve = [known[0][1]]
    for (size, cost), (next_size, next_cost) in pairwise(known):
        step = (next_cost - cost) / (next_size - size)
        curve += [cost + step * i for i in range(1, next_size - size + 1)]
    return curve[:longest]


class StepCosts:
    """Seconds of steps of n tokens on these weights and this machine, measured while generating.

    Contexts of up to 511 tokens have measurements in common, and so has each doubling from there. A size that was not
    measured at a depth is taken from the nearest one, plus the difference of the sizes that both have.
    """

    def __init__(self) -> None:
        # Replaced, never changed: several threads may learn here, and losing a measurement is no harm.
        self._seen: dict[int, dict[int, tuple[float, ...]]] = {}  # depth -> size -> seconds
        self._compiled: frozenset[int] = frozenset()  # sizes
        self._rejections: tuple[float, ...] = ()
        self._since_probe_s = 0.0

    def observe(self, size: int, seconds: float, rejection_s: float | None = None, context: int = 0) -> None:
        """Learn from a step of `size` tokens behind `context` others, and from the rejection before it if there was
        one.

        The first step of a size compiles kernels and is left out.
        """
        depth = _depth(context)
        if size in self._compiled:
            self._note(depth, size, (*self._seen.get(depth, {}).get(size, ()), seconds)[-_MEASUREMENTS:])
        self._compiled |= {size}
        if rejection_s is not None:
            self._rejections = (*self._rejections, rejection_s)[-_MEASUREMENTS:]
        self._since_probe_s += seconds

    def choose(self, rates: Sequence[float], context: int = 0) -> int:
        """Tokens to draft at these rates behind `context` tokens; 0 until plain steps have been measured.

        A size that seems too dear is tried again now and then, if the rates are good: it may have been measured while
        the machine was busy. The price of that is at most 1 % of the time.
        """
        depth = _depth(context)
        measured = self._measured(depth)
        if 1 not in measured:
            return 0
        curve = cost_curve(measured)
        rejection_s = statistics.median(self._rejections) if self._rejections else 0.0
        drafted = choose_length(rates, curve, rejection_s)
        if drafted == 0 and (hoped := choose_length(rates, cost_curve({1: measured[1]}))):
            price_s = curve[hoped] - curve[0] + rejection_s
            if price_s <= _PROBE_SHARE * self._since_probe_s:
                self._since_probe_s = 0.0
                self._note(depth, 1 + hoped, ())  # the probe measures it anew
                return hoped
        return drafted

    def _note(self, depth: int, size: int, seconds: tuple[float, ...]) -> None:
        self._seen = {**self._seen, depth: {**self._seen.get(depth, {}), size: seconds}}

    def _measured(self, depth: int) -> dict[int, float]:
        """Median seconds by size: those of this depth, then what nearer and farther ones say of the others."""
        found: dict[int, float] = {}
        for other in sorted(self._seen, key=lambda one: abs(one - depth)):
            there = {size: statistics.median(seen) for size, seen in self._seen[other].items() if seen}
            both = found.keys() & there.keys()
            more_s = statistics.median(found[size] - there[size] for size in both) if both else 0.0
            found = {size: seconds + more_s for size, seconds in there.items()} | found
        return found


def _depth(context: int) -> int:
    return max(0, context.bit_length() - _SHALLOW_BITS)


class Acceptance:
    """How often drafts of each source have been right, position by position; the past fades."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, float]]] = {}  # source -> (right, all) of each position, faded

    def observe(self, source: str, accepted: int, drafted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right; tokens behind the first wrong one count for nothing."""
        seen = self._seen.setdefault(source, [])
        for position in range(min(accepted + 1, drafted)):
            if position == len(seen):
                seen.append((0.0, 0.0))
            right, total = seen[position]
            seen[position] = (_FORGETTING * right + (position < accepted), _FORGETTING * total + 1.0)

    def rates(self, source: str, count: int) -> list[float]:
        """Of each of the first `count` positions how likely it is right if those before are.

        Where little was seen, a position is taken to be as good as the one before it.
        """
        seen = self._seen.get(source, [])
        rate, rates = _PRIOR_RATES.get(source, _OTHER_PRIOR_RATE), []
        for position in range(count):
            right, total = seen[position] if position < len(seen) else (0.0, 0.0)
            rate = (right + _PRIOR_WEIGHT * rate) / (total + _PRIOR_WEIGHT)
            rates.append(rate)
        return rates
