"""Who asks: API keys, compared in constant time and never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from normistral.errors import UsageError
from normistral.serving.errors import ApiError
from normistral.text_input import read_text_file

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "NORMISTRAL_API_KEYS"
ANONYMOUS = "anonymous"  # the one tenant of a server without keys
_KEY_FILE = "it is a text file with a key on each line"
_SHORTEST = 16  # characters; what `openssl rand -hex 8` gives


class Keys:
    """The keys that are let in; with none of them, everybody is.

    Args:
        names: tenant by key. A tenant with several keys has one queue and one cache.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in (names or {}).items()]

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, authorization: str | None) -> str:
        """Whose request this is.

        Args:
            authorization: the header, as `Bearer KEY`.

        Raises:
            ApiError: 401.
        """
        if not self:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "this server wants an API key",
                "send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
        digest = _digest(key.strip())
        found = [tenant for known, tenant in self._tenants if hmac.compare_digest(known, digest)]  # all are compared
        if not found:
            raise ApiError(401, "the API key is not known here", headers={"WWW-Authenticate": "Bearer"})
        return found[0]


def read_keys(file: Path | None, environ: Mapping[str, str] = os.environ) -> Keys:
    """Keys of a file, or else those in NORMISTRAL_API_KEYS.

    The file has a key on each line, and after a blank the name of whom it belongs to; # begins a comment. The variable
    has such entries with commas between.

    Raises:
        UsageError: the file cannot be read, or a key is short, comes twice, or holds what no header can.
    """
    if file is None:
        entries, where = environ.get(KEYS_VARIABLE, "").split(","), KEYS_VARIABLE
    else:
        entries, where = _read_lines(file), str(file)
    names: dict[str, str] = {}
    for entry in entries:
        key, _, name = entry.partition("#")[0].strip().partition(" ")
        if not key:
            continue
        if key in names:
            raise UsageError(f"{where} has one key twice", "leave one of them out")
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable():
            raise UsageError(
                f"{where} has a key that is shorter than {_SHORTEST} characters or not plain ASCII",
                "make one with: openssl rand -hex 24",
            )
        names[key] = name.strip() or f"key-{_digest(key).hex()[:8]}"
    if file is not None and not names:
        raise UsageError(f"{where} has no keys", "write one on each line")
    return Keys(names)


def _read_lines(file: Path) -> list[str]:
    try:
        mode = file.stat().st_mode
    except OSError as exc:
        raise UsageError(f"cannot read the keys in {file}: {exc.strerror}", _KEY_FILE) from exc
    lines = read_text_file(file, _KEY_FILE).splitlines()
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s can be read by others: chmod 600 it", file)
    return lines


def _digest(key: str) -> bytes:
    """All of one length, so that comparing tells nothing of theirs."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
