"""Prompt lookup (Saxena 2023): drafts the tokens that followed the latest equal ending of the text.

Answers that summarise, correct or quote repeat pieces of the prompt and of themselves. An index from the last k tokens
to the place behind them grows by one entry per k and token, so that nothing is ever scanned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

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


class Drafter(Protocol):
    """Guesses how one sequence goes on; cheap, and may be wrong."""

    def observe(self, token_id: int) -> None:
        """The sequence has one more token."""
        ...

    def propose(self, most: int) -> Draft | None:
        """At most `most` tokens that may follow; None without a guess."""
        ...


class PromptLookup:
    """Drafts from a sequence's own past: the longest match counts, of equal ones the latest.

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
