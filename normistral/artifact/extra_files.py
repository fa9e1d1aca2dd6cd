"""Files of an artifact's folder that its manifest does not list: the model card, and where it was downloaded from.

The card is a view of the manifest, for readers: its owner may rewrite it, here or on the hub, and the artifact stays
what it was. Its last line carries the SHA-256 of the rest, so that a card which somebody rewrote is known as theirs
and never deleted or replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import MANIFEST_NAME
from normistral.files import RefusedFileError, read_file

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
        document: Any = json.loads(manifest.read_bytes()) if not manifest.is_symlink() else None
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
