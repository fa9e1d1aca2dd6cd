"""Feeds the chosen tokens to the model one by one, with or without drafts; the decode loop does not see which.

The rule of acceptance: the loop chooses every token itself, from the model's logits at its place, as it would without
drafts, and only then says which it was. If that is the drafted one, the logits behind it are there already; if not,
what was drafted is forgotten. So options, seeds and reports mean what they mean without drafts, and the text has the
same distribution. (It is speculative sampling, Leviathan et al. 2023, for a draft that is certain of itself: the draft
x is kept with the model's probability p(x), and else another token y comes with p(y) / (1 - p(x)).)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from normistral.runtime.drafting.base import Draft, Drafter
from normistral.runtime.drafting.lookup import PromptLookup
from normistral.runtime.drafting.pacing import MOST_DRAFTED, StepCosts
from normistral.runtime.drafting.table import NgramTable, TableDrafter
from normistral.runtime.engines.base import Logits
from normistral.runtime.sequence import CachedSequence


class Decoder(Protocol):
    """Turns chosen tokens into the logits behind them.

    Attributes:
        drafted: tokens that were fed as drafts.
        accepted: of these, those that were chosen too; each saved a step.
    """

    drafted: int
    accepted: int

    def step(self, token_id: int, most: int) -> Logits:
        """The sequence goes on with `token_id`; logits [vocabulary] after it.

        Args:
            most: how many more tokens may be fed with it.
        """
        ...

    def settle(self) -> None:
        """Forget what was fed and not chosen."""
        ...


class PlainDecoder:
    """One token a step."""

    drafted = accepted = 0

    def __init__(self, sequence: CachedSequence) -> None:
        self._sequence = sequence

    def step(self, token_id: int, most: int) -> Logits:
        """Feed the token."""
        return self._sequence.append([token_id])

    def settle(self) -> None:
        """Nothing was fed that was not chosen."""


class DraftingDecoder:
    """Feeds drafted tokens with the chosen one, as many as pay.

    Args:
        sequence: holds the prompt by the time of the first step; it also knows how good its drafts have been.
        drafters: have seen the prompt; the first that has a draft is asked, the others only where it has none.
        costs: of steps on these weights.
    """

    def __init__(self, sequence: CachedSequence, drafters: Sequence[Drafter], costs: StepCosts) -> None:
        self._sequence, self._drafters, self._costs = sequence, drafters, costs
        self._draft: Draft | None = None  # for the places behind the last token that was not drafted
        self._fed: list[int] = []  # its tokens that were fed; with none it is only compared with what comes
        self._right = 0  # how many of these were chosen
        self._logits: Sequence[Logits] = ()  # after the last token that was not drafted, and after each that was fed
        self.drafted = self.accepted = 0

    def step(self, token_id: int, most: int) -> Logits:
        """Logits after the token: of an earlier step if it was drafted, else of a new one with a new draft."""
        for drafter in self._drafters:
            drafter.observe(token_id)
        if self._right < len(self._fed) and self._fed[self._right] == token_id:
            self._right += 1
            self.accepted += 1
            return self._logits[self._right]
        self._learn(token_id)
        self.settle()
        self._draft = self._propose(min(most, MOST_DRAFTED))
        self._fed = [] if self._draft is None else self._draft.token_ids[: self._choose_length(self._draft)]
        self._logits = list(self._sequence.append_each([token_id, *self._fed]))
        self._costs.observe(1 + len(self._fed), self._sequence.forward_s, self._sequence.trim_s)
        self.drafted += len(self._fed)
        return self._logits[0]

    def settle(self) -> None:
        """Forget the tokens that were fed and not chosen."""
        self._sequence.drop_last(len(self._fed) - self._right)
        self._draft, self._fed, self._right = None, [], 0

    def _propose(self, most: int) -> Draft | None:
        if most < 1:
            return None
        return next((draft for drafter in self._drafters if (draft := drafter.propose(most))), None)

    def _choose_length(self, draft: Draft) -> int:
        return self._costs.choose(self._sequence.acceptance.rates(draft.source, len(draft.token_ids)))

    def _learn(self, token_id: int) -> None:
        """Note how far the draft was right. One that was not fed was right or wrong about this token."""
        if self._draft is None:
            return
        right, of = (self._right, len(self._fed)) if self._fed else (int(self._draft.token_ids[0] == token_id), 1)
        self._sequence.acceptance.observe(self._draft.source, right, of)


class Drafting:
    """What the sequences of one model share when they draft.

    Args:
        table: n-grams, asked where a sequence itself has no guess.
    """

    def __init__(self, table: NgramTable | None = None) -> None:
        self.table = table
        self.costs = StepCosts()

    def drafters(self, token_ids: Sequence[int]) -> list[Drafter]:
        """New ones for a sequence that begins with these tokens, in the order in which they are asked."""
        drafters: list[Drafter] = [PromptLookup(token_ids)]
        if self.table is not None:
            drafters.append(TableDrafter(self.table, token_ids))
        return drafters

    def decoder(self, sequence: CachedSequence, token_ids: Sequence[int]) -> Decoder:
        """A decoder for what follows these tokens."""
        return DraftingDecoder(sequence, self.drafters(token_ids), self.costs)
