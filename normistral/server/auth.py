"""Authentication by API key: comparison in constant time; keys are never logged or stored."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from normistral.errors import UsageError
from normistral.server.errors import ApiError
from normistral.text_input import decode_text

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "NORMISTRAL_API_KEYS"
ANONYMOUS = "anonymous"  # the one tenant of a server without keys
_MOST_BYTES = 2**20  # of a file with keys
_SHORTEST = 16  # characters; what `openssl rand -hex 8` gives


class Keys:
    """Accepted API keys; an empty set accepts every request.

    Args:
        names: tenant by key. A tenant with several keys has one queue and one cache.
    """

    def __init__(self, names: Mapping[str, str] | None = None) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in (names or {}).items()]

    def __len__(self) -> int:
        return len(self._tenants)

    def tenant(self, authorization: str | None) -> str:
        """Tenant of a request.

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
    """Read keys from a file, or from NORMISTRAL_API_KEYS where `file` is None.

    The file has a key on each line, and after a blank the name of whom it belongs to; a line that begins with # is a
    comment. The variable has such entries with commas between, and no comments.

    Raises:
        UsageError: the file cannot be read, or a key is short, comes twice, or holds what no header can.
    """
    if file is None:
        entries, where = environ.get(KEYS_VARIABLE, "").split(","), KEYS_VARIABLE
    else:
        entries, where = [line for line in _read_lines(file) if not line.lstrip().startswith("#")], str(file)
    names: dict[str, str] = {}
    for entry in entries:
        key, _, name = entry.strip().partition(" ")
        if not key:
            continue
        if key in names:
            raise UsageError(f"{where} has one key twice", "leave one of them out")
        if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or key.startswith("#"):
            raise UsageError(
                f"{where} has a key that is shorter than {_SHORTEST} characters, not plain ASCII, or begins with #",
                "make one with: openssl rand -hex 24",
            )
        if name.lstrip().startswith("#"):
            raise UsageError(f"{where} has a comment behind a key", "write it on a line of its own")
        names[key] = name.strip() or f"key-{_digest(key).hex()[:8]}"
    if file is not None and not names:
        raise UsageError(f"{where} has no keys", "write one on each line")
    return Keys(names)


def _read_lines(file: Path) -> list[str]:
    """Read the lines of a regular file of at most 1 MiB; refuses FIFOs and devices without blocking."""
    hint = "it is a text file with a key on each line"
    try:
        # A FIFO without a writer would keep us waiting.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"cannot read the keys in {file}: it is no regular file", hint)
            raw = stream.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise UsageError(f"cannot read the keys in {file}: it has more than {_MOST_BYTES} bytes", hint)
        lines = decode_text(raw, str(file)).splitlines()
    except OSError as exc:
        raise UsageError(f"cannot read the keys in {file}: {exc.strerror}", hint) from exc
    except ValueError as exc:
        raise UsageError(f"cannot read the keys in {str(file)!r}: no file has that name", hint) from exc
    if os.name == "posix":
        if status.st_mode & stat.S_IWOTH:
            raise UsageError(f"everybody may write keys into {file}", f"chmod 600 {file}")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("%s can be read by others: chmod 600 it", file)
    return lines


def _digest(key: str) -> bytes:
    """SHA-256 of a key: equal lengths, so that the comparison leaks no length."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
