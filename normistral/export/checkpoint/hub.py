"""Download a checkpoint from the Hugging Face hub, pinned to one commit, every file checked.

huggingface_hub says what there is, and who may have it; its cache, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
work as users know them. The bytes are fetched here: its own download takes names of files from the server's headers, so
that a lying server writes where it likes. No more bytes are taken than the file has, and every file is hashed and
compared with what the hub says of it: the SHA-256 of a large file, the git blob id of a small one. A file with wrong
bytes is deleted. What a broken connection or Ctrl-C leaves behind is picked up by the next run.
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
from typing import Any, BinaryIO, NoReturn

from normistral.errors import CheckpointError, DownloadError, ModelNotFoundError, ResourceError, UsageError
from normistral.export.checkpoint.hub_cache import RepositoryCache, is_commit, is_hash, is_plain_name
from normistral.export.checkpoint.weights import find_weight_files
from normistral.files import explain, open_file
from normistral.progress import Progress, Stage
from normistral.telemetry import silence_telemetry

_ATTEMPTS = 5  # connections in a row that may break without a single new byte
_BLOCK_BYTES = 2**18
_CONNECT_S, _SILENCE_S = 30, 60
_MOST_BYTES = 2**50  # of one file; what says more is lying
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")
_SMALL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,190}\.(json|jinja)|tokenizer\.model")
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole download: its folder in the hub's cache, the commit, and the SHA-256 of every file by name."""

    folder: Path
    revision: str
    hashes: dict[str, str]


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """One file in the hub's listing, checked: a plain name, size in bytes, and the hash that names its blob."""

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
    try:
        commit, files = transport.list_files()
    except _UnreachableError as exc:
        return _open_cached(transport, before_weights, progress, exc)
    small = [file for file in files if _SMALL.fullmatch(file.name)]
    hashes = transport.fetch(small, commit, "Downloading configuration", progress)
    folder = transport.files.folder(commit)
    before_weights(folder)
    hashes |= transport.fetch(_choose_weights(folder, files, repository), commit, "Downloading weights", progress)
    transport.remember(commit)
    return Snapshot(folder, commit, hashes)


class _UnreachableError(Exception):
    """No answer from the hub; the cache may still help. Carries the reason in one line."""


class _ConnectionBrokenError(Exception):
    """A connection ended before all bytes came; the next may bring the rest."""


class _Transport:
    """Requests to the hub about one repository, with errors translated."""

    def __init__(self, repository: str, revision: str, endpoint: str | None, cache: Path) -> None:
        self.repository, self.revision, self.endpoint, self.cache = repository, revision, endpoint, cache
        self.files = RepositoryCache(cache, repository)

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
        if not isinstance(commit, str) or not is_commit(commit):
            raise DownloadError(f"{self._host()} gave no commit for {self.repository}", "check HF_ENDPOINT")
        return commit, self._read_listing(info.siblings or [])

    def _read_listing(self, siblings: list[Any]) -> list[_RemoteFile]:
        """The files that may be wanted; of others nothing is believed or refused."""
        files: dict[str, _RemoteFile] = {}
        for file in siblings:
            name, size = file.rfilename, file.size
            if not is_plain_name(name) or not (_SMALL.fullmatch(name) or _WEIGHTS.fullmatch(name)):
                continue
            etag = file.lfs.sha256 if file.lfs is not None else file.blob_id
            if not is_hash(etag) or type(size) is not int or not 0 <= size <= _MOST_BYTES:
                raise self._protocol_error(f"gives no hash or size of {name} that can be")
            if files.setdefault(name.lower(), _RemoteFile(name, size, etag)).etag != etag:
                raise self._protocol_error(f"lists {name} twice, perhaps in another case")
        return list(files.values())

    def fetch(self, files: list[_RemoteFile], commit: str, title: str, progress: Progress) -> dict[str, str]:
        """Download what is not in the cache, check everything, and return the SHA-256 by name."""
        self._make_cache(commit)
        missing = [file for file in files if not self.files.has(commit, file.name)]
        self._require_disk(missing)
        with progress.stage(title, sum(file.size for file in missing), "bytes") as stage:
            for file in missing:
                self._fetch_one(file, commit, stage)
        hashes = {}
        with progress.stage("Checking the download", sum(file.size for file in files), "bytes") as stage:
            for file in files:
                place = self.files.folder(commit) / file.name
                hashes[file.name] = self.files.verify(place, file.etag, file.size, stage.advance)
        return hashes

    def remember(self, commit: str) -> None:
        """Note in the cache which commit the branch or tag stood for."""
        if self.revision != commit:
            with suppress(OSError):  # the files are there; only the name is not found without the hub
                self.files.remember(self.revision, commit)

    def _fetch_one(self, file: _RemoteFile, commit: str, stage: Stage) -> None:
        from huggingface_hub.utils import WeakFileLock

        blob, partial = self.files.blob(file.etag), self.files.partial(file.etag)
        try:
            with WeakFileLock(self.files.lock(file.etag)):
                if _size(blob) != file.size:
                    blob.unlink(missing_ok=True)
                    with os.fdopen(open_file(partial, os.O_RDWR | os.O_CREAT, 0o666, follow=False), "r+b") as stream:
                        self._receive(file, commit, stream, stage)
                    partial.rename(blob)
                else:
                    stage.advance(file.size)
                self.files.add(commit, file.name, file.etag)
        except OSError as exc:  # of the disk; of the connection it is translated already
            self._translate(exc, file)

    def _receive(self, file: _RemoteFile, commit: str, stream: BinaryIO, stage: Stage) -> None:
        """Append what is missing of a file, over as many connections as it takes."""
        failures = reached = 0

        def report(position: int) -> None:
            nonlocal reached
            stage.advance(max(0, position - reached))
            reached = max(reached, position)

        while True:
            start = stream.seek(0, os.SEEK_END)
            if start > file.size:  # it can never become right
                start = stream.truncate(0)
            report(start)
            if start == file.size:
                return
            try:
                self._receive_from(start, file, commit, stream, report)
                failures = 0
            except _ConnectionBrokenError as exc:
                failures = 1 if stream.tell() > start else failures + 1
                if failures >= _ATTEMPTS:
                    stream.flush()
                    self._translate(exc.__cause__ if isinstance(exc.__cause__, Exception) else exc, file)
            finally:
                stream.flush()

    def _receive_from(
        self, start: int, file: _RemoteFile, commit: str, stream: BinaryIO, report: Callable[[int], None]
    ) -> None:
        """One request; ends with the answer, or with as many bytes as the file has."""
        import requests
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        url = hf_hub_url(self.repository, file.name, revision=commit, endpoint=self.endpoint)
        broken = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
        try:
            with get_session().get(url, headers=headers, stream=True, timeout=(_CONNECT_S, _SILENCE_S)) as response:
                hf_raise_for_status(response)
                if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(
                    f"bytes {start}-"
                ):
                    start = stream.seek(stream.truncate(0))  # it sends the whole file
                left = file.size - start
                for block in response.iter_content(_BLOCK_BYTES):
                    stream.write(block[:left])
                    left -= len(block)
                    if left < 0:
                        raise self._protocol_error(f"sends more bytes of {file.name} than it has")
                    report(file.size - left)
                if left > 0:
                    raise _ConnectionBrokenError from requests.ConnectionError()
        except broken as exc:
            raise _ConnectionBrokenError from exc
        except requests.RequestException as exc:
            self._translate(exc, file)
        except ValueError as exc:  # from the depths of requests: an address that is none
            raise self._protocol_error(f"redirects {file.name} to no address") from exc

    def _protocol_error(self, what: str) -> DownloadError:
        return DownloadError(f"{self._host()} {what}", "check HF_ENDPOINT: what answers there is not as the hub is")

    def _require_disk(self, missing: list[_RemoteFile]) -> None:
        needed = sum(file.size - min(file.size, _size(self.files.partial(file.etag))) for file in missing)
        free = shutil.disk_usage(self.cache).free
        if needed > free:
            raise ResourceError(
                f"the download of {self.repository} needs {needed / 1e9:.1f} GB more, but {self.cache} "
                f"has {free / 1e9:.1f} GB free",
                "free some space, or point HF_HOME at a larger disk",
            )

    def _make_cache(self, commit: str) -> None:
        try:
            self.files.make(commit)
        except OSError as exc:
            raise DownloadError(
                f"cannot write to the cache {self.cache}: {explain(exc)[0]}", "point HF_HOME at a folder you can write"
            ) from exc

    def _host(self) -> str:
        from huggingface_hub import constants

        return self.endpoint or constants.ENDPOINT

    def _translate(self, exc: Exception, file: _RemoteFile | None = None) -> NoReturn:
        """Raise the error of ours that says what to do about one of huggingface_hub's."""
        import requests
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
        if isinstance(exc, requests.exceptions.InvalidSchema | requests.exceptions.InvalidURL):
            raise self._protocol_error(f"redirects {what} to where nothing can be fetched") from exc
        if isinstance(exc, OSError) and exc.errno and not isinstance(exc, requests.RequestException):
            raise DownloadError(
                f"cannot write to the cache {self.cache}: {explain(exc)[0]}", "point HF_HOME at a folder you can write"
            ) from exc
        done = "" if file is None else f" after {_size(self.files.partial(file.etag))} of {file.size} bytes"
        raise DownloadError(
            f"the download of {what} broke off{done} ({type(exc).__name__})",
            "check the connection and run the same command again: it continues",
        ) from exc


def _open_cached(
    transport: _Transport, before_weights: Callable[[Path], None], progress: Progress, reason: Exception
) -> Snapshot:
    """The copy in the cache, when the hub cannot be reached and the copy is whole."""
    hint = "connect to the internet once, or give a local folder; without HF_HUB_OFFLINE the hub is asked"
    commit = transport.files.recall(transport.revision)
    folder = None if commit is None else transport.files.folder(commit)
    if commit is None or folder is None or not (folder / "config.json").exists():
        raise DownloadError(f"{transport.repository} is not in the cache, and {reason}", hint) from reason
    before_weights(folder)
    try:
        weights = find_weight_files(folder).names
    except CheckpointError as exc:
        raise DownloadError(f"the cached copy of {transport.repository} has no weights, and {reason}", hint) from exc
    absent = [name for name in weights if not (folder / name).exists()]
    if absent:
        raise DownloadError(
            f"the cached copy of {transport.repository} lacks {', '.join(absent)}, and {reason}", hint
        ) from reason
    progress.note(f"{reason}: using the cached copy of {transport.repository} at commit {commit[:12]}")
    names = [path.name for path in folder.iterdir() if _SMALL.fullmatch(path.name) and path.exists()]
    names += weights
    total = sum((folder / name).stat().st_size for name in names)
    cached, hashes = transport.files, {}
    with progress.stage("Checking the cached copy", total, "bytes") as stage:
        for name in sorted(names):
            hashes[name] = cached.verify(folder / name, cached.recorded_hash(folder / name), None, stage.advance)
    return Snapshot(folder, commit, hashes)


def _choose_weights(folder: Path, files: list[_RemoteFile], repository: str) -> list[_RemoteFile]:
    """The weight files to fetch, safetensors first; an index already in `folder` says which shards there are."""
    known = {file.name: file for file in files}
    for single in ("model.safetensors", "pytorch_model.bin"):
        if single in known:
            return [known[single]]
        if f"{single}.index.json" in known:
            names = find_weight_files(folder).names
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
