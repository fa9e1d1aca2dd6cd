"""`normistral list`: the artifacts of the local store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from normistral.artifact import store
from normistral.artifact.manifest import Manifest
from normistral.artifact.presets import PRESETS
from normistral.artifact.store import StoredArtifact
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.options import Debug
from normistral.commands.translate import translate
from normistral.progress import format_bytes


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the models on this machine that are ready to use."""
    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(list_document(folder, artifacts))
    else:
        console.print_lines(list_lines(folder, artifacts))


def list_document(folder: Path, artifacts: list[StoredArtifact]) -> dict[str, Any]:
    """The store for programs."""
    return {"store": str(folder), "artifacts": [artifact_document(artifact) for artifact in artifacts]}


def list_lines(folder: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
    """Lines of the store."""
    if not artifacts:
        yield translate(f"There are no models yet in {folder}.")
        yield translate(f"Make one with: {PRESETS[0].export_command}")
        return
    rows = []
    for name, _, content in artifacts:
        if isinstance(content, Manifest):
            rows.append((name, format_bytes(content.total_bytes), translate(describe_use(content)), content.source.id))
        else:
            rows.append((name, "?", translate("damaged"), translate(content)))
    yield format_columns([tuple(map(translate, ("name", "size", "for", "made from"))), *rows])


def describe_use(manifest: Manifest) -> str:
    """Chat, or completing text."""
    return "completing text" if manifest.template is None else "chat"


def artifact_document(artifact: StoredArtifact) -> dict[str, Any]:
    """One artifact of the store for programs."""
    name, path, content = artifact
    if isinstance(content, str):
        return {"name": name, "path": str(path), "problem": content}
    return {
        "name": name,
        "path": str(path),
        "total_bytes": content.total_bytes,
        "format": content.format,
        "weights": content.recipe.weights,
        "role": content.role,
        "context_length": content.context_length,
        "source": content.source.id,
    }
