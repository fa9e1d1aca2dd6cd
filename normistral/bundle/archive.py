"""Writes the archive: a tar file with one possible form, of which `install.py` knows the rules and checks each byte.

Weights do not compress, so nothing is compressed: it is written and read as a stream, and standard tools open it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from normistral.bundle.install import BLOCK, END, SUMS, is_member_name, member_header, sums_line
from normistral.errors import ArtifactError, UsageError
from normistral.progress import OnBytes, ignore_bytes

_READ_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file to be: its name in the archive, what it must hold, and where that is."""

    name: str
    size: int
    sha256: str
    source: Path | bytes

    @classmethod
    def of_bytes(cls, name: str, content: bytes) -> Entry:
        """An entry with this content."""
        return cls(name, len(content), hashlib.sha256(content).hexdigest(), content)


def with_sums(entries: list[Entry]) -> list[Entry]:
    """The entries, and before them SHA256SUMS, which lists them.

    Raises:
        UsageError: a name that no archive may hold.
    """
    for entry in entries:
        if not is_member_name(entry.name):
            raise UsageError(f"a bundle cannot hold a file of the name {entry.name!r}", "rename it")
    sums = "".join(sums_line(entry.sha256, entry.name) for entry in entries)
    return [Entry.of_bytes(SUMS, sums.encode()), *entries]


def archive_bytes(entries: list[Entry]) -> int:
    """Size of the archive."""
    return sum(len(member_header(e.name, e.size)) + e.size + -e.size % BLOCK for e in entries) + len(END)


def write_archive(stream: BinaryIO, entries: list[Entry], on_bytes: OnBytes = ignore_bytes) -> str:
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
                f"{entry.source if isinstance(entry.source, Path) else entry.name} is not as its sum says",
                "export the model again, or copy the artifact again",
            )
        write(bytes(-entry.size % BLOCK))
    write(END)
    return whole.hexdigest()


def _blocks(source: Path | bytes) -> Iterator[bytes]:
    with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            yield block
