"""`normistral draft-table`, which was removed: hidden, and answers with an error that says so."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.commands.options import Debug
from normistral.runtime.options import refuse_draft_table


def draft_table(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    debug: Debug = False,
) -> None:
    """Removed."""
    refuse_draft_table("draft-table")
