"""Which slots of a KV cache hold tokens, where rejected ones stay behind as dead slots.

OpenVINO appends to its cache and cannot shorten it; only copying the whole of it out and in does. So a rejected token
stays where it is: the attention mask hides it, and position ids count living tokens. Masked slots weigh exactly 0 in
the attention; logits differ from those of a clean cache by the order of sums alone (docs/decisions.md).

    slots     0 1 2 3 4 5 6
    mask      1 1 1 0 0 1 1      after tokens 3 and 4 were rejected and two others appended
    position  0 1 2 - - 3 4
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FEW_DEAD = 32  # dead slots that are never worth a copy
_DEAD_SHARE = 8  # more than an eighth of the living is


class Slots:
    """The slots of one sequence's cache; arithmetic only, the cache itself is the engine's.

    Args:
        limit: the most slots that may be used while some are dead. The graph counts a sliding window, and the end of
            the context, in slots.
        keeps_dead: whether masked slots leave positions alone in this graph; otherwise none may be dead.
    """

    __slots__ = ("_keeps_dead", "_limit", "_mask", "length")

    def __init__(self, limit: int, *, keeps_dead: bool) -> None:
        self._limit = limit
        self._keeps_dead = keeps_dead
        self._mask: NDArray[np.int64] = np.ones(0, np.int64)
        self.length = 0  # tokens: living slots

    def extended_mask(self, count: int) -> NDArray[np.int64]:
        """Mask [1, slots] for a forward of `count` more tokens."""
        return np.concatenate([self._mask, np.ones(count, np.int64)])[None]

    def append(self, count: int) -> None:
        """The forward of `count` tokens is done."""
        self._mask = self.extended_mask(count)[0]
        self.length += count

    def trim(self, length: int) -> None:
        """Kill the slots behind the first `length` tokens."""
        self._mask[self.living()[length:]] = 0
        self.length = length

    def living(self) -> NDArray[np.int64]:
        """Indices of the slots that hold tokens, in order."""
        living: NDArray[np.int64] = np.flatnonzero(self._mask)
        return living

    @property
    def dead(self) -> int:
        """Slots that hold rejected tokens."""
        return len(self._mask) - self.length

    @property
    def intact(self) -> int:
        """Tokens before the first dead slot."""
        return int(self._mask.argmin()) if self.dead else self.length

    def must_compact(self, count: int) -> bool:
        """Whether the dead slots have to go before `count` tokens are appended."""
        dead = self.dead
        too_many = dead > max(_FEW_DEAD, self.length // _DEAD_SHARE)
        return dead > 0 and (not self._keeps_dead or too_many or len(self._mask) + count > self._limit)

    def compacted(self, length: int) -> None:
        """The cache was cut to `length` tokens and holds nothing else."""
        self._mask = np.ones(length, np.int64)
        self.length = length
