"""Commands for the local store: what it holds, one artifact in words, and removing artifacts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME, read_manifest
from normistral.commands import console
from normistral.commands.options import Artifact, Debug, complete_stored
from normistral.errors import UsageError
from normistral.files import sha256_file


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the models on this machine that are ready to use."""
    from normistral.commands.info import list_document, list_lines

    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(list_document(folder, artifacts))
    else:
        console.print_lines(list_lines(folder, artifacts))


def show(
    artifact: Artifact,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Describe one model in a few words; `info` tells everything."""
    from normistral.commands.info import info_document, show_lines

    folder = store.resolve_artifact(artifact)
    manifest = read_manifest(folder)
    if as_json:
        console.print_json(info_document(folder, manifest, None))
    else:
        console.print_lines(show_lines(folder, manifest))


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
    from normistral.commands.progress import format_bytes
    from normistral.runtime.tuned import forget_tuned

    folders = [store.find_stored(name) for name in dict.fromkeys(names)]
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
