"""A token sequence and the KV cache that holds its beginning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from normistral.errors import ClosedError
from normistral.runtime.engines.base import CacheTensor, Engine, Logits
from normistral.runtime.interpreter_exit import InterruptSafeLock, computing
from normistral.runtime.speculative.draft_length import Acceptance

WORTH_COPYING = 128  # tokens; computing so many takes seconds at 7B, copying the longest cache a second at most.
# And fewer is what unrelated conversations have in common: BOS, a short system message, a template's own words.


class SavedTokens(NamedTuple):
    """The KV cache of a sequence.

    Attributes:
        token_ids: what it holds.
        canonical: of these, the canonical beginning.
        tensors: each is read when it is asked for.
    """

    token_ids: list[int]
    canonical: int
    tensors: Iterator[CacheTensor]


class CachedSequence:
    """An engine and the token ids in its KV cache; a common prefix of prompts is computed once.

    An interrupted forward (Ctrl-C, engine failure) leaves the cache unknown; it is then rebuilt at the next prefill.

    What a token leaves in the cache depends, in its last bits, on how many tokens were fed with it; and those decide
    near ties, more so where activations are rounded to 8 bits. So there are two kinds of common beginnings. Any saves
    time. A *canonical* one holds the very bits that a prefill of an empty cache gives: whole chunks of `prefill_chunk`
    tokens, one after the other from position 0, nothing generated, drafted or masked between them. Only that is used
    where a text has to be reproducible.

    Args:
        neighbours: the living sequences on the same weights; their caches may be copied.
    Attributes:
        acceptance: how good drafts for this sequence have been.
        forward_s: seconds of the last forward, without waiting for other sequences.
        trim_s: seconds of shortening the cache before it; None where nothing had to be.
    """

    def __init__(
        self,
        engine: Engine,
        prefill_chunk: int,
        lock: InterruptSafeLock,
        neighbours: Callable[[], Iterable[CachedSequence]] = lambda: (),
    ) -> None:
        self._engine = engine
        self._prefill_chunk = prefill_chunk
        self._lock = lock  # engines of one backend take turns
        self._neighbours = neighbours
        self._token_ids: list[int] | None = []  # the engine may hold more behind them, until its next forward
        self._canonical = 0  # of these, a multiple of the chunk
        self.acceptance = Acceptance()
        self.forward_s = 0.0
        self.trim_s: float | None = None

    def require_batch_invariance(self, required: bool) -> None:
        """Whether logits must not depend, in their last bits, on the sequences that are computed with this one."""
        self._engine.batch_invariant = required

    @property
    def length(self) -> int:
        """Tokens that are known to be in the KV cache."""
        return len(self._token_ids or ())

    @property
    def known_ids(self) -> list[int]:
        """Those tokens; none while a forward is computed."""
        return list(self._token_ids or ())

    def common_prefix(self, token_ids: Sequence[int], *, reproducible: bool = False) -> int:
        """How many of these tokens need not be computed again; at least one always is, for its logits.

        Args:
            reproducible: count only the canonical beginning of the cache.
        """
        cached = self._token_ids or []
        limit = min(len(cached), len(token_ids) - 1)
        if reproducible:
            limit = min(limit, self._canonical, self._engine.intact)
        common = next((i for i in range(limit) if cached[i] != token_ids[i]), limit)
        return self._whole_chunks(common) if reproducible else common

    def reuse(self, token_ids: Sequence[int], *, reproducible: bool = False) -> int:
        """Take over the beginning of these tokens from a neighbour, if it holds so much more that a copy is worth it.

        Args:
            reproducible: only a canonical one.

        Returns:
            how many of the tokens need not be computed now.
        """
        own = self.common_prefix(token_ids, reproducible=reproducible)
        neighbours = list(self._neighbours())
        with self._lock:  # no engine computes meanwhile; a cache is unknown while its forward runs
            found, donor = max(
                ((other.common_prefix(token_ids, reproducible=reproducible), other) for other in neighbours),
                key=lambda pair: pair[0],
                default=(0, self),
            )
            if found - own < WORTH_COPYING:
                return own
            with suppress(ClosedError):  # by another thread, just now
                self._copy(donor, token_ids[:found])
        return self.common_prefix(token_ids, reproducible=reproducible)

    def continue_from(self, other: CachedSequence) -> None:
        """Hold what another sequence holds."""
        with self._lock:
            if known := other._token_ids:
                self._copy(other, known)

    @contextmanager
    def saving(self) -> Iterator[SavedTokens]:
        """Token ids in the cache and its tensors; no sequence computes while the context is open."""
        with self._lock:
            known = list(self._token_ids or [])
            if not known:
                yield SavedTokens([], 0, iter(()))
                return
            self._engine.trim(len(known), exactly=True)
            canonical = min(self._canonical, self._engine.intact)
            yield SavedTokens(known, canonical, self._engine.save(len(known)))

    def restore(self, token_ids: Sequence[int], tensors: Iterable[CacheTensor], canonical: int = 0) -> None:
        """Hold what `saving` gave.

        Args:
            canonical: tokens of the canonical beginning, if it was computed with these very settings.
        """
        self._forget()
        with self._lock:
            self._engine.restore(len(token_ids), tensors)
        self._canonical = self._whole_chunks(min(canonical, len(token_ids)))
        self._token_ids = list(token_ids)

    def adopt(self, token_ids: Sequence[int]) -> None:
        """Go on from these tokens, which the engine was made to hold."""
        self._canonical = 0
        self._token_ids = list(token_ids)

    def publish(self, hashes: Sequence[bytes]) -> None:
        """Let sequences on the same blocks begin with its full ones (`PagedEngine.publish`)."""
        self._engine.publish(hashes)  # type: ignore[attr-defined]

    def prefill(
        self, token_ids: Sequence[int], cancelled: Callable[[], bool], *, reproducible: bool = False
    ) -> Logits | None:
        """Make the cache hold exactly these tokens, computing only those it does not hold yet.

        Args:
            reproducible: compute all but a canonical beginning, so that cache and logits are those of an empty start.

        Returns:
            logits [vocabulary] after the last token, or None if `cancelled` became true between two chunks.
        """
        start = self.common_prefix(token_ids, reproducible=reproducible)
        self._truncate(start, exactly=reproducible)
        if reproducible and self._engine.intact < start:  # cutting it quantised what was left anew
            start = 0
            self._truncate(0)
        logits = None
        while start < len(token_ids):
            if cancelled():
                return None
            chunk = token_ids[start : start + self._prefill_chunk]
            logits = self.append(chunk)
            if start == self._canonical and self._engine.intact == start + self._prefill_chunk:
                self._canonical += self._prefill_chunk
            start += len(chunk)
        return logits

    def append(self, token_ids: Sequence[int]) -> Logits:
        """Compute these tokens; logits [vocabulary] after the last one."""
        final: Logits = self._forward(token_ids)[-1]
        return final

    def append_each(self, token_ids: Sequence[int]) -> Logits:
        """Compute these tokens; logits [n, vocabulary] after each of them."""
        return self._forward(token_ids, len(token_ids))

    def drop_last(self, count: int) -> None:
        """Forget the last `count` tokens; the engine does so at its next forward."""
        if count and self._token_ids is not None:
            self._hold(self._token_ids[:-count])

    def logits_of_last(self, token_ids: Sequence[int], last: int, *, from_scratch: bool = False) -> Iterator[Logits]:
        """Make the cache hold exactly these tokens; logits after each of the last `last` of them.

        Args:
            from_scratch: compute all of them, so that nothing depends on what came before; otherwise those before the
                last `last` are not computed again where the cache holds them.

        Yields:
            logits [n, vocabulary] in order, at most `prefill_chunk` positions at a time: those of a whole context
            would take hundreds of megabytes.
        """
        first = len(token_ids) - last
        start = 0 if from_scratch else min(self.common_prefix(token_ids), first)
        self._truncate(start)
        while start < len(token_ids):
            chunk = token_ids[start : start + self._prefill_chunk]
            start += len(chunk)
            wanted = min(len(chunk), start - first)
            logits = self._forward(chunk, max(wanted, 1))
            if wanted > 0:
                yield logits

    def close(self) -> None:
        """Free the KV cache."""
        self._forget()
        with computing():  # freeing a cache is native code too
            self._engine.close()

    def _forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        known = self._token_ids
        assert known is not None, "prefill comes first"
        self._token_ids = None  # unknown until the engine is done
        with self._lock:
            start = trimmed = time.perf_counter()
            self.trim_s = None
            if self._engine.length > len(known):
                self._engine.trim(len(known))
                trimmed = time.perf_counter()
                self.trim_s = trimmed - start
            logits = self._engine.forward(token_ids, last)
            self.forward_s = time.perf_counter() - trimmed
        known.extend(token_ids)
        self._token_ids = known
        return logits

    def _copy(self, donor: CachedSequence, token_ids: Sequence[int]) -> None:
        """Hold what the donor's cache begins with: these tokens."""
        self._forget()
        self._engine.restore(len(token_ids), donor._engine.save(len(token_ids)))
        self._canonical = self._whole_chunks(min(donor._canonical, donor._engine.intact, len(token_ids)))
        self._token_ids = list(token_ids)

    def _truncate(self, length: int, *, exactly: bool = False) -> None:
        known, self._token_ids = self._token_ids, None
        if known is None or length == 0:
            with self._lock:
                self._engine.reset()
        elif exactly:
            with self._lock:
                self._engine.trim(length, exactly=True)
        self._hold(known[:length] if known else [])

    def _hold(self, token_ids: list[int]) -> None:
        """Take the cache to hold these tokens alone."""
        self._canonical = self._whole_chunks(min(self._canonical, len(token_ids)))
        self._token_ids = token_ids

    def _forget(self) -> None:
        """Take the content of the cache for unknown."""
        self._token_ids = None
        self._canonical = 0

    def _whole_chunks(self, length: int) -> int:
        return length - length % self._prefill_chunk
