"""Download a checkpoint from the Hugging Face hub, pinned to one commit, every file checked.

Files lie in the hub's cache as huggingface_hub has it, under its locks:

    blobs/HASH             a file's bytes; the SHA-256 of a large file, the git blob id of a small one
    blobs/HASH.incomplete  what there is of it so far
    snapshots/COMMIT/NAME  a link to a blob
    refs/REVISION          the commit that a branch or tag stood for

They are fetched by `artifact.hub`, because huggingface_hub's own download takes names of files from the server's
headers, so that a lying server writes where it likes. Names on disk are made of what was checked here: hashes are hex
of the right length, commits too, file names plain. Nothing is written or deleted through a link that leads out of the
repository's folder. No more bytes are taken than a file has, and every file is hashed and compared with what the hub
says of it. One with wrong bytes is deleted. What a broken connection or Ctrl-C leaves is picked up by the next run.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from normistral.artifact.extra_files import parse_published
from normistral.artifact.hub import (
    IT_CONTINUES,
    LOG_IN,
    FileDownload,
    Listing,
    RemoteFile,
    Repository,
    endpoint,
    git_blob_id,
    hub_cache,
    is_commit,
    is_digest,
    is_offline,
)
from normistral.errors import CheckpointError, DownloadError, ModelNotFoundError, ResourceError, UsageError
from normistral.export.checkpoint.chat_templates import FURTHER_TEMPLATES
from normistral.export.checkpoint.files import ADAPTER_WEIGHTS, MODEL_AND_ADAPTER, recognise_folder
from normistral.export.checkpoint.weights import find_weight_files
from normistral.files import atomic_write, explain, open_file, read_file, sha256_file
from normistral.progress import OnBytes, Progress, Stage

FETCH_AGAIN = "run the same command again to fetch it anew; if it stays wrong, a proxy in between changes files"

# Plain names, and the one folder that a checkpoint may have in it.
_NAME = re.compile(rf"({FURTHER_TEMPLATES}/)?[A-Za-z0-9_][A-Za-z0-9._-]{{0,199}}")


def is_plain_name(text: object) -> bool:
    """Whether a snapshot may have a file of this name."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None and not text.endswith(".")


class RepositoryCache:
    """The folder of one repository.

    Args:
        cache: of the hub; it need not exist.
        repository: "owner/name".
    """

    def __init__(self, cache: Path, repository: str) -> None:
        self._name = "models--" + repository.replace("/", "--")
        self._storage, self._locks = cache / self._name, cache / ".locks" / self._name

    def folder(self, commit: str) -> Path:
        """Folder of a commit's files; it need not exist."""
        assert is_commit(commit)
        return self._storage / "snapshots" / commit

    def blob(self, etag: str) -> Path:
        """File of the bytes with this hash; it need not exist."""
        assert is_digest(etag)
        return self._storage / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """File of the bytes during their download."""
        return self.blob(etag).with_name(f"{etag}.incomplete")

    def lock(self, etag: str) -> Path:
        """Lock file that huggingface_hub holds while it writes the blob."""
        return self._locks / f"{self.blob(etag).name}.lock"

    def make(self, commit: str) -> None:
        """Make the folders, or see that they are not elsewhere.

        Raises:
            OSError: they cannot be made.
            DownloadError: one is a link out of the repository's folder.
        """
        for folder in (self._storage / "blobs", self._storage / "refs", self.folder(commit), self._locks):
            self._make_folder(folder, self._locks if folder == self._locks else self._storage)

    def _make_folder(self, folder: Path, root: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not _real(folder).is_relative_to(_real(root)):
            raise DownloadError(f"{folder} is a link that leads out of the cache", "remove that link")

    def add(self, commit: str, name: str, etag: str) -> None:
        """Give a whole blob its name in a commit."""
        assert is_plain_name(name)
        place, blob = self.folder(commit) / name, self.blob(etag)
        self._make_folder(place.parent, self._storage)
        place.unlink(missing_ok=True)  # a link to nothing, or to other bytes
        try:
            place.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
        except (OSError, NotImplementedError):  # a file system without links
            blob.rename(place)

    def has(self, commit: str, name: str) -> bool:
        """Whether a file is there."""
        return (self.folder(commit) / name).exists()

    def remember(self, revision: str, commit: str) -> None:
        """Note which commit a branch or tag stood for, so that it is found without the hub."""
        reference = self._reference(revision)
        reference.parent.mkdir(parents=True, exist_ok=True)
        if _real(reference.parent).is_relative_to(_real(self._storage)):
            with atomic_write(reference, private=False) as file:
                file.write(commit.encode())

    def recall(self, revision: str) -> str | None:
        """The commit that is noted for a branch or tag; None if there is none."""
        if is_commit(revision):
            return revision
        try:
            commit = read_file(self._reference(revision), 100).decode("ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return commit if is_commit(commit) else None

    def recorded_hash(self, place: Path) -> str:
        """The expected hash of a snapshot's file: its blob's name.

        Raises:
            DownloadError: it is not one of the blobs.
        """
        blob = _real(place)
        if blob.parent != _real(self._storage / "blobs") or not is_digest(blob.name):
            raise DownloadError(f"{place.name} of the cached copy is none of its blobs", f"remove {place.parent}")
        return blob.name

    def verify(self, place: Path, etag: str, size: int | None, on_bytes: OnBytes) -> str:
        """Hash a file of a snapshot and compare it with its hash: 64 hex digits are a SHA-256, 40 a git blob id.

        Returns:
            its SHA-256.

        Raises:
            DownloadError: size or bytes are wrong, or it cannot be read; what is wrong is deleted, so that the next run
                fetches it again.
        """
        assert is_digest(etag)
        try:
            actual = place.stat().st_size
            if not _real(place).is_relative_to(_real(self._storage)):
                raise self._discarded(place, f"{place.name} is a link that leads out of the cache")
            if size is not None and actual != size:
                raise self._discarded(place, f"{place.name} has {actual} bytes instead of {size}")
            found = sha256 = sha256_file(place, on_bytes)
            if len(etag) == 40:
                with place.open("rb") as stream:
                    found = git_blob_id(actual, stream)
        except OSError as exc:
            reason, hint = explain(exc)
            raise DownloadError(f"cannot read {place}: {reason}", hint) from exc
        if found != etag:
            raise self._discarded(
                place,
                f"{place.name} has the right size but wrong bytes (hash {found[:12]}…, the hub says {etag[:12]}…)",
            )
        return sha256

    def _discarded(self, place: Path, why: str) -> DownloadError:
        """Delete a file of a snapshot, and its bytes if they are among the blobs."""
        blob = _real(place)
        place.unlink(missing_ok=True)
        if blob.parent == _real(self._storage / "blobs"):
            blob.unlink(missing_ok=True)
        return DownloadError(f"{why}; it was deleted", FETCH_AGAIN)

    def _reference(self, revision: str) -> Path:
        return self._storage / "refs" / revision


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")
_STEM = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,190}"
_SMALL = re.compile(rf"{_STEM}\.json|({FURTHER_TEMPLATES}/)?{_STEM}\.jinja|tokenizer\.model")
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole download: its folder in the hub's cache, the commit, and the SHA-256 of every file by name."""

    folder: Path
    revision: str
    hashes: dict[str, str]


def download(
    repository: str,
    revision: str | None,
    *,
    before_weights: Callable[[Path], None],
    progress: Progress,
) -> Snapshot:
    """Bring the files that an export needs into the hub's cache and check them.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; None is "main".
        before_weights: called with the folder once all small files are there; what it raises stops the download.

    Raises:
        ModelNotFoundError: no such repository or revision.
        DownloadError: the hub cannot be reached, refuses, or sent wrong bytes.
        ResourceError: the disk is full, or will be.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{revision!r} is no revision", "give a branch, a tag or a commit")
    if parse_published(repository) is None:
        raise UsageError(f"{repository!r} is no hub id", "a hub id looks like: owner/name")
    revision, cache = revision or "main", hub_cache()
    files = RepositoryCache(cache, repository)
    try:
        if is_offline():
            raise _UnreachableError("HF_HUB_OFFLINE is set")
        hub = _CheckpointRepository(repository, endpoint(), revision)
        listing = hub.list_files(revision)
    except _UnreachableError as exc:
        return _open_cached(files, repository, revision, before_weights, progress, exc)
    wanted = _choose_files(hub, listing)
    if (
        "adapter_config.json" in wanted
        and any(map(_WEIGHTS.fullmatch, wanted))
        and listing.files.keys() & set(ADAPTER_WEIGHTS)
    ):
        raise CheckpointError(f"{repository} is {MODEL_AND_ADAPTER.what}", MODEL_AND_ADAPTER.hint)
    transfer = _Transfer(hub, listing.commit, files, cache, progress)
    hashes = transfer.fetch({n: f for n, f in wanted.items() if _SMALL.fullmatch(n)}, "Downloading configuration")
    folder = files.folder(listing.commit)
    before_weights(folder)
    hashes |= transfer.fetch(_choose_weights(folder, wanted, repository), "Downloading weights")
    if revision != listing.commit:
        with suppress(OSError):  # the files are there; only the name is not found without the hub
            files.remember(revision, listing.commit)
    return Snapshot(folder, listing.commit, hashes)


class _UnreachableError(Exception):
    """No answer from the hub; the cache may still help. Carries the reason in one line."""


class _CheckpointRepository(Repository):
    """A repository whose errors have hints for `export`."""

    def __init__(self, name: str, address: str, revision: str) -> None:
        super().__init__(name, address)
        self._revision = revision

    @property
    def host(self) -> str:
        return self.address

    def no_connection(self, exc: Exception) -> Exception:
        return _UnreachableError(f"no connection to {self.host}")

    def no_revision(self) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"{self.name} has no revision {self._revision}", "check --revision: a branch, a tag or a commit"
        )

    def no_repository(self) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"no repository {self.name} at {self.host}, or it is private",
            f"check the spelling; for a private one {LOG_IN}",
        )


def _choose_files(hub: Repository, listing: Listing) -> dict[str, RemoteFile]:
    """The checkpoint's files in the listing; other files are not checked."""
    wanted: dict[str, RemoteFile] = {}
    for name, file in listing.files.items():
        if not is_plain_name(name) or not (_SMALL.fullmatch(name) or _WEIGHTS.fullmatch(name)):
            continue
        if file is None:
            raise hub.protocol_error(f"gives no hash or size of {name} that can be")
        if any(name.lower() == other.lower() for other in wanted):
            raise hub.protocol_error(f"lists {name} twice, perhaps in another case")
        wanted[name] = file
    return wanted


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One commit of a repository, on its way into the cache."""

    hub: Repository
    commit: str
    files: RepositoryCache
    cache: Path
    progress: Progress

    def fetch(self, files: dict[str, RemoteFile], title: str) -> dict[str, str]:
        """Download what is not in the cache, check everything, and return the SHA-256 by name."""
        try:
            self.files.make(self.commit)
        except OSError as exc:
            raise self._cannot_write(exc) from exc
        missing = {name: file for name, file in files.items() if not self.files.has(self.commit, name)}
        self._require_disk(missing)
        with self.progress.stage(title, sum(file.size for file in missing.values()), "bytes") as stage:
            for name, file in missing.items():
                self._fetch_one(name, file, stage)
        hashes = {}
        with self.progress.stage("Checking the download", sum(file.size for file in files.values()), "bytes") as stage:
            for name, file in files.items():
                place = self.files.folder(self.commit) / name
                hashes[name] = self.files.verify(place, file.digest, file.size, stage.advance)
        return hashes

    def _fetch_one(self, name: str, file: RemoteFile, stage: Stage) -> None:
        from huggingface_hub.utils import WeakFileLock

        blob, partial = self.files.blob(file.digest), self.files.partial(file.digest)
        try:
            with WeakFileLock(self.files.lock(file.digest)):
                if _size(blob) != file.size:
                    blob.unlink(missing_ok=True)
                    with os.fdopen(open_file(partial, os.O_RDWR | os.O_CREAT, 0o666, follow=False), "r+b") as stream:
                        FileDownload(self.hub, self.commit, name, file, stream, stage).receive()
                    partial.rename(blob)  # whether its bytes are right, `verify` says
                else:
                    stage.advance(file.size)
                self.files.add(self.commit, name, file.digest)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"the disk filled up while downloading {self.hub.name}/{name} to {self.cache}",
                    f"free some space and {IT_CONTINUES}",
                ) from exc
            raise self._cannot_write(exc) from exc

    def _require_disk(self, missing: dict[str, RemoteFile]) -> None:
        needed = sum(file.size - min(file.size, _size(self.files.partial(file.digest))) for file in missing.values())
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise ResourceError(
                f"the download of {self.hub.name} needs {needed / 1e9:.1f} GB more, but {self.cache} "
                f"has {free / 1e9:.1f} GB free",
                "free some space, or point HF_HOME at a larger disk",
            )

    def _cannot_write(self, exc: OSError) -> DownloadError:
        return DownloadError(
            f"cannot write to the cache {self.cache}: {explain(exc)[0]}", "point HF_HOME at a folder you can write"
        )


def _open_cached(
    files: RepositoryCache,
    repository: str,
    revision: str,
    before_weights: Callable[[Path], None],
    progress: Progress,
    reason: Exception,
) -> Snapshot:
    """The copy in the cache, when the hub cannot be reached and the copy is whole."""
    hint = "connect to the internet once, or give a local folder; without HF_HUB_OFFLINE the hub is asked"
    commit = files.recall(revision)
    folder = None if commit is None else files.folder(commit)
    if commit is None or folder is None or not (folder / "config.json").exists():
        raise DownloadError(f"{repository} is not in the cache, and {reason}", hint) from reason
    before_weights(folder)
    try:
        weights = find_weight_files(folder).names
    except CheckpointError as exc:
        raise DownloadError(f"the cached copy of {repository} has no weights, and {reason}", hint) from exc
    absent = [name for name in weights if not (folder / name).exists()]
    if absent:
        raise DownloadError(
            f"the cached copy of {repository} lacks {', '.join(absent)}, and {reason}", hint
        ) from reason
    progress.note(f"{reason}: using the cached copy of {repository} at commit {commit[:12]}")
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    names = [name for name in there if _SMALL.fullmatch(name) and (folder / name).exists()]
    names += weights
    total = sum((folder / name).stat().st_size for name in names)
    hashes = {}
    with progress.stage("Checking the cached copy", total, "bytes") as stage:
        for name in sorted(names):
            hashes[name] = files.verify(folder / name, files.recorded_hash(folder / name), None, stage.advance)
    return Snapshot(folder, commit, hashes)


def _choose_weights(folder: Path, known: dict[str, RemoteFile], repository: str) -> dict[str, RemoteFile]:
    """The weight files to fetch, safetensors first; an index already in `folder` says which shards there are."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in known:
            return {single: known[single]}
        if f"{single}.index.json" in known:
            names = find_weight_files(folder).names
            absent = [name for name in names if name not in known or not _WEIGHTS.fullmatch(name)]
            if absent:
                raise CheckpointError(
                    f"{repository} lacks {', '.join(absent[:3])}, which its index names",
                    "tell the repository's owner, or give another --revision",
                )
            return {name: known[name] for name in names}
    if (found := recognise_folder(folder)) is not None:
        raise CheckpointError(f"{repository} is {found.what}", found.hint)
    raise CheckpointError(
        f"{repository} has no weights in safetensors or torch format",
        "for a GGUF repository, download the .gguf file and give its path",
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
