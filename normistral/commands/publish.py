"""`normistral publish` and `bundle`: an artifact for others, on a hub or in one file for machines without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normistral.artifact import store
from normistral.artifact.card import CardOptions
from normistral.commands import console
from normistral.commands.options import ArtifactName, Debug
from normistral.commands.progress import show_progress
from normistral.commands.translate import translate
from normistral.errors import UsageError
from normistral.progress import format_bytes

if TYPE_CHECKING:
    from normistral.export.publish import Publication


def publish(
    artifact: ArtifactName,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="What it will be called.", show_default=False)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="For yourself alone, if the repository is new. Default: for everybody.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence of the base model, where the card does not know it."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Where the base model is published, if it was exported from a folder."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Publish an artifact on a hub, so that others can use it as OWNER/NAME.

    Every file is checked, then what will happen is shown, and asked for. The model card goes with it: your own, if you
    rewrote README.md. All of it becomes visible at once; a run that broke off goes on where it was. The token is that
    of huggingface-cli login, or HF_TOKEN; HF_ENDPOINT names another hub. docs/publish.md says more.
    """
    from normistral.export.publish import plan_publication
    from normistral.export.publish import publish as send

    options = CardOptions(licence=licence, base_model=base_model)
    folder = store.resolve_artifact(artifact)
    with show_progress() as progress:
        plan = plan_publication(folder, repository, options, private=private, progress=progress)
    for line in _describe(plan):
        console.say(line)
    address = f"{plan.address}/{plan.repository}"
    if plan.is_done:
        console.say("nothing is to be sent")
        print(address)
        return
    if not yes:
        if not console.is_terminal(sys.stdin):
            raise UsageError("nobody is there to be asked whether to publish", "add --yes")
        if not console.confirm("Publish it?", default=False):
            console.say("nothing was sent")
            return
    with show_progress() as progress:
        commit = send(plan, progress)
    console.say(f"published as commit {commit[:12]}; try it: normistral chat {plan.repository}")
    print(address)


def _describe(plan: Publication) -> list[str]:
    whom = translate("for you alone" if plan.private else "for everybody")
    new = translate("a new repository" if plan.commit is None else "a repository that is there")
    lines = [
        f"{plan.folder} goes to {plan.address}/{plan.repository}: {new}, {whom}, licence {plan.licence}",
        f"to send: {format_bytes(plan.missing_bytes)} in {len(plan.missing)} files; "
        f"{len(plan.files) - len(plan.missing)} are there already",
    ]
    if plan.superfluous:
        lines.append(f"to be deleted there, of the artifact before: {', '.join(plan.superfluous)}")
    return lines


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
