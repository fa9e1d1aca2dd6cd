"""Download of a published artifact into the store: pinned to one commit, every byte compared with the manifest.

A published artifact is a stranger's. Only the files of its manifest are fetched, under plain names, and of each no more
bytes than the manifest says; one with another SHA-256 is deleted. The copy appears in the store by one rename, when all
of it is there. What a kill, a broken connection or a full disk leaves is in a hidden folder beside it:

    .COPY.lock                held by the running download
    .COPY.download            marked as ours, for this user alone
        partial/SHA256        a file so far
        artifact/             files that are whole; becomes COPY

and is picked up by the next download of the same name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

from normistral.artifact import store
from normistral.artifact.extra_files import (
    CARD_NAME,
    ORIGIN_NAME,
    Origin,
    PublishedName,
    find_copy,
    parse_published,
    write_origin,
)
from normistral.artifact.hub import (
    IT_CONTINUES,
    ConnectionBrokenError,
    FileDownload,
    Listing,
    RemoteFile,
    Repository,
    endpoint,
    git_blob_id,
    host_of,
)
from normistral.artifact.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileRecord, Manifest, parse_manifest
from normistral.artifact.presets import find_preset
from normistral.errors import ArtifactError, DownloadError, ModelNotFoundError, ResourceError, UsageError
from normistral.files import (
    atomic_write,
    explain,
    is_own_folder,
    locked,
    make_own_folder,
    open_file,
    remove_own_folder,
    sha256_file,
)
from normistral.hardware import free_disk_bytes
from normistral.progress import NoProgress, Progress, Stage, format_bytes

_MAX_FILES = 1000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PAUSE_S = 0.5  # between two looks at a lock


def find_or_download(name: str, progress: Progress | None = None) -> Path:
    """The folder of an artifact: as `store.resolve_artifact` finds it, or downloaded if it is a published one's name.

    Raises:
        ModelNotFoundError: there is none, here or on the hub.
        DownloadError, ResourceError, ArtifactError: as `download_published`.
    """
    try:
        return store.resolve_artifact(name)
    except ModelNotFoundError as missing:
        published = parse_published(name)
        if published is None or find_preset(name) is not None or os.path.lexists(name):
            raise
        owner = name.partition("/")[0]
        if published.revision is None and Path(owner).is_dir():  # more likely a path with an error in it
            raise ModelNotFoundError(
                f"there is no {name} in the folder {owner} that is here",
                f"check the spelling; if a published one is meant: {name}@main",
            ) from missing
        return download_published(published, progress or NoProgress())


def download_published(name: PublishedName, progress: Progress) -> Path:
    """Bring a published artifact into the store, unless its copy is there; returns the copy's folder.

    Raises:
        ModelNotFoundError: there is no such repository or revision, or no artifact in it.
        DownloadError: the hub cannot be reached, refuses, or sends something else than it should.
        ArtifactError: it is damaged, or of a newer version.
        ResourceError: the disk is full, or will be.
        UsageError: something else has the copy's name.
    """
    root = store.artifacts_dir()
    if (copy := find_copy(root, name)) is not None:
        return copy
    address = endpoint()
    repository = Repository(name.repository, address)
    listing = repository.list_files(name.revision or "main")
    raw = _read_manifest(repository, listing)
    manifest = parse_manifest(raw, f"{MANIFEST_NAME} of {name}")
    _require_listed(repository, manifest, listing)
    target = root / name.folder_name
    size = format_bytes(manifest.total_bytes)
    progress.note(f"downloading {size} from {host_of(address)}: {name}, commit {listing.commit[:12]}, to {target}")
    with _translate_system_errors(name, root):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{target.name}.lock", name, progress):
            if (copy := find_copy(root, name)) is not None:  # another process was faster
                return copy
            if os.path.lexists(target):
                raise UsageError(f"{target} is there, and is no copy of {name}", "rename or remove it")
            work = _open_work_folder(root / f".{target.name}.download")
            _fetch_all(repository, listing, manifest, work, progress)
            with atomic_write(work / "artifact" / MANIFEST_NAME, private=False) as file:
                file.write(raw)
            today = datetime.now(UTC).date().isoformat()
            write_origin(work / "artifact", Origin(address, name.repository, name.revision, listing.commit, today))
            (work / "artifact").rename(target)
            remove_own_folder(work)
    return target


def discard_partial(name: PublishedName) -> bool:
    """Remove what an interrupted download left; whether there was anything.

    Raises:
        UsageError: a download of it is running.
        OSError: it cannot be removed.
    """
    root = store.artifacts_dir()
    work = root / f".{name.folder_name}.download"
    if not is_own_folder(work):
        return False
    try:
        with locked(root / f".{name.folder_name}.lock"):
            remove_own_folder(work)
    except BlockingIOError as exc:
        raise UsageError(f"another process is downloading {name}", "end it first") from exc
    return True


def _read_manifest(repository: Repository, listing: Listing) -> bytes:
    listed = listing.files.get(MANIFEST_NAME)
    if listed is None:
        checkpoint = "config.json" in listing.files
        raise ModelNotFoundError(
            f"{repository.name} is {'a checkpoint and ' if checkpoint else ''}no artifact: it has no {MANIFEST_NAME}",
            f"make one with: normistral export {repository.name}" if checkpoint else "check the name",
        )
    if listed.size > MAX_MANIFEST_BYTES:
        raise repository.protocol_error(f"has a {MANIFEST_NAME} of {listed.size} bytes")
    raw = b""
    try:
        for block in repository.read(MANIFEST_NAME, listing.commit, 0):
            raw += block
            if len(raw) > listed.size:
                break
        if len(raw) < listed.size:
            raise ConnectionBrokenError("it ended early")
    except ConnectionBrokenError as exc:
        raise DownloadError(f"the connection to {host_of(repository.address)} broke off ({exc})", IT_CONTINUES) from exc
    if listed.digest not in (git_blob_id(len(raw), BytesIO(raw)), hashlib.sha256(raw).hexdigest()):
        raise repository.protocol_error(f"sends another {MANIFEST_NAME} than it lists")
    return raw


def _require_listed(repository: Repository, manifest: Manifest, listing: Listing) -> None:
    """Refuse, before anything large is fetched, a manifest that names what a copy cannot have or the hub has not."""
    taken = {MANIFEST_NAME.lower(), ORIGIN_NAME.lower(), CARD_NAME.lower()}
    if len(manifest.files) > _MAX_FILES:
        raise ArtifactError(f"the manifest of {repository.name} names {len(manifest.files)} files", _NOT_OURS)
    for name, record in manifest.files.items():
        if not _NAME.fullmatch(name) or name.endswith(".") or name.lower() in taken:
            raise ArtifactError(f"the manifest of {repository.name} names a file {name!r}", _NOT_OURS)
        taken.add(name.lower())
        listed = listing.files.get(name)
        if listed is None:
            raise ArtifactError(f"{repository.name} lacks {name}, which its manifest names", _TELL_OWNER)
        if listed.size != record.size or (len(listed.digest) == 64 and listed.digest != record.sha256):
            raise ArtifactError(f"{repository.name} has another {name} than its manifest names", _TELL_OWNER)


_NOT_OURS = "no export writes that: do not use it"
_TELL_OWNER = "tell its owner, or name another revision: OWNER/NAME@REVISION"


def _open_work_folder(work: Path) -> Path:
    if not os.path.lexists(work):
        make_own_folder(work)
    elif not is_own_folder(work):
        raise UsageError(f"{work} is there, and no download of normistral made it", "remove it")
    for part in ("artifact", "partial"):
        if (work / part).is_symlink():
            (work / part).unlink()
        (work / part).mkdir(exist_ok=True)
    return work


def _fetch_all(repository: Repository, listing: Listing, manifest: Manifest, work: Path, progress: Progress) -> None:
    """Fill `work`/artifact with the files of the manifest and nothing else."""
    wanted = {record.sha256 for record in manifest.files.values()}
    for folder, kept in ((work / "artifact", manifest.files.keys()), (work / "partial", wanted)):
        for path in folder.iterdir():  # of another commit, perhaps
            if path.is_dir() and not path.is_symlink():
                remove_own_folder(path)
            elif path.name not in kept or path.is_symlink() or not path.is_file():
                path.unlink()
    files = sorted(manifest.files.items(), key=lambda item: item[1].size)
    with progress.stage("downloading", manifest.total_bytes, "bytes") as stage:
        missing = [item for item in files if not _is_whole(work / "artifact" / item[0], item[1], stage)]
        _require_disk(repository, work, missing)
        for name, record in missing:
            _fetch(repository, listing.commit, name, record, work, stage)


def _is_whole(path: Path, record: FileRecord, stage: Stage) -> bool:
    if not path.is_file() or path.stat().st_size != record.size or sha256_file(path) != record.sha256:
        path.unlink(missing_ok=True)
        return False
    stage.advance(record.size)
    return True


def _require_disk(repository: Repository, work: Path, missing: list[tuple[str, FileRecord]]) -> None:
    needed = 0
    for _, record in missing:
        partial = work / "partial" / record.sha256
        needed += record.size - min(record.size, partial.stat().st_size if partial.is_file() else 0)
    free = free_disk_bytes(work)
    if needed > free:
        raise ResourceError(
            f"the download of {repository.name} needs {format_bytes(needed)} more; {format_bytes(free)} are free in "
            f"{work.parent}",
            "free some space, or point NORMISTRAL_HOME at a larger disk",
        )


def _fetch(repository: Repository, commit: str, name: str, record: FileRecord, work: Path, stage: Stage) -> None:
    """Bring one file."""
    partial = work / "partial" / record.sha256
    with os.fdopen(open_file(partial, os.O_RDWR | os.O_CREAT, 0o666, follow=False), "r+b") as stream:
        file = RemoteFile(record.size, record.sha256)
        whole = FileDownload(repository, commit, name, file, stream, stage).receive()
    if not whole:
        partial.unlink()
        raise DownloadError(
            f"{host_of(repository.address)} sent other bytes of {name} than its manifest names; they were deleted",
            "run the same command again; if it stays wrong, tell its owner, or use another network",
        )
    partial.replace(work / "artifact" / name)


@contextmanager
def _locked(path: Path, name: PublishedName, progress: Progress) -> Iterator[None]:
    """Hold the lock of a copy; another download of it is waited for."""
    with ExitStack() as stack:
        waiting = False
        while True:
            try:
                stack.enter_context(locked(path))
                break
            except BlockingIOError:
                if not waiting:
                    progress.note(f"another process is downloading {name}: waiting for it")
                waiting = True
                time.sleep(_PAUSE_S)
        yield


@contextmanager
def _translate_system_errors(name: PublishedName, root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason, hint = explain(exc)
        if exc.errno in _NO_SPACE:
            raise ResourceError(f"{reason}: {root}, while downloading {name}", f"{hint}; then {IT_CONTINUES}") from exc
        raise DownloadError(f"cannot write to the store {root}: {reason}", hint) from exc
