"""`normistral show`: an artifact in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.artifact.origin import read_origin
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.info import info_document
from normistral.commands.list import describe_use
from normistral.commands.options import ArtifactName, Debug
from normistral.commands.translate import translate
from normistral.progress import format_bytes

_QUALITY_CHECK = {
    "run": "passed: it was run, and compared with the original",
    "read": "passed in part: its files were compared with the original; it was not run",
    "no": "left out when it was made (--no-verify)",
    "failed": "FAILED, and it was kept all the same (--keep-failed)",
    None: "not recorded",
}


def show(
    artifact: ArtifactName,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Describe one model in a few words; `info` tells everything."""
    folder = store.resolve_artifact(artifact)
    manifest = read_manifest(folder)
    if as_json:
        console.print_json(info_document(folder, manifest, None))
    else:
        console.print_lines(show_lines(folder, manifest))


def show_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """An artifact in a few words."""
    shape, source = manifest.architecture, manifest.source
    engine = {"openvino": "OpenVINO", "onnx": "onnxruntime"}[manifest.format]
    origin, check = read_origin(folder), _QUALITY_CHECK[manifest.verified]
    command = "chat" if manifest.template is not None else "generate"
    rows = [
        ("name", folder.name),
        ("folder", str(folder.absolute())),
        ("size", format_bytes(manifest.total_bytes)),
        ("made from", source.id + (f" at {source.revision}" if source.revision else "")),
        ("made on", manifest.created[:10]),
        ("model", f"{shape.parameters / 1e6:,.0f} million parameters, {manifest.recipe.weights} weights"),
        ("runs with", engine),
        ("for", describe_use(manifest)),
        ("reads at most", f"{manifest.context_length:,} tokens, prompt and answer together"),
        *(() if origin is None else (("published as", f"{origin.repository} at {origin.commit[:12]}"),)),
        ("quality check", check if origin is None else f"its publisher says: {check}"),
        ("try it", f"normistral {command} {folder.name}"),
    ]
    yield format_columns([(translate(name), translate(text)) for name, text in rows])
