"""The command that makes a table of n-grams to draft from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normistral.commands.options import Artifact, Debug
from normistral.runtime.drafting.options import TableOptions

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
    """Learn frequent phrases from texts, for faster answers (--draft-table).

    Of what often follows what in these texts; it makes answers faster that are worded like them. It belongs to the
    artifact's tokenizer. The texts' frequent phrases can be read back from it: keep it as you keep the texts.
    """
    from normistral.commands.draft_tables import make_table

    make_table(artifact, output, text, TableOptions(min_count=min_count), force=force)
