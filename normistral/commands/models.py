"""Commands that show what is there: presets and artifacts, one artifact, this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import find_problems, read_manifest
from normistral.commands import console
from normistral.commands.options import Artifact, Debug, Verbose
from normistral.errors import ArtifactError


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with each preset's quirks.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the models that can be made (presets), and those on this machine."""
    from normistral.commands.info import models_document, models_lines

    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(models_document(folder, artifacts))
    else:
        console.print_lines(models_lines(folder, artifacts))


def info(
    artifact: Artifact,
    check: Annotated[bool, typer.Option("--check", help="Hash every file again; exit code 1 if one differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show everything that a model on this machine is made of; --check looks for damage."""
    from normistral.commands.info import info_document, info_lines

    folder = store.resolve_artifact(artifact)
    manifest = read_manifest(folder)
    problems = None
    if check:
        from normistral.commands.progress import show_progress

        with show_progress() as progress, progress.stage("hashing", manifest.total_bytes, "bytes") as hashing:
            problems = list(find_problems(folder, manifest, thorough=True, on_bytes=hashing.advance))
    if as_json:
        console.print_json(info_document(folder, manifest, problems))
    else:
        console.print_lines(info_lines(folder, manifest))
        if problems is not None:
            console.print_lines(problems or [f"all {len(manifest.files)} files are as they were exported"])
    if problems:
        raise ArtifactError(
            f"{folder} has {len(problems)} damaged or missing files", "export the model again, or copy it again"
        )


def doctor(
    artifact: Annotated[
        str | None, typer.Argument(metavar="[ARTIFACT]", help="Also say what will be used for this artifact.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show this machine, and what will be used and why."""
    from normistral.commands.doctor import doctor_lines, examine

    report = examine(None if artifact is None else store.resolve_artifact(artifact))
    if as_json:
        console.print_json(report)
    else:
        console.print_lines(doctor_lines(report))
