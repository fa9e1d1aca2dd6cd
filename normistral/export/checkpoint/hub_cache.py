"""One repository's folder in the Hugging Face hub's cache, as huggingface_hub lays it out.

    blobs/HASH             a file's bytes; the SHA-256 of a large file, the git blob id of a small one
    blobs/HASH.incomplete  what there is of it so far
    snapshots/COMMIT/NAME  a link to a blob
    refs/REVISION          the commit that a branch or tag stood for

Names on disk are made of what was checked here, and never of what a hub answers: hashes are hex of the right length,
commits too, file names plain. Nothing is written or deleted through a link that leads out of this folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from normistral.artifact.hub import git_blob_id
from normistral.errors import DownloadError
from normistral.files import atomic_write, explain, read_file, sha256_file
from normistral.progress import OnBytes

FETCH_AGAIN = "run the same command again to fetch it anew; if it stays wrong, a proxy in between changes files"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


def is_commit(text: object) -> bool:
    """Whether it is a commit's full id."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_hash(text: object) -> bool:
    """Whether it can name a blob: a SHA-256 or a git blob id in lower-case hex."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


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
        assert is_hash(etag)
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
            folder.mkdir(parents=True, exist_ok=True)
            root = self._locks if folder == self._locks else self._storage
            if not _real(folder).is_relative_to(_real(root)):
                raise DownloadError(f"{folder} is a link that leads out of the cache", "remove that link")

    def add(self, commit: str, name: str, etag: str) -> None:
        """Give a whole blob its name in a commit."""
        assert is_plain_name(name)
        place, blob = self.folder(commit) / name, self.blob(etag)
        place.unlink(missing_ok=True)  # a link to nothing, or to other bytes
        try:
            place.symlink_to(Path("..", "..", "blobs", blob.name))
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
        if blob.parent != _real(self._storage / "blobs") or not is_hash(blob.name):
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
        assert is_hash(etag)
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
