"""Named prefixes: beginnings of prompts that whoever runs the server wants to be in the KV cache from the start.

They belong to no key. A job of any key begins with one if its prompt begins with all its full blocks, so a key that
tries whether a text is there has to know all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from normistral.errors import NormistralError, SessionError
from normistral.progress import ignore_bytes
from normistral.runtime.engines.block_pool import BLOCK_TOKENS, block_hashes
from normistral.runtime.model import Model
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.sessions import restore_sequence, save_sequence
from normistral.server.backends.base import never

logger = logging.getLogger(__name__)

_OPERATOR = "\0operator"  # the owner of their blocks; no tenant is called so


class NamedPrefix(msgspec.Struct, frozen=True):
    """A prefix that a worker is told to have.

    Attributes:
        token_ids: of the prompts that it begins.
        saved: a file of `Prefix.save`, which has to hold these tokens; None computes them.
        kept: where to keep the KV cache for the next start; None does not.
    """

    name: str
    token_ids: tuple[int, ...]
    saved: str | None = None
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class LoadedPrefix:
    """A prefix in the KV cache; it stays there as long as the sequence.

    Attributes:
        hashes: of its full blocks.
        seconds: that it took.
        restored: it was read from a file.
    """

    name: str
    token_ids: tuple[int, ...]
    sequence: CachedSequence
    hashes: list[bytes]
    seconds: float
    restored: bool

    def describe(self) -> str:
        """Its name, tokens, and where they are from."""
        how = "read from a file" if self.restored else "computed"
        return f"prefix {self.name}: {len(self.token_ids):,} tokens, {how} in {self.seconds:.1f} s"

    def begins(self, token_ids: Sequence[int]) -> bool:
        """Whether tokens begin with all its full blocks."""
        count = len(self.hashes) * BLOCK_TOKENS
        return tuple(token_ids[:count]) == self.token_ids[:count]


def load_prefixes(model: Model, prefixes: Iterable[NamedPrefix]) -> list[LoadedPrefix]:
    """Restore prefixes from their files, or compute them.

    Raises:
        NormistralError: a saved one cannot be used, or the engine failed.
    """
    return [_load(model, prefix) for prefix in prefixes]


def shared_hashes(prefixes: Iterable[LoadedPrefix], tenant: str, token_ids: Sequence[int]) -> list[bytes]:
    """Hashes of the full blocks of a tenant's tokens: of the longest prefix that they begin with, then the tenant's.

    A block's hash is of all tokens before it too, so the tenant's go on where the prefix ends.
    """
    hashes = list(block_hashes(tenant, token_ids))
    for prefix in sorted(prefixes, key=lambda one: -len(one.hashes)):
        if prefix.begins(token_ids):
            return prefix.hashes + hashes[len(prefix.hashes) :]
    return hashes


def _load(model: Model, prefix: NamedPrefix) -> LoadedPrefix:
    began = time.perf_counter()
    sequence = None
    if prefix.saved is not None:
        sequence = _restore(model, prefix, prefix.saved)
    elif prefix.kept is not None and Path(prefix.kept).is_file():
        with suppress(NormistralError):  # of another text, artifact or settings, or damaged: it is computed anew
            sequence = _restore(model, prefix, prefix.kept)
    restored = sequence is not None
    if sequence is None:
        sequence = model.create_sequence(lambda: ())
        sequence.prefill(prefix.token_ids, never)
        if prefix.kept is not None:
            _keep(model, prefix, sequence, Path(prefix.kept))
    hashes = list(block_hashes(_OPERATOR, prefix.token_ids))
    return LoadedPrefix(prefix.name, prefix.token_ids, sequence, hashes, time.perf_counter() - began, restored)


def _restore(model: Model, prefix: NamedPrefix, path: str) -> CachedSequence:
    header, sequence = restore_sequence(model, path, "prefix", ignore_bytes)
    if tuple(header.token_ids) != prefix.token_ids:
        sequence.close()
        raise SessionError(f"{path} holds another prefix than when the server was started", "start it anew")
    return sequence


def _keep(model: Model, prefix: NamedPrefix, sequence: CachedSequence, path: Path) -> None:
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        save_sequence(model, sequence, path, ignore_bytes, kind="prefix", prefix=list(prefix.token_ids))
    except (OSError, NormistralError) as error:
        reason = error.message if isinstance(error, NormistralError) else error.strerror
        logger.warning("the prefix %s is not kept for the next start: %s", prefix.name, reason)
