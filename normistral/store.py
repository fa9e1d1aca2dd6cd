"""Where artifacts live on this machine, and how a name becomes a folder.

The store is a plain folder of artifact folders: NORMISTRAL_HOME/artifacts, or the same below the place where this
operating system keeps an application's data; what can be computed again is beside it, in cache, what was tuned in
tuned, compiled kernels in kernels. It knows how an artifact is described (the manifest), not how it is made or run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import platformdirs

from normistral.errors import ArtifactError, ModelNotFoundError, UsageError
from normistral.files import checked, explain
from normistral.manifest import MANIFEST_NAME, Manifest, read_manifest
from normistral.presets import find_preset


class StoredArtifact(NamedTuple):
    """One folder of the store; `content` is its manifest, or the text that says why it has none that can be used."""

    name: str
    path: Path
    content: Manifest | str


def artifacts_dir() -> Path:
    """The local store; it need not exist."""
    return _home() / "artifacts"


def cache_dir() -> Path:
    """Beside the store: what can be computed again; it need not exist."""
    return _home() / "cache"


def tuned_dir() -> Path:
    """Beside the store: what `normistral tune` found, a file for each artifact and machine; it need not exist."""
    return _home() / "tuned"


def kernels_dir() -> Path:
    """Beside the store: kernels compiled on this machine; it need not exist."""
    return _home() / "kernels"


def resolve_artifact(name_or_path: str) -> Path:
    """The folder that a user means: a path, or a name in the local store.

    A folder here wins over one of the same name in the store, unless only the latter is an artifact. Whether the
    artifact is whole is for `read_manifest` and `check_files` to say.

    Raises:
        ModelNotFoundError: there is no such folder; the message lists what the store has.
    """
    here = Path(name_or_path)
    candidates = [here] if name_or_path else []
    if _is_name(name_or_path):
        candidates.append(artifacts_dir() / name_or_path)
    folders = [path for path in candidates if _is_folder(path)]
    for folder in folders:
        if (folder / MANIFEST_NAME).is_file():
            return folder
    if folders:
        return folders[0]
    if name_or_path and _is_file(here):
        raise ModelNotFoundError(f"{here} is a file; an artifact is a folder", "give the folder that holds it")
    raise ModelNotFoundError(f"there is no artifact {name_or_path!r}; {_describe_store()}", _export_hint(name_or_path))


def list_artifacts() -> list[StoredArtifact]:
    """What the store holds, by name. Folders whose name starts with a dot are exports that are still being written."""
    root = artifacts_dir()
    if not _is_folder(root):
        return []
    folders = sorted(path for path in root.iterdir() if _is_folder(path) and not path.name.startswith("."))
    return [StoredArtifact(path.name, path, _describe(path)) for path in folders]


def default_artifact() -> Path:
    """The artifact that is meant when none is named: the only one in the store.

    Raises:
        ModelNotFoundError: there is none, or more than one.
    """
    usable = [artifact for artifact in list_artifacts() if isinstance(artifact.content, Manifest)]
    if len(usable) == 1:
        return usable[0].path
    if usable:
        names = ", ".join(artifact.name for artifact in usable)
        raise ModelNotFoundError(f"which artifact? the local store has {names}", f"name one, such as {usable[0].name}")
    raise ModelNotFoundError(_describe_store(), _export_hint("demo"))


def default_output(model_name: str, weights: str, format: str) -> Path:
    """Where an export goes when no OUTPUT is given: `<store>/<preset or last part of the name>-<format>-<weights>`.

    Args:
        model_name: preset, hub id, folder or .gguf file, as the user gave it.
    """
    preset = find_preset(model_name)
    path = Path(model_name).absolute()
    base = preset.name if preset else path.stem if path.suffix == ".gguf" else path.name
    return artifacts_dir() / f"{base.lstrip('.') or 'model'}-{format}-{weights}"


def history_file() -> Path:
    """Where earlier messages are kept: below NORMISTRAL_HOME, or where this system keeps an application's state."""
    return _home(platformdirs.user_state_path) / "history"


def _home(default: Callable[..., Path] = platformdirs.user_data_path) -> Path:
    named = os.environ.get("NORMISTRAL_HOME")
    try:
        home = checked(Path(named)).expanduser().absolute() if named else default("normistral", appauthor=False)
    except OSError as exc:  # such as: the current folder was deleted
        raise UsageError(f"NORMISTRAL_HOME={named or ''} cannot be used: {explain(exc)[0]}", _HOME_HINT) from exc
    except RuntimeError as exc:
        what = f"NORMISTRAL_HOME={named}: there is no such user" if named else "this user has no home folder"
        raise UsageError(what, _HOME_HINT) from exc
    if not home.is_absolute():  # some versions of platformdirs leave "~" where this user has no home
        raise UsageError("this user has no home folder", _HOME_HINT)
    return home


_HOME_HINT = "give NORMISTRAL_HOME a folder"


def _describe(folder: Path) -> Manifest | str:
    try:
        return read_manifest(folder)
    except ArtifactError as exc:
        return exc.message


def _describe_store() -> str:
    names = [artifact.name for artifact in list_artifacts()]
    return f"the local store {artifacts_dir()} has {', '.join(names)}" if names else "the local store has no artifacts"


def _export_hint(name: str) -> str:
    preset = find_preset(name)
    return f"make it with: normistral export {preset.name if preset else 'demo'}"


def _is_name(text: str) -> bool:
    """Whether it can name a folder of the store: one part, and not hidden."""
    return bool(text) and not text.startswith(".") and not set(text) & {"/", "\\", "\x00"}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # such as a name that is too long
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
