"""Commands that were removed: hidden, and each answers with an error that says so."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.commands.options import Debug
from normistral.errors import UsageError
from normistral.runtime.options import refuse_draft_table


def draft_table(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    debug: Debug = False,
) -> None:
    """Removed."""
    refuse_draft_table("draft-table")


def tune(
    arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    debug: Debug = False,
) -> None:
    """Removed."""
    raise UsageError(
        "tune was removed: on no machine did it find settings that were faster than the default ones",
        "compare settings with normistral bench ARTIFACT ARTIFACT@KEY=VALUE, and give the faster ones with --set",
    )
