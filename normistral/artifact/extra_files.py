"""Files of an artifact's folder that its manifest does not list: the model card, and where it was downloaded from.

The card is a view of the manifest, for readers: its owner may rewrite it, here or on the hub, and the artifact stays
what it was. Its last line carries the SHA-256 of the rest, so that a card which somebody rewrote is known as theirs
and never deleted or replaced.

Names of published artifacts:

    OWNER/NAME              the copy in the store; before there is one, what the main branch has
    OWNER/NAME@REVISION     of a branch, a tag or a commit

A copy stays what it is: no name is looked up again once its copy is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from normistral.artifact.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from normistral.files import RefusedFileError, atomic_write, read_file

CARD_NAME = "README.md"
ORIGIN_NAME = "normistral-published.json"
MAX_CARD_BYTES = 2**20
_SEAL = re.compile(rb"<!-- made from normistral\.json; SHA-256 of what stands above: ([0-9a-f]{64}) -->\n")


def seal_card(text: str) -> bytes:
    """A card with the last line that tells whether somebody changed it."""
    raw = text.encode()
    digest = hashlib.sha256(raw).hexdigest()
    return raw + f"<!-- made from normistral.json; SHA-256 of what stands above: {digest} -->\n".encode()


def is_sealed(card: bytes) -> bool:
    """Whether a card is as `seal_card` gave it."""
    found = _SEAL.search(card, max(0, card.rfind(b"\n<!--")))
    if found is None or found.end() != len(card):
        return False
    return hashlib.sha256(card[: found.start()]).hexdigest().encode() == found[1]


def read_card(folder: Path) -> bytes | None:
    """The card of an artifact; None without one.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than a card can be. A link is not followed: a card
            is passed on, and it may lead to something that is not.
    """
    card = folder / CARD_NAME
    if card.is_symlink():
        raise RefusedFileError(card, "it is a symbolic link", "put the card itself there")
    try:
        return read_file(card, MAX_CARD_BYTES)
    except FileNotFoundError:
        return None


def find_foreign_files(folder: Path) -> list[str] | None:
    """Files and links below an artifact folder that nothing of ours wrote, by name.

    A damaged manifest still says which files an export wrote, as long as it is JSON.

    Returns:
        None for a folder without a manifest that lists files: no export made it.
    """
    manifest = folder / MANIFEST_NAME
    try:
        document: Any = json.loads(read_file(manifest, MAX_MANIFEST_BYTES)) if not manifest.is_symlink() else None
        ours = {MANIFEST_NAME, *document["files"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    ours |= {name for name in (CARD_NAME, ORIGIN_NAME) if _is_ours(folder / name)}
    present = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in present} - ours)


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        raw = read_file(path, MAX_CARD_BYTES)
    except OSError:
        return False
    return path.name == ORIGIN_NAME or is_sealed(raw)


HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_MAX_BYTES = 2**16
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


class PublishedName(NamedTuple):
    """OWNER/NAME, with a revision or None."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")

    @property
    def folder_name(self) -> str:
        """Name of its copy in the store. No hub has a double hyphen in a name."""
        return str(self).replace("/", "--")


@dataclass(frozen=True, slots=True)
class Repeat:
    """A comparison with the checkpoint that was made on this machine.

    Attributes:
        reference: as it was named.
        kl_nats: mean KL divergence of a token.
        top1_agreement: share of tokens with the same first choice.
        date: when, as YYYY-MM-DD.
    """

    reference: str
    kl_nats: float
    top1_agreement: float
    tokens: int
    date: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a copy came from.

    Attributes:
        endpoint: address of the hub.
        revision: that was asked for; None is the main branch.
        commit: that it is.
        date: of the download, as YYYY-MM-DD.
        repeat: what `eval` found here; None before.
    """

    endpoint: str
    repository: str
    revision: str | None
    commit: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40}$")]
    date: str
    repeat: Repeat | None = None


def parse_published(name: str) -> PublishedName | None:
    """The published artifact that a name can mean; None for any other name."""
    repository, at, revision = name.partition("@")
    if repository.lower().endswith(".gguf"):  # a path with an error in it
        return None
    if not HUB_ID.fullmatch(repository) or {"..", "--"} & {repository[i : i + 2] for i in range(len(repository))}:
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return PublishedName(repository, revision or None)


def find_copy(root: Path, name: PublishedName) -> Path | None:
    """The copy of a published artifact in a store; None without."""
    named = root / name.folder_name
    if _is_copy(named, name) is not None:
        return named
    if name.revision is not None and _COMMIT.fullmatch(name.revision):  # perhaps it is what the main branch had
        main = name._replace(revision=None)
        origin = _is_copy(root / main.folder_name, main)
        if origin is not None and origin.commit.startswith(name.revision):
            return root / main.folder_name
    return None


def read_origin(folder: Path) -> Origin | None:
    """Where an artifact was downloaded from; None for one that was not."""
    try:
        return msgspec.json.decode(read_file(folder / ORIGIN_NAME, _MAX_BYTES), type=Origin)
    except (OSError, ValueError, RecursionError):
        return None


def write_origin(folder: Path, origin: Origin) -> None:
    """Write the record into the folder of a copy; raises OSError."""
    described: dict[str, Any] = msgspec.to_builtins(origin)
    with atomic_write(folder / ORIGIN_NAME, private=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(described), indent=2) + b"\n")


def _is_copy(folder: Path, name: PublishedName) -> Origin | None:
    try:
        if not (folder / MANIFEST_NAME).is_file():
            return None
    except OSError:
        return None
    origin = read_origin(folder)
    same = origin is not None and origin.repository.lower() == name.repository.lower()
    return origin if same else None
