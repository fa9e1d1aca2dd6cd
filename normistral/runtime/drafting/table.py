"""A table of n-grams: for a few tokens the one that mostly follows them, built from text, looked up from a mapped file.

The file is one line of JSON, filled with blanks to a multiple of 64 bytes, and two arrays, little-endian:

    contexts  uint64 [entries]  hashes of 2, 3 or 4 tokens, rising
    next      uint32 [entries]  the token that follows

Two contexts with one hash cost a wrong draft and nothing else. A table belongs to one tokenizer.json, by its SHA-256.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ArtifactError, UsageError
from normistral.files import atomic_write, explain, open_file
from normistral.runtime.drafting.base import Draft
from normistral.runtime.drafting.options import TableOptions

_FORMAT = "normistral draft table 1"
_ALIGNMENT = 64
_LONGEST_HEADER = 4096
_LENGTHS = (4, 3, 2)  # of contexts, in the order in which they are asked
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV-1a, over token ids instead of bytes
_MASK = 2**64 - 1


class NgramTable:
    """Contexts and what follows them.

    Attributes:
        tokenizer_sha256: of the tokenizer.json that made the token ids.
    """

    def __init__(self, contexts: NDArray[np.uint64], following: NDArray[np.uint32], tokenizer_sha256: str) -> None:
        self._contexts, self._following = contexts, following
        self.tokenizer_sha256 = tokenizer_sha256

    def __len__(self) -> int:
        return len(self._contexts)

    def next_token(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """The token after these, and how many of the last ones matched; None if the table does not say."""
        for length in _LENGTHS:
            if len(token_ids) >= length:
                wanted = np.uint64(_hash(token_ids[-length:]))
                place = int(np.searchsorted(self._contexts, wanted))
                if place < len(self._contexts) and self._contexts[place] == wanted:
                    return int(self._following[place]), length
        return None

    @classmethod
    def read(cls, path: Path, tokenizer_sha256: str, vocabulary: int) -> NgramTable:
        """Map a file that `write` made.

        Raises:
            UsageError: there is no such file, it is no table, or it belongs to another tokenizer.
            ArtifactError: it is damaged.
        """
        again = "build it with: normistral draft-table ARTIFACT OUTPUT --text FILE"
        try:
            with os.fdopen(open_file(path), "rb") as file:
                line = file.readline(_LONGEST_HEADER)
                size = os.fstat(file.fileno()).st_size
        except OSError as exc:
            raise UsageError(f"cannot read the draft table {path}: {explain(exc)[0]}", again) from exc
        header = _parse_header(line)
        if header is None:
            raise UsageError(f"{path} is no draft table", again)
        entries = header["entries"]
        if size != len(line) + entries * 12:
            raise ArtifactError(f"the draft table {path} is damaged: {size} bytes for {entries} entries", again)
        if header["tokenizer_sha256"] != tokenizer_sha256:
            raise UsageError(f"the draft table {path} was built with another tokenizer", again)
        contexts = _map(path, np.dtype("<u8"), len(line), entries)
        following = _map(path, np.dtype("<u4"), len(line) + entries * 8, entries)
        if entries and int(following.max()) >= vocabulary:
            raise ArtifactError(f"the draft table {path} is damaged: it has tokens that the model has not", again)
        return cls(contexts, following, tokenizer_sha256)

    def write(self, path: Path) -> None:
        """Write the file, with permissions 0600: it can be read as text.

        Raises:
            OSError: it cannot be written; nothing is left.
        """
        document = {"format": _FORMAT, "entries": len(self), "tokenizer_sha256": self.tokenizer_sha256}
        header = json.dumps(document).encode()
        header += b" " * (-(len(header) + 1) % _ALIGNMENT) + b"\n"
        with atomic_write(path) as file:
            file.write(header)
            file.write(self._contexts.astype("<u8").tobytes())
            file.write(self._following.astype("<u4").tobytes())


class TableDrafter:
    """Drafts from a table, token after token, as long as it has one.

    Args:
        table: made with this model's tokenizer.
        token_ids: the sequence so far.
    """

    def __init__(self, table: NgramTable, token_ids: Sequence[int]) -> None:
        self._table = table
        self._last = list(token_ids[-max(_LENGTHS) :])

    def observe(self, token_id: int) -> None:
        """Keep the last tokens."""
        self._last = [*self._last[1 - max(_LENGTHS) :], token_id]

    def propose(self, most: int) -> Draft | None:
        """What the table says, and what it says after that."""
        token_ids = list(self._last)
        source = ""
        while len(token_ids) < len(self._last) + most and (found := self._table.next_token(token_ids)):
            token_ids.append(found[0])
            source = source or f"table {found[1]}"
        return Draft(token_ids[len(self._last) :], source) if source else None


def build_table(
    texts: Iterable[Sequence[int]], tokenizer_sha256: str, options: TableOptions | None = None
) -> NgramTable:
    """Count what follows 2, 3 and 4 tokens.

    Takes about 60 bytes of memory for each token of the texts.

    Args:
        texts: token ids of each; nothing is counted across their borders.
    """
    options = options or TableOptions()
    arrays = [np.asarray(text, np.uint32) for text in texts]
    parts = [_most_frequent(arrays, length, options) for length in _LENGTHS]
    contexts, following = (np.concatenate(part) for part in zip(*parts, strict=True))
    contexts, first = np.unique(contexts, return_index=True)  # of equal hashes that of the longest context
    return NgramTable(contexts, following[first], tokenizer_sha256)


def _most_frequent(
    texts: list[NDArray[np.uint32]], length: int, options: TableOptions
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """Contexts of one length, and for each the token that follows most often, where that is often enough."""
    long_enough = [text for text in texts if len(text) > length]
    contexts = np.concatenate([np.zeros(0, np.uint64), *(_hash_windows(text, length) for text in long_enough)])
    following = np.concatenate([np.zeros(0, np.uint32), *(text[length:] for text in long_enough)])
    order = np.lexsort((following, contexts))
    contexts, following = contexts[order], following[order]
    starts = _starts(contexts, following)
    pair_counts = np.diff(np.append(starts, len(contexts)))
    contexts, following = contexts[starts], following[starts]  # now one of each pair
    context_starts = _starts(contexts)
    totals = np.add.reduceat(pair_counts, context_starts) if len(contexts) else pair_counts
    most = np.maximum.reduceat(pair_counts, context_starts) if len(contexts) else pair_counts
    owner = np.repeat(np.arange(len(context_starts)), np.diff(np.append(context_starts, len(contexts))))
    best = np.flatnonzero(pair_counts == most[owner])
    best = best[np.unique(owner[best], return_index=True)[1]]  # of equally frequent ones the first
    kept = (most >= options.min_count) & (most >= options.min_share * totals)
    return contexts[best][kept], following[best][kept]


def _starts(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """Where a row of sorted columns differs from the one before."""
    differs = np.ones(len(columns[0]), np.bool_)
    differs[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(differs)


def _hash(token_ids: Sequence[int]) -> int:
    """Of one context, 64 bits."""
    value = _FNV_OFFSET
    for token_id in token_ids:
        value = (value ^ token_id) * _FNV_PRIME & _MASK
    return value


def _hash_windows(text: NDArray[np.uint32], length: int) -> NDArray[np.uint64]:
    """Of the tokens before each that has `length` before it."""
    count = len(text) - length
    values = np.full(count, _FNV_OFFSET, np.uint64)
    for offset in range(length):
        values = (values ^ text[offset : offset + count].astype(np.uint64)) * np.uint64(_FNV_PRIME)  # wraps
    return values


def _parse_header(line: bytes) -> dict[str, Any] | None:
    """The header's fields; None if this is no table."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(header, dict) or header.get("format") != _FORMAT or not line.endswith(b"\n"):
        return None
    entries = header.get("entries")
    sound = isinstance(entries, int) and not isinstance(entries, bool) and entries >= 0
    return header if sound and isinstance(header.get("tokenizer_sha256"), str) else None


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
    if count == 0:
        return np.zeros(0, dtype)  # an empty file part cannot be mapped
    return np.memmap(path, dtype, "r", offset, (count,))
