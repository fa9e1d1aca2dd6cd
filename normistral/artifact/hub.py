"""Reads one repository of a hub over HTTP, with nothing but the standard library.

It asks only when it is called. HF_ENDPOINT, HF_TOKEN (or the file that `huggingface-cli login` writes), HF_HOME,
HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to huggingface_hub, REQUESTS_CA_BUNDLE what it means to requests.
The token goes to the endpoint alone, never to where that redirects, and never over plain HTTP to another machine.
Nothing that a hub answers becomes a name on disk.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeGuard

from normistral.errors import DownloadError, ModelNotFoundError, UsageError
from normistral.files import read_file
from normistral.progress import Stage

DEFAULT_ENDPOINT = "https://huggingface.co"
LOG_IN = "log in with: huggingface-cli login, or set HF_TOKEN"
IT_CONTINUES = "run the same command again: it continues"
_ATTEMPTS = 5  # connections in a row that may break without a single new byte
_BLOCK_BYTES = 2**18
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_BYTES = 2**50  # of a file; what says more is lying
_MAX_LISTING_BYTES = 16 * 2**20
_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 4096
_PAUSE_S = 0.5  # before a connection is tried again
_REDIRECTS = (301, 302, 303, 307, 308)
_SILENCE_S = 60  # of a connection; then it counts as broken
_YES = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads them


class ConnectionBrokenError(Exception):
    """A connection could not be made, or ended before all bytes came; another may bring the rest."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: size in bytes; SHA-256 of a large file, the git blob id of a small one."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository has at one commit. Names are the hub's and not checked; None for an impossible size or hash."""

    commit: str
    files: dict[str, RemoteFile | None]


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public hub.

    Raises:
        UsageError: it is no address.
    """
    address = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username is not None or not address.isprintable() or " " in address:
        raise UsageError("HF_ENDPOINT is no address of a hub", f"such as {DEFAULT_ENDPOINT}")
    return address


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids connections."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _YES


def host_of(address: str) -> str:
    """Host, and port if it is not the usual one, of an endpoint."""
    return urllib.parse.urlsplit(address).netloc


def may_carry_token(address: str) -> bool:
    """Whether nobody on the way can read what is sent there: HTTPS, or this very machine and no proxy before it."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "https":
        return True
    proxied = "http" in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.netloc)
    return parts.hostname in ("127.0.0.1", "::1", "localhost") and not proxied


def is_commit(text: object) -> TypeGuard[str]:
    """Whether it is a commit's full id."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_digest(text: object) -> TypeGuard[str]:
    """Whether it is a SHA-256 or a git blob id, in lower-case hex."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def find_token() -> str | None:
    """The user's token for the hub, from the environment or the file of the login; None without."""
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _YES:
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token if token.isascii() and token.isprintable() else None
    try:
        file = Path(os.environ.get("HF_TOKEN_PATH") or _hub_home() / "token").expanduser()
        token = read_file(file, _MAX_TOKEN_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None
    return token if token.isprintable() and token else None


def hub_cache() -> Path:
    """Where huggingface_hub keeps downloads."""
    return Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub").expanduser()


def _hub_home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface")


def git_blob_id(size: int, stream: BufferedReader | BytesIO) -> str:
    """Name of `size` bytes in git, by which a hub lists small files."""
    return hashlib.file_digest(stream, lambda: _new_digest(40, size)).hexdigest()


def _new_digest(digits: int, size: int) -> hashlib._Hash:
    """Of a file of this size: SHA-256 for 64 hex digits, git's blob id for 40."""
    return hashlib.sha256() if digits == 64 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class Repository:
    """One repository of models.

    Args:
        name: "owner/name", checked.
        address: of the hub.

    Raises:
        DownloadError: HF_HUB_OFFLINE is set.
    """

    def __init__(self, name: str, address: str) -> None:
        if is_offline():
            raise DownloadError(f"{name} is not on this machine, and HF_HUB_OFFLINE is set", "unset it to fetch it")
        self.name, self.address = name, address
        self._token = find_token() if may_carry_token(address) else None
        self._opener = _make_opener()

    @property
    def host(self) -> str:
        """The hub in messages."""
        return host_of(self.address)

    def list_files(self, revision: str) -> Listing:
        """What there is at a branch, tag or commit.

        Raises:
            ModelNotFoundError: no such repository or revision.
            DownloadError: no connection, or a refusal, or no answer of a hub.
        """
        path = f"/api/models/{self.name}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        try:
            with self._open(path, 0) as response:
                raw = response.read(_MAX_LISTING_BYTES + 1)
                if response.length and len(raw) <= _MAX_LISTING_BYTES:
                    raise ConnectionBrokenError("it ended early")
        except ConnectionBrokenError as exc:
            raise self.no_connection(exc) from exc
        if len(raw) > _MAX_LISTING_BYTES:
            raise self.protocol_error("lists more than a model has")
        try:
            answer = json.loads(raw)
            commit, siblings = answer["sha"], answer["siblings"]
            files = {one["rfilename"]: _remote_file(one) for one in siblings}
            good = is_commit(commit) and len(files) == len(siblings)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
            raise self.protocol_error("gives no list of files that can be read") from exc
        if not good:
            raise self.protocol_error("gives no commit, or lists a file twice")
        return Listing(commit, files)

    def read(self, name: str, commit: str, start: int) -> Generator[bytes, None, None]:
        """The bytes of a file from `start` on, in blocks.

        Raises:
            PartialUnsupportedError: the hub sends the whole file, or another part.
            ConnectionBrokenError: it ended in between.
            ModelNotFoundError, DownloadError: as `list_files`.
        """
        path = f"/{self.name}/resolve/{commit}/{urllib.parse.quote(name)}"
        with self._open(path, start, retried=True) as response:
            part = response.headers.get("Content-Range", "")
            if start and not (response.status == 206 and part.startswith(f"bytes {start}-")):
                raise PartialUnsupportedError
            while block := response.read1(_BLOCK_BYTES):
                yield block

    def protocol_error(self, what: str) -> DownloadError:
        """The error for an answer that no hub would give."""
        return DownloadError(f"{self.host} {what}", "check HF_ENDPOINT: what answers there is not as the hub is")

    @contextmanager
    def _open(self, path: str, start: int, *, retried: bool = False) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request, after redirects: a few, never from HTTPS to HTTP, nor to anything but HTTP.

        urllib follows them too, but it reads the redirecting answer to its end first, which need not come.

        Args:
            retried: the caller tries again, so that a failure of the server counts as a broken connection.

        Raises:
            ConnectionBrokenError: here, or while the answer is read.
        """
        address = first = self.address + path
        for _ in range(_MAX_REDIRECTS + 1):
            try:
                response = self._opener.open(self._request(address, start), timeout=_SILENCE_S)
            except urllib.error.HTTPError as exc:
                exc.close()
                if exc.code >= 500 and retried:
                    raise self._broken(address, f"HTTP {exc.code}") from exc
                if exc.code not in _REDIRECTS:
                    self._refused(exc, address)
                address = self._redirected(address, exc.headers.get("Location", ""))
                continue
            except (ValueError, http.client.InvalidURL) as exc:  # an address that is none
                if address == first:  # `exc` may tell the password of a proxy
                    raise UsageError(
                        f"{self.host} cannot be asked: its address, or a proxy's, is none",
                        "check HF_ENDPOINT, HTTPS_PROXY and HTTP_PROXY",
                    ) from None
                raise self.protocol_error("redirects to no address") from exc
            except (OSError, http.client.HTTPException) as exc:
                raise self._broken(address, _reason(exc)) from exc
            try:
                with response:
                    yield response
            except (OSError, http.client.HTTPException) as exc:
                raise self._broken(address, _reason(exc)) from exc
            return
        raise self.protocol_error("redirects again and again")

    def _request(self, address: str, start: int) -> urllib.request.Request:
        request = urllib.request.Request(address)
        request.add_header("Accept-Encoding", "identity")
        request.add_header("User-Agent", "normistral")
        if start:
            request.add_header("Range", f"bytes={start}-")
        if self._token is not None and _origin(address) == _origin(self.address):
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        return request

    def _broken(self, address: str, reason: str) -> ConnectionBrokenError:
        """The error of a connection: which host it was to, if the hub had redirected there."""
        host = host_of(address)
        return ConnectionBrokenError(reason if host == host_of(self.address) else f"{host}: {reason}")

    def _redirected(self, address: str, location: str) -> str:
        try:
            following = urllib.parse.urljoin(address, location)
            scheme = urllib.parse.urlsplit(following).scheme
        except ValueError as exc:
            raise self.protocol_error("redirects to no address") from exc
        if scheme not in ("http", "https") or (scheme == "http" and address.startswith("https:")):
            raise self.protocol_error("redirects to where nothing is fetched from")
        return following

    def no_connection(self, exc: Exception) -> Exception:
        """The error where the hub cannot be asked for its list."""
        return DownloadError(
            f"no connection to {self.host} ({_reason(exc)}), and {self.name} is not on this machine",
            "connect to the internet once; after that it needs none",
        )

    def no_revision(self) -> ModelNotFoundError:
        """The error where the repository does not have the revision."""
        return ModelNotFoundError(
            f"{self.name} has no such revision at {self.host}", "name a branch, a tag or a commit after the @"
        )

    def no_repository(self) -> ModelNotFoundError:
        """The error where there is no such repository, or where it is not shown."""
        return ModelNotFoundError(
            f"there is no {self.name} here or at {self.host}, or it is private",
            f"check the spelling; for a private one {LOG_IN}",
        )

    def _refused(self, exc: urllib.error.HTTPError, address: str) -> NoReturn:
        code, host = exc.headers.get("X-Error-Code", ""), host_of(address)
        if not code and host != host_of(self.address):  # no hub, but a store of files, or a filter in between
            raise DownloadError(
                f"{host}, where {self.host} redirects to, answered HTTP {exc.code} for {self.name}",
                "see whether this network lets it through; otherwise try again later",
            ) from exc
        if code == "RevisionNotFound":
            raise self.no_revision() from exc
        if code == "EntryNotFound":
            raise self.protocol_error("does not have a file that it lists") from exc
        if code == "GatedRepo":
            raise DownloadError(
                f"{self.name} is gated: its owner asks for your consent first",
                f"accept the terms at {self.address}/{self.name}, then {LOG_IN}",
            ) from exc
        if exc.code == 404 or code == "RepoNotFound":
            raise self.no_repository() from exc
        if exc.code in (401, 403):
            raise DownloadError(f"{self.host} refused {self.name} (HTTP {exc.code})", LOG_IN) from exc
        raise DownloadError(f"{self.host} answered HTTP {exc.code} for {self.name}", "try again later") from exc


class PartialUnsupportedError(Exception):
    """The hub does not send the rest of a file alone: begin anew."""


class FileDownload:
    """A file of a repository that comes in over as many connections as it takes.

    Args:
        stream: holds what there is of it, open for reading and writing at its start.
        stage: advanced by bytes that were never there before.
    """

    def __init__(
        self, repository: Repository, commit: str, name: str, file: RemoteFile, stream: BinaryIO, stage: Stage
    ) -> None:
        self._repository, self._commit, self._name, self._file = repository, commit, name, file
        self._stream, self._stage = stream, stage
        self._digest = _new_digest(len(file.digest), file.size)
        self._reported = 0
        while block := stream.read(2**20):
            self._digest.update(block)
        if stream.tell() > file.size:  # it can never become right
            self._begin_anew()
        self._was_resumed = stream.tell() > 0
        self._report()

    def receive(self) -> bool:
        """Take in what is missing; whether the whole has the right hash.

        What an earlier run left may have been spoilt since, by a power cut for instance: then it is fetched anew.

        Raises:
            DownloadError: no connection brings more, or one brings too much.
        """
        if not self._receive() and self._was_resumed:
            self._begin_anew()
            self._receive()
        os.fsync(self._stream.fileno())
        return self._digest.hexdigest() == self._file.digest

    def _receive(self) -> bool:
        failures, furthest = 0, self._stream.tell()
        while self._stream.tell() < self._file.size:
            try:
                self._receive_part()
                why = "it ended early"
            except PartialUnsupportedError:
                self._begin_anew()
                why = "the hub does not send parts"
            except ConnectionBrokenError as exc:
                why = str(exc)
            if self._stream.tell() >= self._file.size:
                break
            failures = 0 if self._stream.tell() > furthest else failures + 1
            furthest = max(furthest, self._stream.tell())
            if failures >= _ATTEMPTS:
                reached = f"{self._stream.tell()} of {self._file.size} bytes"
                raise DownloadError(
                    f"the download of {self._name} broke off after {reached} ({why})",
                    f"check the connection and {IT_CONTINUES}",
                )
            time.sleep(_PAUSE_S * failures)
        return self._digest.hexdigest() == self._file.digest

    def _receive_part(self) -> None:
        """Append what one connection brings, and no more than the file has."""
        with closing(self._repository.read(self._name, self._commit, self._stream.tell())) as blocks:
            try:
                for block in blocks:
                    left = self._file.size - self._stream.tell()
                    self._stream.write(block[:left])
                    self._digest.update(block[:left])
                    self._report()
                    if len(block) > left:
                        raise self._repository.protocol_error(f"sends more bytes of {self._name} than it has")
            finally:
                self._stream.flush()

    def _begin_anew(self) -> None:
        self._stream.seek(self._stream.truncate(0))
        self._digest = _new_digest(len(self._file.digest), self._file.size)
        self._was_resumed = False

    def _report(self) -> None:
        self._stage.advance(max(0, self._stream.tell() - self._reported))
        self._reported = max(self._reported, self._stream.tell())


def _make_opener() -> urllib.request.OpenerDirector:
    """For HTTP alone, and without urllib's own redirects: those are `Repository`'s."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=_trust()),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _trust() -> ssl.SSLContext:
    """Certificates of the system and of certifi where it is installed, or those of REQUESTS_CA_BUNDLE alone."""
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    if bundle:
        try:
            is_folder = Path(bundle).is_dir()
            return ssl.create_default_context(
                cafile=None if is_folder else bundle, capath=bundle if is_folder else None
            )
        except OSError as exc:
            raise UsageError(
                f"REQUESTS_CA_BUNDLE is {bundle}, which cannot be read: {exc.strerror or exc}",
                "name a file of certificates in PEM, or unset it",
            ) from exc
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _origin(address: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(address)
    return parts.scheme, parts.netloc


def _remote_file(entry: dict[str, Any]) -> RemoteFile | None:
    """None for one whose size or hash the hub does not give."""
    large = entry.get("lfs")
    digest = entry.get("blobId") if large is None else large["sha256"]
    size = entry.get("size")
    if type(size) is not int or not 0 <= size <= _MAX_BYTES:
        return None
    return RemoteFile(size, digest) if is_digest(digest) else None


def _reason(exc: Exception) -> str:
    """Why there is no connection, in a few words."""
    reason = getattr(exc, "reason", None) or exc
    if isinstance(reason, TimeoutError):
        return "no answer"
    if isinstance(reason, OSError):
        return reason.strerror or str(reason) or type(reason).__name__
    if isinstance(reason, str):
        return reason
    return str(exc) if isinstance(exc, ConnectionBrokenError) else type(exc).__name__
