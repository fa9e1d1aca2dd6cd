"""The archive of a bundle, and its signature.

A tar file with one possible form; `check.py` holds the rules and checks each byte. Weights do not compress, so
nothing is compressed: it is written and read as a stream, and standard tools open it. Signatures are detached, made by
`ssh-keygen -Y sign`; anybody can check them with `ssh-keygen -Y verify`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from normistral.bundle.check import BLOCK, END, NAMESPACE, SUMS, is_member_name, member_header, sums_line
from normistral.errors import EXPORT_AGAIN, ArtifactError, MissingExtraError, NormistralError, UsageError, first_line
from normistral.progress import OnBytes, ignore_bytes

SUFFIX = ".sig"
_READ_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """A file to be: its name in the archive, what it must hold, and where that is."""

    name: str
    size: int
    sha256: str
    source: Path | bytes

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> ArchiveEntry:
        """An entry with this content."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content)


def with_sums(entries: list[ArchiveEntry]) -> list[ArchiveEntry]:
    """The entries, and before them SHA256SUMS, which lists them.

    Raises:
        UsageError: a name that no archive may hold.
    """
    for entry in entries:
        if not is_member_name(entry.name):
            raise UsageError(f"a bundle cannot hold a file of the name {entry.name!r}", "rename it")
    sums = "".join(sums_line(entry.sha256, entry.name) for entry in entries)
    return [ArchiveEntry.of_bytes(SUMS, sums.encode()), *entries]


def archive_bytes(entries: list[ArchiveEntry]) -> int:
    """Size of the archive."""
    return sum(len(member_header(e.name, e.size)) + e.size + -e.size % BLOCK for e in entries) + len(END)


def write_archive(stream: BinaryIO, entries: list[ArchiveEntry], on_bytes: OnBytes = ignore_bytes) -> str:
    """Write the archive, comparing each file with its sum on the way.

    Returns:
        SHA-256 of the whole.

    Raises:
        ArtifactError: a file is not what its entry says.
    """
    whole = hashlib.sha256()

    def write(block: bytes) -> None:
        whole.update(block)
        stream.write(block)

    for entry in entries:
        write(member_header(entry.name, entry.size))
        digest, written = hashlib.sha256(), 0
        for block in _blocks(entry.source):
            digest.update(block)
            written += len(block)
            write(block)
            on_bytes(len(block))
        if written != entry.size or digest.hexdigest() != entry.sha256:
            raise ArtifactError(
                f"{entry.source if isinstance(entry.source, Path) else entry.name} is not as its sum says", EXPORT_AGAIN
            )
        write(bytes(-entry.size % BLOCK))
    write(END)
    return whole.hexdigest()


def _blocks(source: Path | bytes) -> Iterator[bytes]:
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            yield block


def require_key(key: Path) -> str:
    """The key's fingerprint, asked before the long work; the passphrase is not needed for it.

    Raises:
        UsageError: it is no key.
        MissingExtraError: there is no ssh-keygen.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {key}", "make one with: ssh-keygen -t ed25519 -f KEY")
    done = _ssh_keygen(["-l", "-f", str(key)], None)
    if done.returncode != 0:
        raise UsageError(f"{key} is not a key of ssh-keygen", "make one with: ssh-keygen -t ed25519 -f KEY")
    return done.stdout.decode(errors="replace").split()[1]


def sign(stream: BinaryIO, key: Path) -> bytes:
    """The signature of everything in a file that is open for reading; ssh-keygen asks for a passphrase on the terminal.

    Raises:
        NormistralError: the key cannot sign.
    """
    stream.flush()
    os.lseek(stream.fileno(), 0, os.SEEK_SET)
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], stream)
    if done.returncode != 0 or not done.stdout:
        reason = first_line(Exception(done.stderr.decode(errors="replace")))
        raise NormistralError(f"{key} could not sign: {reason}", "nothing was written; give a private key")
    return done.stdout


def _ssh_keygen(arguments: list[str], stdin: BinaryIO | None) -> subprocess.CompletedProcess[bytes]:
    given = subprocess.DEVNULL if stdin is None else stdin
    try:
        return subprocess.run(["ssh-keygen", *arguments], stdin=given, capture_output=True, check=False)
    except FileNotFoundError as exc:
        raise MissingExtraError("ssh-keygen is not installed, which signs", "install OpenSSH's client") from exc
