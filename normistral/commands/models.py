"""`normistral models`: presets and the artifacts of the local store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from normistral.artifact import store
from normistral.artifact.manifest import Manifest
from normistral.artifact.presets import PRESETS
from normistral.artifact.store import StoredArtifact
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.list import artifact_document
from normistral.commands.options import Debug, Verbose
from normistral.commands.translate import translate
from normistral.progress import format_bytes

_UNKNOWN = "?"  # not published; read from the checkpoint


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with each preset's quirks.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the models that can be made (presets), and those on this machine."""
    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(models_document(folder, artifacts))
    else:
        console.print_lines(models_lines(folder, artifacts))


def models_document(folder: Path, artifacts: list[StoredArtifact]) -> dict[str, Any]:
    """Presets and local artifacts for programs."""
    return {
        "presets": [asdict(preset) | {"source": preset.source} for preset in PRESETS],
        "store": str(folder),
        "artifacts": [artifact_document(artifact) for artifact in artifacts],
    }


def models_lines(folder: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
    """Lines of presets and local artifacts."""
    presets = [
        (
            preset.name,
            preset.source,
            preset.role or _UNKNOWN,
            _count(preset.context_length),
            preset.licence or _UNKNOWN,
            preset.weights,
        )
        for preset in PRESETS
    ]
    yield translate("Presets (normistral export NAME)")
    yield format_columns(
        [tuple(map(translate, ("name", "from", "role", "context", "licence", "recommended"))), *presets], indent=2
    )
    yield ""
    yield translate(f"Artifacts in {folder} (normistral chat NAME)")
    if not artifacts:
        yield "  " + translate("none yet; make one with: normistral export demo")
        return
    usable = [artifact for artifact in artifacts if isinstance(artifact.content, Manifest)]
    if usable:
        rows = [_artifact_row(artifact.name, artifact.content) for artifact in usable]  # type: ignore[arg-type]
        yield format_columns(
            [tuple(map(translate, ("name", "size", "format", "weights", "role", "context", "made from"))), *rows],
            indent=2,
        )
    for artifact in artifacts:
        if isinstance(artifact.content, str):
            yield f"  {artifact.name}: {translate(artifact.content)}"


def _artifact_row(name: str, manifest: Manifest) -> tuple[str, ...]:
    return (
        name,
        format_bytes(manifest.total_bytes),
        manifest.format,
        manifest.recipe.weights,
        manifest.role,
        _count(manifest.context_length),
        manifest.source.id,
    )


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"
