"""Atomic writing of an artifact: beside its place, moved there when it is whole.

While OUTPUT is being made, its parent holds hidden neighbours:

    .OUTPUT.lock              held (flock) by the running export; the system releases it when the process dies
    .OUTPUT.partial-XXXXXXXX  `artifact`, which becomes OUTPUT, and `workspace`, which is thrown away; marked as ours
    .OUTPUT.kept-XXXXXXXX     `kept`, if a stage makes it: work that the next export to OUTPUT may go on with. It stays
                              when this one fails, and goes when OUTPUT is there; marked as ours

A new OUTPUT appears by one rename, an old one is exchanged for the new one by one rename: at every moment the name
OUTPUT stands for nothing, the whole old artifact, or the whole new one. Whoever holds the lock knows that other
partial folders were left by a killed export, and removes them, if they carry our mark and are this user's: what else
has such a name is not touched. A kept folder is gone on with only if nobody else may look or write into it, besides.

It does not know what an artifact consists of, except that the manifest makes it whole.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from normistral.artifact.extra_files import find_foreign_files
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.artifact.store import folder_bytes
from normistral.errors import ResourceError, UsageError
from normistral.files import (
    checked,
    explain,
    flush_to_disk,
    is_locked,
    is_own_folder,
    locked,
    make_own_folder,
    mount_points,
    remove_own_folder,
    require_movable,
)
from normistral.hardware import free_disk_bytes

_DOWNLOAD = "download"  # `artifact.download`'s; the others are of exports
_KINDS = ("partial", "kept", _DOWNLOAD)
_NEIGHBOUR = re.compile(rf"\.(?P<output>.+)\.(?:(?P<kind>partial|kept)-[0-9a-f]{{8}}|{_DOWNLOAD})", re.DOTALL)
_REPLACED = "replaced"
_FULL_BELOW_BYTES = 2**20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BY_HAND = "choose another OUTPUT, or remove this one yourself"


class Unfinished(NamedTuple):
    """What an export or download has made so far: bytes, and whether it is still running."""

    size: int
    is_running: bool


@dataclass(frozen=True, slots=True)
class Staging:
    """Places on OUTPUT's disk.

    Attributes:
        artifact: an empty folder; it becomes OUTPUT.
        workspace: an empty folder for temporary files.
        kept: a folder of ours that an earlier export left, or the name to `make_own_folder`.
    """

    artifact: Path
    workspace: Path
    kept: Path


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an OUTPUT that must not be written or replaced.

    Raises:
        UsageError: it exists and `force` is off; or `force` is on and it holds something that no export made; or
            another process is writing it.
    """
    _check_place(output, force=force)
    if is_locked(_lock_file(output)):
        raise _is_written(output)


def _check_place(output: Path, *, force: bool) -> None:
    if output.name in ("", ".."):
        raise UsageError(f"{output} cannot be the name of a new folder", "name a folder that does not exist yet")
    try:
        if not os.path.lexists(checked(output)):
            return
        if not force:
            raise UsageError(f"{output} exists already", "choose another OUTPUT, or replace it with --force")
        if output.is_symlink() or not output.is_dir():
            raise UsageError(f"{output} is not a folder, so it is not replaced", _BY_HAND)
        _require_movable(output.absolute())
        _require_exported(output)
    except OSError as exc:
        reason, hint = explain(exc)
        raise UsageError(f"{output} cannot be replaced: {reason}", hint) from exc


def _require_movable(output: Path) -> None:
    """Refuse a mount point, the current folder, and what the rename at the end would fail at."""
    real = Path(os.path.realpath(output))
    for mounted in mount_points():
        if mounted.is_relative_to(real):
            raise UsageError(f"{mounted} is a mount point, so {output} is not replaced", _BY_HAND)
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"{output} holds the current folder, so it is not replaced", "change to another folder first")
    require_movable(output)
    if not os.access(output, os.W_OK | os.X_OK) or not os.access(output.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{output} cannot be replaced: permission denied", _BY_HAND)


def _require_exported(output: Path) -> None:
    """Refuse a folder that holds anything but an artifact."""
    if not any(path.is_symlink() or not path.is_dir() for path in output.rglob("*")):
        return
    foreign = find_foreign_files(output)
    if foreign is None:
        raise UsageError(f"{output} is not an artifact of normistral, so it is not replaced", _BY_HAND)
    if foreign:
        raise UsageError(
            f"{output} holds {foreign[0]}, which no export wrote, so it is not replaced",
            "move that file elsewhere, or choose another OUTPUT",
        )


@contextmanager
def stage(output: Path, *, force: bool) -> Iterator[Staging]:
    """Folders to write into; when the block ends, the artifact takes OUTPUT's place, old one or none.

    When the block raises (`KeyboardInterrupt` included) everything but `kept` is removed and OUTPUT is untouched.

    Raises:
        UsageError: as `check_output`.
        ResourceError: the disk is full.
    """
    output = output.absolute()
    with translate_full_disk(output):
        _make_parent(output)
        with _lock(output):
            _remove_neighbours(output, "partial")
            _check_place(output, force=force)  # now that nobody else can change it
            folder = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
            staging = Staging(folder / "artifact", folder / "workspace", _choose_kept(output))
            try:
                make_own_folder(folder)
                staging.artifact.mkdir()
                staging.workspace.mkdir()
                yield staging
                for path in [
                    *staging.artifact.rglob("*"),
                    staging.artifact,
                ]:  # before their names, should the power fail
                    flush_to_disk(path)
                _move_into_place(staging.artifact, output)
                _remove_neighbours(output, "kept")
            finally:
                _remove(folder)


def find_unfinished(parent: Path) -> dict[str, Unfinished]:
    """What exports and downloads in `parent` were interrupted or are still running, by the name of their OUTPUT.

    Args:
        parent: a folder of artifacts; it need not exist.
    """
    sizes: dict[str, int] = {}
    for name, _, folder in _leftovers(parent) if parent.is_dir() else ():
        size = 0
        with suppress(FileNotFoundError):  # a running export removes files meanwhile
            size = folder_bytes(folder)
        sizes[name] = sizes.get(name, 0) + size
    return {name: Unfinished(size, is_locked(_lock_file(parent / name))) for name, size in sorted(sizes.items())}


def discard_unfinished(output: Path) -> None:
    """Remove what an interrupted export or download to `output` left; an older artifact of that name stays.

    Raises:
        UsageError: it is still running, or this user may not write there.
    """
    with _lock(output):
        for kind in _KINDS:
            _remove_neighbours(output, kind)


@contextmanager
def translate_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into a ResourceError that says how much is free."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in _NO_SPACE:
            raise
        raise _full_disk(path, exc) from exc


def require_free_disk(path: Path, needed_bytes: int = _FULL_BELOW_BYTES) -> None:
    """To be asked when a library failed to write `path` and does not say why; what it wrote may be gone again.

    Raises:
        ResourceError: there is no room for so many bytes: the disk, a quota or a limit on files is too small.
    """
    if free_disk_bytes(path) < needed_bytes:
        raise _full_disk(path)
    if sys.platform == "linux" and path.parent.is_dir():
        with translate_full_disk(path), tempfile.TemporaryFile(dir=path.parent) as file:
            os.posix_fallocate(file.fileno(), 0, needed_bytes)


def _full_disk(path: Path, exc: OSError | None = None) -> ResourceError:
    reason, hint = explain(exc or OSError(errno.ENOSPC, ""))
    if exc is None or exc.errno == errno.ENOSPC:
        reason += f": {free_disk_bytes(path) / 1e6:.1f} MB were left"
    return ResourceError(f"{reason} while writing {path.name}; the unfinished artifact has been removed", hint)


def _make_parent(output: Path) -> None:
    try:
        checked(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        if exc.errno in _NO_SPACE:
            raise
        reason, hint = explain(exc)
        raise UsageError(f"cannot make the folder {output.parent}: {reason}", hint) from exc


def _lock_file(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


def _is_written(output: Path) -> UsageError:
    return UsageError(f"another process is writing {output}", "wait until it is done, or choose another OUTPUT")


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    """Hold the lock of this OUTPUT; the kernel releases it if the process dies."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(_lock_file(output)))
        except BlockingIOError as exc:
            raise _is_written(output) from exc
        except OSError as exc:
            if exc.errno in _NO_SPACE:
                raise
            reason, hint = explain(exc)
            raise UsageError(f"cannot write in {output.parent}: {reason}", hint) from exc
        yield


def _leftovers(parent: Path) -> Iterator[tuple[str, str, Path]]:
    """Folders of ours that exports and downloads left in `parent`: name of their OUTPUT, kind, path."""
    for path in parent.iterdir():
        if (found := _NEIGHBOUR.fullmatch(path.name)) and is_own_folder(path):
            yield found["output"], found["kind"] or _DOWNLOAD, path


def _neighbours(output: Path, kind: str) -> list[Path]:
    """Folders of this kind that exports to this OUTPUT left; to be asked only while holding the lock."""
    found = _leftovers(output.parent)
    return sorted(path for name, of_kind, path in found if (name, of_kind) == (output.name, kind))


def _remove_neighbours(output: Path, kind: str) -> None:
    """Remove such folders; an old OUTPUT that one of them holds is put back."""
    for leftover in _neighbours(output, kind):
        _put_back(leftover / _REPLACED, output)
        _remove(leftover)


def _choose_kept(output: Path) -> Path:
    for path in _neighbours(output, "kept"):
        if os.name != "posix" or not path.lstat().st_mode & 0o077:
            return path
    return output.parent / f".{output.name}.kept-{secrets.token_hex(4)}"


def _put_back(replaced: Path, output: Path) -> None:
    """Undo half an exchange: the old artifact was moved aside, and nothing took its place."""
    if not replaced.is_symlink() and replaced.is_dir() and not os.path.lexists(output):
        replaced.rename(output)


def _remove(folder: Path) -> None:
    """Delete a folder, the manifests first: what a kill in between leaves must not look whole."""
    with suppress(FileNotFoundError):
        remove_own_folder(folder, [f"{part}/{MANIFEST_NAME}" for part in ("artifact", _REPLACED)])


def _move_into_place(artifact: Path, output: Path) -> None:
    if not os.path.lexists(output):
        artifact.rename(output)
    elif not any(output.iterdir()):
        output.rmdir()
        artifact.rename(output)
    elif not _exchange(artifact, output):
        # Without an atomic exchange there is a moment in which neither stands under the name. The old one then lies
        # in the partial folder, and is put back if the second rename fails or by the next export.
        aside = artifact.with_name(_REPLACED)
        output.rename(aside)
        try:
            artifact.rename(output)
        finally:
            _put_back(aside, output)
    flush_to_disk(output.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step: renameat2(2) with RENAME_EXCHANGE. False where system or file system cannot."""
    if sys.platform != "linux":
        return False
    at_working_folder, rename_exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <linux/fs.h>
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    failed = renameat2(at_working_folder, os.fsencode(first), at_working_folder, os.fsencode(second), rename_exchange)
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))
    return not failed
