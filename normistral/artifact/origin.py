"""Names of published artifacts, and the record in a downloaded copy that says where it came from.

    OWNER/NAME              the copy in the store; before there is one, what the main branch has
    OWNER/NAME@REVISION     of a branch, a tag or a commit

A copy stays what it is: no name is looked up again once its copy is there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from normistral.artifact.extra_files import ORIGIN_NAME
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.files import atomic_write, read_file

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
