"""OpenVINO's PagedAttention on the CPU: one sequence is a table of blocks in a KV cache that all sequences share.

The attention of the stateful graph reads the cache of a layer once for each query head, and keeps rejected tokens as
masked slots. PagedAttention reads K and V once for all query heads that share them, and takes its cache from the
caller: trimming is a shorter past, saving and restoring copy rows, and one forward takes any number of sequences, each
with as many tokens as it has (`PagedBackend.forward_batch`). Other devices keep the stateful graph.

Batch invariance: a row's bits do not depend on the other rows of a forward, with two exceptions. A product of one row
is another kernel than one of several; and for few sequences of one token each the sums of attention are divided between
threads. Neither is the case where one sequence has several tokens, so a lone token that must be invariant gets a
companion of two (measured in benchmarks/results/2026-11-30-batching.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from normistral.runtime.engines.base import (
    CacheTensor,
    EngineInfo,
    Logits,
    TensorKinds,
    UnmaskedEngine,
    check_cache_tensors,
    opened,
)
from normistral.runtime.engines.batching import BatchCall
from normistral.runtime.engines.block_pool import BLOCK_TOKENS, BlockPool, blocks_of
from normistral.runtime.engines.openvino_graph import POSITIONS
from normistral.runtime.engines.openvino_settings import translated

if TYPE_CHECKING:
    import openvino as ov

# An 8-bit key has a scale for each token, like a value: a scale for each channel of a block changes while it fills, and
# what was computed with the first 20 tokens of a block would not be what is there after 32.
KEYS_BY_TOKEN = {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"}
PAGED_PRECISIONS = ("u8", "f16", "f32")  # of the cache; bf16 keeps the stateful graph


class PagedBackend:
    """A compiled model with PagedAttention; see `load_openvino`.

    Args:
        keeps: what has to live as long as the model: the int4 kernel's weights.

    Attributes:
        submit: computes the forwards of its engines (logits as of `Engine.forward`), in place of one at a time.
    """

    def __init__(self, compiled: ov.CompiledModel, capabilities: EngineInfo, keeps: object = None) -> None:
        self.capabilities = capabilities
        self._keeps = keeps
        self.submit: Callable[[PagedCall], Logits] | None = None
        with translated("OpenVINO could not make the KV cache"):
            self._pool: BlockPool | None = BlockPool(compiled)

    def create_engine(self) -> PagedEngine:
        """A new, empty sequence with blocks of its own."""
        return PagedEngine(self, opened(self._pool), self._keeps)

    def forward_batch(self, calls: Sequence[PagedCall]) -> list[Logits]:
        """One forward of several sequences; logits [last, vocabulary] of each.

        Raises:
            EngineError: OpenVINO failed; no sequence is longer than before.
        """
        return _forward(opened(self._pool), calls)

    def measure_batch_invariance(self) -> bool:
        """Whether `PagedEngine.batch_invariant` holds for the kernels of this machine and these weights.

        Computes some tokens alone and beside 1, 3 and 7 other sequences and a prompt, and compares the bits.
        """
        engines = [self.create_engine() for _ in range(9)]
        first, *others, prompt = engines
        first.batch_invariant = True
        try:
            self.forward_batch([PagedCall(engine, [0, 1], 1) for engine in (first, *others)])
            step, piece = [PagedCall(engine, [2 + index], 1) for index, engine in enumerate(engines[:8])], [3] * 40
            alone = self.forward_batch(step[:1])[0]
            for count, beside in ((2, 0), (4, 0), (8, 0), (1, 1)):
                for engine in (first, *others):
                    engine.trim(2)
                prompt.reset()
                among = self.forward_batch([*step[:count], *[PagedCall(prompt, piece, 1)] * beside])[0]
                if not np.array_equal(alone, among):
                    return False
            return True
        finally:
            for engine in engines:
                engine.close()
            if self._pool is not None:
                self._pool.shrink()

    def reserve_blocks(self, blocks: int) -> None:
        """Have a KV cache of so many blocks, all sequences together, that does not grow."""
        with translated("OpenVINO could not make the KV cache"):
            opened(self._pool).reserve(blocks)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in the KV cache, keys and values of all layers and heads."""
        return sum(heads * row for heads, row in opened(self._pool).row_shapes().values())

    def close(self) -> None:
        """Let go of weights and cache; they are freed with the last engine made from them."""
        self._pool = self._keeps = None


class PagedEngine(UnmaskedEngine):
    """One sequence: a block table into the pool that all sequences of a model share."""

    def __init__(self, backend: PagedBackend | None, pool: BlockPool, keeps: object = None) -> None:
        self._backend = backend
        self._pool: BlockPool | None = pool
        self._keeps = keeps
        self._blocks: list[int] = []  # the block table
        self._release = weakref.finalize(self, pool.release, self._blocks)  # also where it is not closed
        self._release.atexit = False

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: OpenVINO failed.
        """
        pool, call = opened(self._pool), PagedCall(self, token_ids, last)
        backend = self._backend
        assert backend is not None, "kept as long as the pool"
        submit = backend.submit
        return _forward(pool, [call])[0] if submit is None else submit(call)

    def share(self, hashes: Sequence[bytes]) -> int:
        """Begin an empty sequence with the published blocks of these hashes (`block_hashes`), as far as they are there.

        Returns:
            how many tokens are in the cache now.
        """
        assert not self._blocks, "only an empty sequence begins with shared blocks"
        self._blocks += opened(self._pool).share(hashes)
        self.length = len(self._blocks) * BLOCK_TOKENS
        return self.length

    def publish(self, hashes: Sequence[bytes]) -> None:
        """Let others begin with the full blocks of this sequence, whose tokens have these hashes."""
        opened(self._pool).publish(self._blocks[: self.length // BLOCK_TOKENS], hashes)

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens; `exactly` or not, nothing stays."""
        assert 0 <= length <= self.length
        self.length = length
        surplus = self._blocks[blocks_of(length) :]
        del self._blocks[blocks_of(length) :]
        opened(self._pool).release(surplus)

    def reset(self) -> None:
        """Forget everything."""
        self.trim(0)
        opened(self._pool).shrink()

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, as they lie there: uint8 [kv_heads, length, row bytes]."""
        pool = opened(self._pool)
        for name in pool.row_shapes():
            yield CacheTensor(name, pool.read(name, self._blocks[: blocks_of(length)], length))

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        pool = opened(self._pool)
        self.reset()
        self.prepare(length)
        kinds: TensorKinds = {
            name: [(np.dtype(np.uint8), (heads, length, row))] for name, (heads, row) in pool.row_shapes().items()
        }
        for name, rows in check_cache_tensors(tensors, kinds):
            pool.write(name, self._blocks, rows)
        self.length = length

    def close(self) -> None:
        """Free the KV cache."""
        self._release()
        self._pool = self._keeps = self._backend = None

    def prepare(self, length: int) -> list[int]:
        """The block table for so many tokens; those behind the present ones may be written."""
        pool = opened(self._pool)
        with translated("OpenVINO could not enlarge the KV cache"):
            if self.length % BLOCK_TOKENS and length > self.length:
                place = self.length // BLOCK_TOKENS
                self._blocks[place] = pool.writable(self._blocks[place])
            missing = blocks_of(length) - len(self._blocks)
            if missing > 0:
                self._blocks += pool.allocate(missing)
        return self._blocks[: blocks_of(length)]


PagedCall: TypeAlias = BatchCall[PagedEngine]


def _forward(pool: BlockPool, calls: Sequence[PagedCall]) -> list[Logits]:
    """One forward, with a companion where a call that must be invariant needs one."""
    lone = all(len(call.token_ids) == 1 for call in calls) or sum(call.last for call in calls) == 1
    if not (lone and any(call.engine.batch_invariant for call in calls)):
        return _infer(pool, calls)
    companion = PagedEngine(None, pool)
    try:
        return _infer(pool, [*calls, PagedCall(companion, [0, 0], 1)])[:-1]
    finally:
        companion.close()


def _infer(pool: BlockPool, calls: Sequence[PagedCall]) -> list[Logits]:
    import openvino as ov

    past = np.array([call.engine.length for call in calls], np.int32)
    counts = np.array([len(call.token_ids) for call in calls], np.int32)
    ends = past + counts
    tables = [call.engine.prepare(int(end)) for call, end in zip(calls, ends, strict=True)]
    begins = _begins(counts)
    positions = [np.arange(end - call.last, end) for call, end in zip(calls, begins[1:], strict=True)]
    wanted = np.concatenate(positions).astype(np.int64)
    inputs = {
        "input_ids": np.concatenate([np.asarray(call.token_ids, np.int64) for call in calls]),
        "position_ids": np.concatenate([np.arange(p, e, dtype=np.int64) for p, e in zip(past, ends, strict=True)]),
        "past_lens": past,
        "subsequence_begins": begins,
        "block_indices": np.concatenate([np.array(table, np.int32) for table in tables]),
        "block_indices_begins": _begins([len(table) for table in tables]),
        "max_context_len": np.array(ends.max(), np.int32),
        POSITIONS: wanted if len(wanted) else begins[-1:].astype(np.int64) - 1,  # no product of no rows
    }
    with translated(f"OpenVINO failed at token {ends.max()}"):
        for name, values in inputs.items():
            pool.request.set_tensor(name, ov.Tensor(values))
        pool.request.infer(share_outputs=True)  # or all results are copied for a dictionary that nobody reads
        logits = pool.request.get_tensor("logits").data  # [m, 1, vocabulary]
    for call, end in zip(calls, ends, strict=True):
        call.engine.length = int(end)
    places = _begins([call.last for call in calls])
    # Copies: the request overwrites its tensor at the next step.
    return [
        np.array(logits[place : place + call.last, 0], np.float32) for place, call in zip(places, calls, strict=False)
    ]


def _begins(counts: Sequence[int] | NDArray[np.int32]) -> NDArray[np.int32]:
    """Where each of the parts begins, and the end of the last."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
