"""Download a checkpoint from the Hugging Face hub, pinned to one commit, every file checked.

huggingface_hub is the transport (its cache, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as users know them).
It compares sizes only; here every file is also hashed and compared with what the hub says of it: the SHA-256 of a
large file, the git blob id of a small one. A file with wrong bytes is deleted. What a broken connection or Ctrl-C
leaves behind is picked up by the next run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from normistral.errors import CheckpointError, DownloadError, ModelNotFoundError, ResourceError, UsageError
from normistral.export.progress import Progress, Stage
from normistral.export.weights import weight_files
from normistral.manifest import sha256_file
from normistral.quiet import silence_telemetry

_ATTEMPTS = 5  # connections in a row that may break without a single new byte
_POLL_S = 0.2
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")
_SMALL = re.compile(r"[^/\\]+\.(json|jinja)|tokenizer\.model")
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole download: its folder in the hub's cache, the commit, and the SHA-256 of every file by name."""

    folder: Path
    revision: str
    hashes: dict[str, str]


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """What the hub says of one file; `etag` is its name among the cache's blobs."""

    name: str
    size: int
    etag: str


def download(
    repository: str,
    revision: str | None,
    *,
    before_weights: Callable[[Path], None],
    progress: Progress,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Snapshot:
    """Bring the files that an export needs into the hub's cache and check them.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; None is "main".
        before_weights: called with the folder once all small files are there; what it raises stops the download.
        endpoint, cache: for tests; by default as huggingface_hub reads them from the environment.

    Raises:
        ModelNotFoundError: no such repository or revision.
        DownloadError: the hub cannot be reached, refuses, or sent wrong bytes.
        ResourceError: the disk is full, or will be.
    """
    _require_revision(revision)
    silence_telemetry()
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) if cache is None else cache
    transport = _Transport(repository, revision or "main", endpoint, cache)
    with _plain_transport():
        try:
            commit, files = transport.list_files()
        except _UnreachableError as exc:
            return _open_cached(transport, before_weights, progress, exc)
        small = [file for file in files if _SMALL.fullmatch(file.name)]
        hashes = transport.fetch(small, commit, "Downloading configuration", progress)
        folder = transport.folder(commit)
        before_weights(folder)
        hashes |= transport.fetch(_choose_weights(folder, files, repository), commit, "Downloading weights", progress)
    transport.remember(commit)
    return Snapshot(folder, commit, hashes)


class _UnreachableError(Exception):
    """No answer from the hub; the cache may still help. Carries the reason in one line."""


class _Transport:
    """huggingface_hub's calls for one repository, with its errors translated."""

    def __init__(self, repository: str, revision: str, endpoint: str | None, cache: Path) -> None:
        self.repository, self.revision, self.endpoint, self.cache = repository, revision, endpoint, cache
        self.storage = cache / ("models--" + repository.replace("/", "--"))

    def folder(self, commit: str) -> Path:
        return self.storage / "snapshots" / commit

    def list_files(self) -> tuple[str, list[_RemoteFile]]:
        """The commit that the revision stands for, and the files of its top folder."""
        import requests
        from huggingface_hub import HfApi
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            info = HfApi(endpoint=self.endpoint).model_info(
                self.repository, revision=self.revision, files_metadata=True, timeout=30
            )
        except OfflineModeIsEnabled as exc:
            raise _UnreachableError("HF_HUB_OFFLINE is set") from exc
        except (requests.ConnectionError, requests.Timeout) as exc:
            raise _UnreachableError(f"no connection to {self._host()}") from exc
        except Exception as exc:
            self._translate(exc)
        commit = info.sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise DownloadError(f"{self._host()} gave no commit for {self.repository}", "check HF_ENDPOINT")
        files = []
        for file in info.siblings or []:
            etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
            if "/" not in file.rfilename and "\\" not in file.rfilename and file.size is not None and etag:
                files.append(_RemoteFile(file.rfilename, file.size, etag))
        return commit, files

    def fetch(self, files: list[_RemoteFile], commit: str, title: str, progress: Progress) -> dict[str, str]:
        """Download what is not in the cache, check everything, and return the SHA-256 by name."""
        folder = self.folder(commit)
        missing = [file for file in files if not (folder / file.name).exists()]
        self._require_disk(missing)
        with progress.stage(title, sum(file.size for file in missing), "bytes") as stage:
            for file in missing:
                with self._watched(file, stage):
                    self._fetch_one(file, commit)
        hashes = {}
        with progress.stage("Checking the download", sum(file.size for file in files), "bytes") as stage:
            for file in files:
                hashes[file.name] = verify(folder / file.name, file.etag, file.size, stage.advance)
        return hashes

    def remember(self, commit: str) -> None:
        """Note in the cache which commit the branch or tag stood for, so that it is found without the hub."""
        if self.revision != commit:
            reference = self.storage / "refs" / self.revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)

    def cached_commit(self) -> str | None:
        """The commit that the cache knows for the revision."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        try:
            commit = (self.storage / "refs" / self.revision).read_text().strip()
        except OSError:
            return None
        return commit if _COMMIT.fullmatch(commit) else None

    def _fetch_one(self, file: _RemoteFile, commit: str) -> None:
        import requests
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        partial = self._partial(file)
        failures = 0
        while True:
            before = _size(partial)
            try:
                hf_hub_download(
                    self.repository, file.name, revision=commit, endpoint=self.endpoint, cache_dir=self.cache
                )
                return
            except (requests.RequestException, LocalEntryNotFoundError, OSError) as exc:
                if _size(partial) > file.size:  # it can never become right
                    partial.unlink(missing_ok=True)
                failures = 1 if _size(partial) > before else failures + 1
                if not _is_transient(exc) or failures >= _ATTEMPTS:
                    self._translate(exc, file)
            except Exception as exc:
                self._translate(exc, file)

    def _partial(self, file: _RemoteFile) -> Path:
        return self.storage / "blobs" / f"{file.etag}.incomplete"

    @contextmanager
    def _watched(self, file: _RemoteFile, stage: Stage) -> Iterator[None]:
        """Report the growth of the partial file: huggingface_hub offers no callback for bytes."""
        done, ended = 0, threading.Event()

        def report(size: int) -> None:
            nonlocal done
            stage.advance(max(0, size - done))
            done = max(done, size)

        def poll() -> None:
            while not ended.wait(_POLL_S):
                report(_size(self._partial(file)))

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            ended.set()
            thread.join()
            raise
        ended.set()
        thread.join()
        report(file.size)

    def _require_disk(self, missing: list[_RemoteFile]) -> None:
        needed = sum(file.size - min(file.size, _size(self._partial(file))) for file in missing)
        self._make_cache()
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise ResourceError(
                f"the download of {self.repository} needs {needed / 1e9:.1f} GB more, but {self.cache} "
                f"has {free / 1e9:.1f} GB free",
                "free some space, or point HF_HOME at a larger disk",
            )

    def _make_cache(self) -> None:
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise DownloadError(
                f"cannot write to the cache {self.cache}: {exc.strerror}", "point HF_HOME at a folder you can write"
            ) from exc

    def _host(self) -> str:
        from huggingface_hub import constants

        return self.endpoint or constants.ENDPOINT

    def _translate(self, exc: Exception, file: _RemoteFile | None = None) -> NoReturn:
        """Raise the error of ours that says what to do about one of huggingface_hub's."""
        from huggingface_hub import errors

        if isinstance(exc, errors.LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception):
            exc = exc.__cause__  # it stands for whatever kept the hub from answering
        what = f"{self.repository}{'' if file is None else '/' + file.name}"
        log_in = "log in with: huggingface-cli login, or set HF_TOKEN"
        response = getattr(exc, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(exc, errors.GatedRepoError):
            raise DownloadError(
                f"{self.repository} is gated: its owner asks for your consent first",
                f"accept the terms at {self._host()}/{self.repository}, then {log_in}",
            ) from exc
        if isinstance(exc, errors.RevisionNotFoundError):
            raise ModelNotFoundError(
                f"{self.repository} has no revision {self.revision}", "check --revision: a branch, a tag or a commit"
            ) from exc
        if isinstance(exc, errors.RepositoryNotFoundError):
            raise ModelNotFoundError(
                f"no repository {self.repository} at {self._host()}, or it is private",
                f"check the spelling; for a private one {log_in}",
            ) from exc
        if isinstance(exc, errors.HFValidationError):
            raise UsageError(f"{self.repository!r} is no hub id", "a hub id looks like: owner/name") from exc
        if status in (401, 403):
            raise DownloadError(f"{self._host()} refused {what} (HTTP {status})", log_in) from exc
        if status is not None:
            raise DownloadError(f"{self._host()} answered HTTP {status} for {what}", "try again later") from exc
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk filled up while downloading {what} to {self.cache}",
                "free some space and run the same command again: it continues",
            ) from exc
        if isinstance(exc, PermissionError):
            raise DownloadError(
                f"cannot write to the cache {self.cache}: {exc.strerror}", "point HF_HOME at a folder you can write"
            ) from exc
        done = "" if file is None else f" after {_size(self._partial(file))} of {file.size} bytes"
        raise DownloadError(
            f"the download of {what} broke off{done} ({type(exc).__name__})",
            "check the connection and run the same command again: it continues",
        ) from exc


def verify(path: Path, etag: str, size: int | None, on_bytes: Callable[[int], None]) -> str:
    """Hash a file of the cache and compare it with its etag: 64 hex digits are a SHA-256, 40 a git blob id.

    Returns:
        its SHA-256.

    Raises:
        DownloadError: size or bytes are wrong; the file is deleted, so that the next run fetches it again.
    """
    actual = path.stat().st_size
    if size is not None and actual != size:
        _discard(path)
        raise DownloadError(f"{path.name} has {actual} bytes instead of {size}; it was deleted", _FETCH_AGAIN)
    sha256 = sha256_file(path, on_bytes)
    found = sha256 if len(etag) == 64 else _git_blob_id(path) if len(etag) == 40 else etag
    if found != etag:
        _discard(path)
        raise DownloadError(
            f"{path.name} has the right size but wrong bytes (hash {found[:12]}…, the hub says {etag[:12]}…); "
            "it was deleted",
            _FETCH_AGAIN,
        )
    return sha256


_FETCH_AGAIN = "run the same command again to fetch it anew; if it stays wrong, a proxy in between changes files"


def _open_cached(
    transport: _Transport, before_weights: Callable[[Path], None], progress: Progress, reason: Exception
) -> Snapshot:
    """The copy in the cache, when the hub cannot be reached and the copy is whole."""
    hint = "connect to the internet once, or give a local folder; without HF_HUB_OFFLINE the hub is asked"
    commit = transport.cached_commit()
    folder = None if commit is None else transport.folder(commit)
    if commit is None or folder is None or not (folder / "config.json").exists():
        raise DownloadError(f"{transport.repository} is not in the cache, and {reason}", hint) from reason
    before_weights(folder)
    try:
        weights, _ = weight_files(folder)
    except CheckpointError as exc:
        raise DownloadError(f"the cached copy of {transport.repository} has no weights, and {reason}", hint) from exc
    absent = [name for name in weights if not (folder / name).exists()]
    if absent:
        raise DownloadError(
            f"the cached copy of {transport.repository} lacks {', '.join(absent)}, and {reason}", hint
        ) from reason
    progress.note(f"{reason}: using the cached copy of {transport.repository} at commit {commit[:12]}")
    names = [path.name for path in folder.iterdir() if _SMALL.fullmatch(path.name) and path.exists()] + weights
    total = sum((folder / name).stat().st_size for name in names)
    with progress.stage("Checking the cached copy", total, "bytes") as stage:
        hashes = {
            name: verify(folder / name, (folder / name).resolve().name, None, stage.advance) for name in sorted(names)
        }
    return Snapshot(folder, commit, hashes)


def _choose_weights(folder: Path, files: list[_RemoteFile], repository: str) -> list[_RemoteFile]:
    """The weight files to fetch, safetensors first; an index already in `folder` says which shards there are."""
    known = {file.name: file for file in files}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in known:
            return [known[single]]
        if f"{single}.index.json" in known:
            names, _ = weight_files(folder)
            absent = [name for name in names if name not in known or not _WEIGHTS.fullmatch(name)]
            if absent:
                raise CheckpointError(
                    f"{repository} lacks {', '.join(absent[:3])}, which its index names",
                    "tell the repository's owner, or give another --revision",
                )
            return [known[name] for name in names]
    raise CheckpointError(
        f"{repository} has no weights in safetensors or torch format",
        "for a GGUF repository, download the .gguf file and give its path",
    )


def _require_revision(revision: str | None) -> None:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"{revision!r} is no revision", "give a branch, a tag or a commit")


@contextmanager
def _plain_transport() -> Iterator[None]:
    """huggingface_hub without its progress bars (progress goes through ours) and without Xet.

    Xet's transfers cannot be resumed from a partial file, and leave a cache and logs of their own in HF_HOME; plain
    HTTP does both right. HF_HUB_DISABLE_XET=0 in the environment turns it on again.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars = "huggingface_hub.http_get"
    had_bars, had_xet_off = not are_progress_bars_disabled(bars), constants.HF_HUB_DISABLE_XET
    disable_progress_bars(bars)
    if "HF_HUB_DISABLE_XET" not in os.environ:
        constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = had_xet_off
        if had_bars:
            enable_progress_bars(bars)


def _is_transient(exc: Exception) -> bool:
    """Whether the connection broke, so that the same request may go on where it stopped."""
    import requests

    cause = exc.__cause__ if exc.__cause__ is not None else exc
    kinds = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(cause, kinds) or "Consistency check failed" in str(exc)


def _git_blob_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _discard(path: Path) -> None:
    """Delete a cached file: the blob that the link points to, and the link."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
