"""`normistral models`, `list`, `show` and `rm`: presets, and the artifacts of the local store."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from normistral.artifact import store
from normistral.artifact.extra_files import find_copy, parse_published, read_origin
from normistral.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from normistral.artifact.presets import PRESETS
from normistral.artifact.store import StoredArtifact
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.info import info_document
from normistral.commands.options import ArtifactName, Debug, Verbose, complete_stored
from normistral.commands.translate import translate
from normistral.errors import UsageError
from normistral.export.staging import Unfinished, discard_unfinished, find_unfinished
from normistral.files import sha256_file
from normistral.progress import format_bytes

_UNKNOWN = "?"  # not published; read from the checkpoint
_QUALITY_CHECK = {
    "run": "passed: it was run, and compared with the original",
    "read": "passed in part: its files were compared with the original; it was not run",
    "no": "left out when it was made (--no-verify)",
    "failed": "FAILED, and it was kept all the same (--keep-failed)",
    None: "not recorded",
}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with each preset's quirks.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """List the models that can be made (presets), and those on this machine."""
    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        presets = [asdict(preset) | {"source": preset.source} for preset in PRESETS]
        console.print_json({"presets": presets} | _store_document(folder, artifacts))
    else:
        console.print_lines(_model_lines(folder, artifacts))


def _model_lines(folder: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
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
    rows = [
        (
            name,
            format_bytes(manifest.total_bytes),
            manifest.format,
            manifest.recipe.weights,
            manifest.role,
            _count(manifest.context_length),
            manifest.source.id,
        )
        for name, _, manifest in artifacts
        if isinstance(manifest, Manifest)
    ]
    if rows:
        yield format_columns(
            [tuple(map(translate, ("name", "size", "format", "weights", "role", "context", "made from"))), *rows],
            indent=2,
        )
    yield from (f"  {name}: {translate(problem)}" for name, _, problem in artifacts if isinstance(problem, str))


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the models on this machine that are ready to use."""
    folder, artifacts = store.artifacts_dir(), store.list_artifacts()
    if as_json:
        console.print_json(_store_document(folder, artifacts))
    else:
        console.print_lines(_store_lines(folder, artifacts))


def _store_document(folder: Path, artifacts: list[StoredArtifact]) -> dict[str, Any]:
    return {
        "store": str(folder),
        "artifacts": [_artifact_document(*artifact) for artifact in artifacts],
        "unfinished": [
            {"name": name, "bytes": size, "running": is_running}
            for name, (size, is_running) in find_unfinished(folder).items()
        ],
    }


def _store_lines(folder: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
    if artifacts:
        yield from _table_lines(artifacts)
    else:
        yield translate(f"There are no models yet in {folder}.")
        yield translate(f"Make one with: {PRESETS[0].export_command}")
    if unfinished := find_unfinished(folder):
        yield ""
        yield translate("Unfinished: the same command goes on, or begins anew; rm NAME frees the disk")
        rows = [
            (name, format_bytes(size), translate("running") if is_running else "")
            for name, (size, is_running) in unfinished.items()
        ]
        yield format_columns(rows, indent=2)


def _table_lines(artifacts: list[StoredArtifact]) -> Iterator[str]:
    rows = []
    for name, _, content in artifacts:
        if isinstance(content, Manifest):
            rows.append((name, format_bytes(content.total_bytes), translate(_describe_use(content)), content.source.id))
        else:
            rows.append((name, "?", translate("damaged"), translate(content)))
    yield format_columns([tuple(map(translate, ("name", "size", "for", "made from"))), *rows])


def _describe_use(manifest: Manifest) -> str:
    return "completing text" if manifest.template is None else "chat"


def _artifact_document(name: str, path: Path, content: Manifest | str) -> dict[str, Any]:
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
        console.print_lines(_summary_lines(folder, manifest))


def _summary_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
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
        ("for", _describe_use(manifest)),
        ("reads at most", f"{manifest.context_length:,} tokens, prompt and answer together"),
        *(() if origin is None else (("published as", f"{origin.repository} at {origin.commit[:12]}"),)),
        ("quality check", check if origin is None else f"its publisher says: {check}"),
        ("try it", f"normistral {command} {folder.name}"),
    ]
    yield format_columns([(translate(name), translate(text)) for name, text in rows])


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

    Only artifacts of the store are removed, by their names, with what unfinished exports and downloads of these names
    left; folders with other files in them, and links, are refused.
    """
    from normistral.runtime.tuned import forget_tuned

    given = [name for name in dict.fromkeys(names) if not _discard_partial(name)]
    if not given:
        return
    unfinished = find_unfinished(store.artifacts_dir())
    folders = [_find_removable(name, unfinished) for name in given]
    none = Unfinished(0, False)
    sizes = {
        folder: format_bytes(store.folder_bytes(folder) + unfinished.get(folder.name, none).size) for folder in folders
    }
    if not yes:
        if not console.is_terminal(sys.stdin):
            raise UsageError("nobody is there to be asked whether to remove", "add --yes")
        listed = ", ".join(f"{folder.name} ({size})" for folder, size in sizes.items())
        if not console.confirm(f"Remove {listed} from {store.artifacts_dir()}?", default=False):
            console.say("nothing was removed")
            return
    for folder in folders:
        if folder.name in unfinished:
            discard_unfinished(folder)
    for folder in folders:
        if os.path.lexists(folder):
            tuned_for = sha256_file(folder / MANIFEST_NAME)
            store.remove_artifact(folder)
            forget_tuned(tuned_for)
        console.say(f"removed {folder.name} ({sizes[folder]})")


def _find_removable(name: str, unfinished: Container[str]) -> Path:
    """The artifact's folder in the store, or the one that an unfinished export or download was to make."""
    folder = store.artifacts_dir() / name
    if name in unfinished and not os.path.lexists(folder):
        return folder
    folder = store.find_stored(name)
    store.check_removable(folder)
    return folder


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
