"""Where artifacts live on this machine, and how a name becomes a folder.

The store is a plain folder of artifact folders: NORMISTRAL_HOME/artifacts, or the same below the place where this
operating system keeps an application's data; what can be computed again is beside it, in cache, what was tuned in
tuned, compiled kernels in kernels, weights in their layout in packed. It knows how an artifact is described (the
manifest), not how it is made or run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import platformdirs

from normistral.artifact.extra_files import find_copy, find_foreign_files, parse_published
from normistral.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from normistral.artifact.presets import PRESETS, Preset, find_preset
from normistral.errors import ArtifactError, ModelNotFoundError, UsageError
from normistral.files import checked, explain, make_own_folder, mount_points, remove_own_folder


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


def packed_dir() -> Path:
    """Beside the store: weights in the layout of the compiled kernel; it need not exist."""
    return _home() / "packed"


def resolve_artifact(name_or_path: str) -> Path:
    """The folder that a user means: a path, a name in the local store, a preset that was exported here, or a published
    artifact (OWNER/NAME) that was downloaded.

    A folder here wins over one of the same name in the store, and both over a preset, unless only the latter is an
    artifact. A folder always wins over a published artifact. Nothing is downloaded. Whether the artifact is whole is
    for `read_manifest` and `check_files` to say.

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
    preset = find_preset(name_or_path)
    if preset is not None and (exported := _find_exported(preset)) is not None:
        return exported
    if folders:
        return folders[0]
    published = parse_published(name_or_path)
    if published is not None and (copy := find_copy(artifacts_dir(), published)) is not None:
        return copy
    if name_or_path and _is_file(here):
        raise ModelNotFoundError(f"{here} is a file; an artifact is a folder", "give the folder that holds it")
    raise ModelNotFoundError(
        f"there is no artifact {name_or_path!r}; {_describe_store()}", _missing_hint(name_or_path, preset)
    )


def list_artifacts(root: Path | None = None) -> list[StoredArtifact]:
    """Content of the store, by name. Folders whose name starts with a dot are exports that are still being written.

    Args:
        root: another folder of artifacts.
    """
    root = artifacts_dir() if root is None else root
    if not _is_folder(root):
        return []
    folders = sorted(path for path in root.iterdir() if _is_folder(path) and not path.name.startswith("."))
    return [StoredArtifact(path.name, path, _describe(path)) for path in folders]


def default_artifact() -> Path:
    """The artifact to chat with when none is named: the only one here, or the only chat model among several.

    Raises:
        ModelNotFoundError: there is none, or more than one.
    """
    usable = _usable_artifacts()
    chatting = [(path, manifest) for path, manifest in usable if manifest.template is not None]
    for candidates in (usable, chatting):
        if len(candidates) == 1:
            return candidates[0][0]
    if usable:
        named = chatting or usable
        names = ", ".join(path.name for path, _ in named)
        raise ModelNotFoundError(f"which artifact? There are {names}", f"name one, such as {named[0][0].name}")
    raise ModelNotFoundError(_describe_store(), _missing_hint("demo", find_preset("demo")))


def find_stored(name: str) -> Path:
    """The folder of this name in the store, artifact or not, or of a published artifact; never a path, never a preset.

    Raises:
        ModelNotFoundError: there is none.
    """
    if _is_name(name) and os.path.lexists(folder := artifacts_dir() / name):
        return folder
    published = parse_published(name)
    if published is not None and (copy := find_copy(artifacts_dir(), published)) is not None:
        return copy
    raise ModelNotFoundError(f"there is no artifact {name!r} in the store; {_describe_store()}", _close_hint(name))


def check_removable(folder: Path) -> None:
    """Refuse to remove a folder of the store that holds anything an export did not write.

    Raises:
        UsageError: it is a link, no artifact, or holds other files.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is no folder but a link or a file, so it is not removed", "remove it yourself")
    if any(mounted.is_relative_to(folder.resolve()) for mounted in mount_points()):
        raise UsageError(f"a mount point is in {folder}, so it is not removed", "unmount it, then try again")
    foreign = find_foreign_files(folder)
    if foreign is None:
        raise UsageError(
            f"{folder} is not an artifact of normistral, so it is not removed", "remove the folder yourself"
        )
    if foreign:
        raise UsageError(
            f"{folder} holds {foreign[0]}, which no export wrote, so it is not removed",
            "move that file elsewhere, then try again",
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def remove_artifact(folder: Path) -> None:
    """Remove an artifact from the store. Links in it are removed, what they lead to is not.

    It is moved into a folder as an export's first, which an export to its name and `rm` remove: what a kill leaves is
    never half an artifact under its name.

    Raises:
        UsageError: as `check_removable`.
        OSError: it cannot be removed.
    """
    check_removable(folder)
    hidden = folder.with_name(f".{folder.name}.partial-{os.urandom(4).hex()}")
    make_own_folder(hidden)
    try:
        folder.rename(hidden / "artifact")
    finally:
        remove_own_folder(hidden, first=(f"artifact/{MANIFEST_NAME}",))


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


def _missing_hint(name: str, preset: Preset | None) -> str:
    if preset is not None:
        return f"make it with: {preset.export_command}"
    if "://" in name:
        return "name a published artifact as OWNER/NAME, without the hub's address"
    if parse_published(name) is not None:
        return f"if it is published: normistral info {name} fetches it, or normistral.load with download=True"
    return _close_hint(name) or f"make one with: {PRESETS[0].export_command}"


def _close_hint(name: str) -> str:
    """A name of the store that is spelled almost like this one; empty without one."""
    import difflib

    known = [artifact.name for artifact in list_artifacts()]
    close = difflib.get_close_matches(name, known, n=1) or [one for one in known if name and one.startswith(name)][:1]
    return f"did you mean {close[0]}?" if close else ""


def _usable_artifacts() -> list[tuple[Path, Manifest]]:
    """Whole artifacts of the store; if it has none, of the folder `artifacts` here, which `make chat` fills."""
    for root in (artifacts_dir(), Path("artifacts")):
        found = [(path, content) for _, path, content in list_artifacts(root) if isinstance(content, Manifest)]
        if found:
            return found
    return []


def _find_exported(preset: Preset) -> Path | None:
    """An artifact made from a preset: as `export` names it by default, or the newest."""
    exported = [(path, one) for path, one in _usable_artifacts() if preset.is_source(one.source.kind, one.source.id)]
    usual = default_output(preset.name, preset.weights, "openvino").name
    return max(exported, key=lambda found: (found[0].name == usual, found[1].created), default=(None, None))[0]


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
