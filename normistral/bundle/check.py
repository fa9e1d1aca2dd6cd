"""The form of a bundle, and its check: signature, headers, sums. First half of the install.py in every bundle.

`pack.installer_source` puts install.py behind it, so it needs the standard library alone. Both keep to the syntax of
Python 3.6, which python3 still is on some systems: an older Python has to get as far as the line that says so.
"""

import sys

# Without -I, Python looks for modules beside this file first, where anybody may have put a base64.py: nothing but sys,
# which is built in, is imported before that is over. (Not even __future__, for which there would be a file, too.)
if __name__ == "__main__" and not sys.flags.isolated and "posix" in sys.builtin_module_names:
    import posix

    posix.execv(sys.executable, [sys.executable, "-I", *sys.argv])
if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python there is
    sys.exit("error: this needs Python 3.11 or newer\nhint: run it with the python3 that the bundle was made for")

import base64
import hashlib
import json
import re
import subprocess
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAMESPACE = "normistral-bundle"  # of the signature: one made for mail or git is none for a bundle
SUMS, DESCRIPTION, INSTALLER, SBOM = "SHA256SUMS", "bundle.json", "install.py", "sbom.cdx.json"
ARTIFACT, WHEELS, KERNELS = "artifact/", "wheels/", "kernels/"
SCHEMA = 1
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
READ_BYTES = 4 * 2**20

_MAX_TEXT_BYTES = 4 * 2**20  # SHA256SUMS and bundle.json are read into memory
_MAX_SIGNATURE_BYTES = 64 * 2**10
_FIELDS = {
    "schema": int,
    "artifact": str,
    "requirement": str,
    "python": str,
    "machine": str,
    "glibc": str,
    "bytes": int,
}
_GET_AGAIN = "do not use it; copy or get it again"


class InstallError(Exception):
    """Message and hint, one line each."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Member:
    """A file of the archive: where its bytes are, and their SHA-256."""

    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked from its first byte to its last.

    Attributes:
        sha256: of the whole file.
        signer: the name that the signers file has for the key; None if no signature was asked for.
        description: bundle.json.
    """

    path: Path
    sha256: str
    signer: str | None
    members: dict[str, Member]
    description: dict[str, Any]


# The form of the archive; `normistral bundle` writes by the same rules.


def member_header(name: str, size: int) -> bytes:
    """The blocks in front of a file: one, or three if its name has more than 100 bytes.

    Only name and size differ: there are no owners, times, links or folders.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def is_member_name(name: str) -> bool:
    """True for one of four names, or a plain name in one of three folders."""
    for folder in (ARTIFACT, WHEELS, KERNELS):
        if name.startswith(folder):
            plain = name.removeprefix(folder)
            short = len(name.encode(errors="replace")) < BLOCK
            return plain not in ("", ".", "..") and not set(plain) & set("/\\:\0\n\r") and short
    return name in (SUMS, DESCRIPTION, INSTALLER, SBOM)


def sums_line(sha256: str, name: str) -> str:
    """A line of sha256sum."""
    return f"{sha256}  {name}\n"


# Checking


def check_bundle(path: Path, signers: Path | None = None, sha256: str | None = None) -> Bundle:
    """Read the whole bundle once, and give the same bytes to ssh-keygen.

    Args:
        signers: ssh-keygen's allowed_signers file; None asks for no signature. The signature is beside the bundle.
        sha256: what the whole file must have, or None.

    Raises:
        InstallError: it is not whole, or not from whom it should be.
    """
    if not path.is_file():
        raise InstallError(f"there is no file {path}", "give the bundle's file")
    with path.open("rb") as stream:
        verifier = None if signers is None else _Verifier(path.with_name(path.name + ".sig"), signers)
        reader = _Reader(stream, verifier)
        try:
            members, texts = _read_members(reader)
        except InstallError:
            reader.finish()  # a wrong signature or sum explains the rest
            if sha256 is not None:
                _require_sha256(reader, path, sha256)
            raise
        reader.finish()
        if sha256 is not None:
            _require_sha256(reader, path, sha256)
    signer = None if verifier is None else verifier.signer
    return Bundle(path, reader.sha256(), signer, members, _parse_description(texts[DESCRIPTION]))


def _require_sha256(reader: "_Reader", path: Path, sha256: str) -> None:
    if reader.sha256() != sha256.lower():
        raise InstallError(f"{path} has the SHA-256 {reader.sha256()} instead of {sha256}", _GET_AGAIN)


def _read_members(reader: "_Reader") -> tuple[dict[str, Member], dict[str, bytes]]:
    """Every file of the archive, and the text of those that are read here.

    Every byte is accounted for: headers and padding have one possible form, and SHA256SUMS is exactly the list that
    the other files give, in their order.
    """
    members: dict[str, Member] = {}
    texts: dict[str, bytes] = {}
    header = reader.read(BLOCK)
    while any(header):
        name, size = _read_name_and_size(reader, header)
        if name in members:
            raise damaged(f"it holds {name} twice")
        if name in (SUMS, DESCRIPTION) and size > _MAX_TEXT_BYTES:
            raise damaged(f"its {name} is too large")
        offset, digest = reader.position, hashlib.sha256()
        while reader.position < offset + size:
            block = reader.read(min(offset + size - reader.position, READ_BYTES))
            digest.update(block)
            if name in (SUMS, DESCRIPTION):
                texts[name] = texts.get(name, b"") + block
        members[name] = Member(offset, size, digest.hexdigest())
        if any(reader.read(-size % BLOCK)):
            raise damaged(f"there is something behind {name}")
        header = reader.read(BLOCK)
    if header + reader.up_to(BLOCK + 1) != END:
        raise damaged("its end is not where it should be")
    for name in (SUMS, DESCRIPTION, INSTALLER, SBOM):
        if not members.get(name, Member(0, 0, "")).size:
            raise damaged(f"it has no {name}")
    found = "".join(sums_line(member.sha256, name) for name, member in members.items() if name != SUMS).encode()
    if found != texts[SUMS]:
        differing = set(found.splitlines()) ^ set(texts[SUMS].splitlines())
        name = min((line[66:].decode(errors="replace") for line in differing), default=SUMS)
        raise damaged(f"{name} is not as its {SUMS} says")
    return members, texts


def _read_name_and_size(reader: "_Reader", header: bytes) -> tuple[str, int]:
    """Name and size of the next file, whose header has to be as `member_header` writes it."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        name, size = info.name, info.size
        if info.type == tarfile.GNUTYPE_LONGNAME and size <= BLOCK:
            header += reader.read(2 * BLOCK)
            name = header[BLOCK : BLOCK + size - 1].decode()
            size = tarfile.TarInfo.frombuf(header[2 * BLOCK :], "utf-8", "strict").size
        known = size >= 0 and member_header(name, size) == header
    except (tarfile.HeaderError, ValueError, OverflowError) as exc:
        raise damaged("one of its headers is broken") from exc
    if not known or not is_member_name(name):
        raise damaged(f"it holds {name!r} in a way that no bundle does")
    return name, size


def _parse_description(raw: bytes) -> dict[str, Any]:
    try:
        description = json.loads(raw)
        good = all(type(description[name]) is kind for name, kind in _FIELDS.items())
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise damaged(f"its {DESCRIPTION} cannot be read") from exc
    if not good or not re.fullmatch(
        r"[0-9]+\.[0-9]+ [0-9]+\.[0-9]+", f"{description['python']} {description['glibc']}"
    ):
        raise damaged(f"its {DESCRIPTION} cannot be read")
    if description["schema"] != SCHEMA:
        raise InstallError(f"the bundle has schema {description['schema']}", "use the install.py that it holds")
    if not is_member_name(ARTIFACT + description["artifact"]):
        raise damaged(f"{description['artifact']!r} is no name of an artifact")
    return dict(description)


def damaged(what: str) -> InstallError:
    """The error for a bundle that no longer is as it was written."""
    return InstallError(f"the bundle is damaged: {what}", _GET_AGAIN)


class _Reader:
    """Reads a file once from its beginning, hashes it, and hands on what it reads."""

    def __init__(self, stream: BinaryIO, verifier: "_Verifier | None") -> None:
        self._stream, self._verifier, self._digest = stream, verifier, hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        block = self.up_to(size)
        if len(block) != size:
            raise damaged("it ends too early")
        return block

    def up_to(self, size: int) -> bytes:
        """`size` bytes, or what is left."""
        block = self._stream.read(size)
        self._digest.update(block)
        if self._verifier is not None:
            self._verifier.feed(block)
        self.position += len(block)
        return block

    def finish(self) -> None:
        """Read the rest, and have the signature judged."""
        while self.up_to(READ_BYTES):
            pass
        if self._verifier is not None:
            self._verifier.finish()

    def sha256(self) -> str:
        return self._digest.hexdigest()


class _Verifier:
    """ssh-keygen, verifying a signature over what it is fed (PROTOCOL.sshsig of OpenSSH)."""

    def __init__(self, signature: Path, signers: Path) -> None:
        for path in (signature, signers):
            if not path.is_file():
                raise InstallError(f"{path} is missing", "get it from whom the bundle came, by a way that you trust")
        self._signature = signature
        _require_one_spelling(signature)
        found = self._run("find-principals", "-f", signers).communicate()
        self.signer = found[0].decode().partition("\n")[0]
        if not self.signer:
            raise self._wrong(f"is by nobody that {signers} lists")
        self._process = self._run("verify", "-f", signers, "-I", self.signer, "-n", NAMESPACE)

    def feed(self, block: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has seen enough, and says so at the end
            self._process.stdin.write(block)

    def finish(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._wrong(f"by {self.signer} is not of this file")

    def _run(self, task: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        command = ["ssh-keygen", "-Y", task, "-s", self._signature, *arguments]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe if task != "verify" else nowhere, stderr=nowhere)
        except FileNotFoundError as exc:
            raise InstallError(
                "ssh-keygen is not here to check the signature",
                "install OpenSSH's client; or check it on another machine, and give --sha256 the file's sum there",
            ) from exc

    def _wrong(self, what: str) -> InstallError:
        return InstallError(f"the signature {self._signature} {what}", _GET_AGAIN)


def _require_one_spelling(signature: Path) -> None:
    """Base64 as ssh-keygen writes it, and nothing else: it would pass over blanks and what follows the end."""
    raw = signature.read_bytes() if signature.stat().st_size <= _MAX_SIGNATURE_BYTES else b""
    form = rb"-----BEGIN SSH SIGNATURE-----\n((?:[A-Za-z0-9+/=]+\n)+)-----END SSH SIGNATURE-----\n"
    found = re.fullmatch(form, raw)
    text = b"" if found is None else found[1].replace(b"\n", b"")
    try:
        good = text != b"" and base64.b64encode(base64.b64decode(text, validate=True)) == text
    except ValueError:
        good = False
    if not good:
        raise InstallError(f"{signature} is not a signature of ssh-keygen, or was damaged", _GET_AGAIN)
