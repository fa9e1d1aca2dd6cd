"""Speculative decoding: feeds chosen tokens to the model, with drafts or without; the decode loop does not see which.

The rule of acceptance: the loop chooses every token itself, from the model's logits at its place, as it would without
drafts, and only then says which it was. If that is the drafted one, the logits behind it are there already; if not,
what was drafted is forgotten. So options, seeds and reports mean what they mean without drafts, and the text has the
same distribution. (It is speculative sampling, Leviathan et al. 2023, for a draft that is certain of itself: the draft
x is kept with the model's probability p(x), and else another token y comes with p(y) / (1 - p(x)).)

Prompt lookup (Saxena 2023) drafts the tokens that followed the latest equal ending of the text. Answers that summarise,
correct or quote repeat pieces of the prompt and of themselves. An index from the last k tokens to the place behind them
grows by one entry per k and token, so that nothing is ever scanned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from normistral.runtime.engines.base import Logits
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.speculative.draft_length import MOST_DRAFTED, StepCosts


class Decoder:
    """Turns chosen tokens into the logits behind them: feeds each, with as many drafted ones as pay.

    Args:
        sequence: holds the prompt by the time of the first step; it also knows how good its drafts have been.
        costs: of drafted steps on these weights.
        drafter: has seen the prompt; None drafts nothing.
        draft_filter: how many of drafted tokens may follow at all, one after the other; None lets all.

    Attributes:
        drafted: tokens that were fed as drafts.
        accepted: of these, those that were chosen too; each saved a step.
    """

    def __init__(
        self,
        sequence: CachedSequence,
        costs: StepCosts,
        drafter: PromptLookup | None,
        draft_filter: Callable[[Sequence[int]], int] | None = None,
    ) -> None:
        self._sequence, self._costs, self._drafter, self._draft_filter = sequence, costs, drafter, draft_filter
        self._draft: Draft | None = None  # for the places behind the last token that was not drafted
        self._fed: list[int] = []  # its tokens that were fed; with none it is only compared with what comes
        self._right = 0  # how many of these were chosen
        self._logits: Sequence[Logits] = ()  # after the last token that was not drafted, and after each that was fed
        self.drafted = self.accepted = 0

    def step(self, token_id: int, most: int, jump_forward: Sequence[int] = ()) -> Logits:
        """Append `token_id` to the sequence; logits [vocabulary] after it, of an earlier step if that fed it.

        Args:
            most: how many more tokens may be fed with it.
            jump_forward: tokens that come next in any case, at most as many; they are fed with it, and nothing is
                drafted.
        """
        if self._drafter is not None:
            self._drafter.observe(token_id)
        if self._right < len(self._fed) and self._fed[self._right] == token_id:
            self._right += 1
            self.accepted += self._draft is not None
            return self._logits[self._right]
        self._observe_acceptance(token_id)
        self.rollback()
        self._draft = None if jump_forward else self._propose(min(most, MOST_DRAFTED))
        self._fed = list(jump_forward)
        context = self._sequence.length
        if self._draft is not None:
            rates = self._sequence.acceptance.rates(self._draft.source, len(self._draft.token_ids))
            self._fed = self._draft.token_ids[: self._costs.choose(rates, context)]
            self.drafted += len(self._fed)
        self._logits = list(self._sequence.append_each([token_id, *self._fed]))
        if self._drafter is not None:
            self._costs.observe(1 + len(self._fed), self._sequence.forward_s, self._sequence.trim_s, context)
        return self._logits[0]

    def rollback(self) -> None:
        """Take tokens out of the KV cache that were fed and not chosen."""
        self._sequence.drop_last(len(self._fed) - self._right)
        self._draft, self._fed, self._right = None, [], 0

    def _propose(self, most: int) -> Draft | None:
        """A draft up to the first token that the filter refuses."""
        draft = self._drafter.propose(most) if self._drafter is not None and most > 0 else None
        if draft is None or self._draft_filter is None:
            return draft
        kept = draft.token_ids[: self._draft_filter(draft.token_ids)]
        return Draft(kept, draft.source) if kept else None

    def _observe_acceptance(self, token_id: int) -> None:
        """Note how far the draft was right. One that was not fed was right or wrong about this token."""
        if self._draft is None:
            return
        right, of = (self._right, len(self._fed)) if self._fed else (int(self._draft.token_ids[0] == token_id), 1)
        self._sequence.acceptance.observe(self._draft.source, right, of)


_LONGEST, _SHORTEST = 5, 2  # tokens that have to match; a single one says too little


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        token_ids: at least one.
        source: where they come from; drafts of one source are about equally good ("lookup 3": three tokens matched).
    """

    token_ids: list[int]
    source: str


class PromptLookup:
    """Guesses from a sequence's own past how it goes on: the longest match counts, of equal ones the latest.

    Args:
        token_ids: the sequence so far.
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._token_ids: list[int] = []
        # The last k tokens -> the place of the token that came after their latest occurrence.
        self._after: dict[tuple[int, ...], int] = {}
        for token_id in token_ids:
            self.observe(token_id)

    def observe(self, token_id: int) -> None:
        """Index the endings before this token, and append it."""
        place = len(self._token_ids)
        for length in range(_SHORTEST, min(_LONGEST, place) + 1):
            self._after[tuple(self._token_ids[place - length :])] = place
        self._token_ids.append(token_id)

    def propose(self, most: int) -> Draft | None:
        """Tokens after the latest equal ending; where these reach the end of the sequence, they are taken to repeat."""
        end = len(self._token_ids)
        for length in range(min(_LONGEST, end), _SHORTEST - 1, -1):
            place = self._after.get(tuple(self._token_ids[end - length :]))
            if place is not None:
                period = end - place
                return Draft([self._token_ids[place + i % period] for i in range(most)], f"lookup {length}")
        return None
