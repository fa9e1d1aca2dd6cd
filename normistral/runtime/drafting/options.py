"""What gets into a table of n-grams; apart from the table, so that the command line need not import numpy for it."""

from __future__ import annotations

from dataclasses import dataclass

from normistral.errors import UsageError


@dataclass(frozen=True, slots=True)
class TableOptions:
    """What gets into a table.

    Attributes:
        min_count: times that the token was seen after the context.
        min_share: of all that followed the context; a draft that is seldom right does not pay.
    """

    min_count: int = 3
    min_share: float = 0.4

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        if self.min_count < 1:
            raise UsageError(f"the least count must be at least 1, not {self.min_count}")
        if not 0 < self.min_share <= 1:
            raise UsageError(f"the least share must be above 0 and at most 1, not {self.min_share}")
