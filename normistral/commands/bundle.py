"""`normistral bundle`: packs an artifact and its runtime into one file for machines without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.commands import console
from normistral.commands.options import ArtifactName, Debug
from normistral.commands.progress import show_progress


def bundle(
    artifact: ArtifactName,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write.", show_default=False)],
    sign_with: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Sign it with this key of ssh-keygen; the signature becomes FILE.sig."),
    ] = None,
    with_server: Annotated[
        bool, typer.Option("--with-server", help="Bring also what `normistral serve` needs.")
    ] = False,
    python_version: Annotated[
        str | None, typer.Option(metavar="X.Y", help="Python of the machine that it is for. Default: this one's.")
    ] = None,
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="TAG",
            help="Its glibc and processor, as in manylinux_2_34_x86_64. Default: this machine's.",
        ),
    ] = None,
    wheels: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Take all wheels from this folder, and use no network."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE, once the new one is whole.")] = False,
    debug: Debug = False,
) -> None:
    """Pack an artifact and its runtime into one file.

    The file is for machines without a network: a tar archive with the artifact, the wheels, install.py, a
    bill of materials and a list of SHA-256 sums. pip collects the wheels, from its index as it is configured here.
    Prints the file's SHA-256 and name. docs/bundle.md says more.
    """
    from normistral.bundle.check import sums_line
    from normistral.bundle.pack import BundleOptions, make_bundle
    from normistral.bundle.wheels import choose_target

    options = BundleOptions(
        choose_target(python_version, platform), with_server=with_server, key=sign_with, wheels=wheels, force=force
    )
    with show_progress() as progress:
        sha256 = make_bundle(store.resolve_artifact(artifact), file, options, progress)
    if sign_with is None:
        console.warn(f"{file} is not signed: who installs it needs its SHA-256 from you, by a way that they trust")
    print(sums_line(sha256, str(file)), end="", flush=True)
