"""The protocol between those that guess the next tokens and the decoder that checks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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
