"""`normistral rm`: removes artifacts from the local store."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.artifact.origin import find_copy, parse_published
from normistral.commands import console
from normistral.commands.options import Debug, complete_stored
from normistral.errors import UsageError
from normistral.files import sha256_file
from normistral.progress import format_bytes


def rm(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Names that `normistral list` shows.",
            show_default=False,
            autocompletion=complete_stored,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Remove models from the local store, to free disk space.

    Only artifacts of the store are removed, by their names; folders with other files in them, and links, are refused.
    """
    from normistral.runtime.tuned import forget_tuned

    given = [name for name in dict.fromkeys(names) if not _discard_partial(name)]
    folders = [store.find_stored(name) for name in given]
    if not folders:
        return
    for folder in folders:
        store.check_removable(folder)
    sizes = {folder: format_bytes(store.folder_bytes(folder)) for folder in folders}
    if not yes:
        if not console.is_terminal(sys.stdin):
            raise UsageError("nobody is there to be asked whether to remove", "add --yes")
        listed = ", ".join(f"{folder.name} ({size})" for folder, size in sizes.items())
        if not console.confirm(f"Remove {listed} from {store.artifacts_dir()}?", default=False):
            console.say("nothing was removed")
            return
    for folder in folders:
        tuned_for = sha256_file(folder / MANIFEST_NAME)
        store.remove_artifact(folder)
        forget_tuned(tuned_for)
        console.say(f"removed {folder.name} ({sizes[folder]})")


def _discard_partial(name: str) -> bool:
    """Remove what an interrupted download of a published artifact left, where there is no copy yet."""
    published = parse_published(name)
    if published is None or find_copy(store.artifacts_dir(), published) is not None:
        return False
    from normistral.artifact.download import discard_partial

    if not discard_partial(published):
        return False
    console.say(f"removed what was downloaded of {name} so far")
    return True
