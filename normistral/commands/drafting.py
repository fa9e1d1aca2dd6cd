"""The command that makes a table of n-grams to draft from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normistral.runtime.drafting.table import TableOptions
from normistral.terminal.arguments import Artifact, Debug

_OURS = TableOptions()


def draft_table(
    artifact: Artifact,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The file to make.", show_default=False)],
    text: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Text in UTF-8; may be given several times.", show_default=False),
    ],
    min_count: Annotated[int, typer.Option(metavar="N", help="Keep what was seen N times at least.")] = _OURS.min_count,
    force: Annotated[bool, typer.Option("--force", help="Replace OUTPUT.")] = False,
    debug: Debug = False,
) -> None:
    """Make a table of what often follows what in a text, for --draft-table.

    It helps answers that are worded like the text. It belongs to the artifact's tokenizer, and holds hashes and tokens
    of the text's frequent phrases.
    """
    from normistral.terminal.draft_tables import make_table

    make_table(artifact, output, text, TableOptions(min_count=min_count), force=force)
