"""Several sequences in one forward of onnxruntime: GroupQueryAttention takes a length for each row of a batch.

    past_key_values.N.key/value    [rows, kv_heads, capacity, head_dim], one buffer for all sequences
    a sequence                     a row of it; rows are in use from 0 on without gaps

A forward computes a token for each of a range of rows; one row of the range that has no call (its prompt is being
computed) gets a token behind its end, which the next one there overwrites. Prompts are computed one at a time. Full
blocks that are published are copies beside the buffer, by hash; the one used longest ago goes first.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import EngineError
from normistral.runtime.engines.base import CacheTensor, EngineInfo, Logits, UnmaskedEngine, check_cache_tensors, opened
from normistral.runtime.engines.batching import BatchCall
from normistral.runtime.engines.block_pool import BLOCK_TOKENS, blocks_of
from normistral.runtime.engines.onnx_cache import CAPACITY_STEP
from normistral.runtime.engines.onnx_session import translated
from normistral.runtime.engines.onnxruntime import OnnxDecoder

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


class RowEngine(UnmaskedEngine):
    """One sequence: a row of the buffers of an `OnnxBatch`."""

    def __init__(self, batch: OnnxBatch) -> None:
        self._batch: OnnxBatch | None = batch
        self.row = batch.take_row(self)

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: onnxruntime failed, or the sequence outgrows the model's context.
        """
        batch, call = opened(self._batch), BatchCall(self, token_ids, last)
        return batch.forward_batch([call])[0] if batch.submit is None else batch.submit(call)

    def share(self, hashes: Sequence[bytes]) -> int:
        """Begin an empty sequence with copies of published blocks, as far as they are there; how many tokens."""
        assert self.length == 0, "only an empty sequence begins with shared blocks"
        self.length = opened(self._batch).copy_blocks(self.row, hashes)
        return self.length

    def publish(self, hashes: Sequence[bytes]) -> None:
        """Let others begin with the full blocks of this sequence, whose tokens have these hashes."""
        opened(self._batch).publish(self.row, hashes[: self.length // BLOCK_TOKENS])

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, in its own precision: [1, kv_heads, length, head_dim]."""
        return opened(self._batch).read(self.row, length)

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        self.length = 0
        opened(self._batch).write(self.row, length, tensors)
        self.length = length

    def close(self) -> None:
        """Free the row."""
        if self._batch is not None:
            self._batch.free_row(self.row)
            self._batch = None


class OnnxBatch:
    """A `BatchingBackend` on a session whose attention takes lengths (`onnx_graph.take_lengths`); used from one thread.

    Args:
        decoder: with `takes_lengths`; its cache is on the CPU.
    """

    def __init__(self, decoder: OnnxDecoder, capabilities: EngineInfo) -> None:
        self.capabilities = capabilities
        self.submit: Callable[[BatchCall[Any]], Logits] | None = None
        self._decoder: OnnxDecoder | None = decoder
        self._rows: list[RowEngine] = []
        self._capacity = 0  # tokens of a row
        self._buffers: dict[str, _Buffer] = {}
        self._blocks: OrderedDict[bytes, list[NDArray[Any]]] = OrderedDict()  # published; used longest ago first
        self._most_blocks = 0

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in the KV cache, keys and values of all layers and heads."""
        layout = opened(self._decoder).layout
        return len(layout.names) * layout.kv_heads * layout.head_dim * layout.dtype.itemsize

    def create_engine(self) -> RowEngine:
        """A new, empty sequence."""
        return RowEngine(self)

    def reserve_blocks(self, blocks: int) -> None:
        """Let sequences and published blocks together be so many; memory is taken as they are written."""
        self._most_blocks = blocks

    def measure_batch_invariance(self) -> bool:
        """No: a product of one row is another kernel than one of several, and a lone row gets no companion here."""
        return False

    def forward_batch(self, calls: Sequence[BatchCall[RowEngine]]) -> list[Logits]:
        """Single tokens in one forward, those that must not depend on others and prompts in one each.

        Raises:
            EngineError: onnxruntime failed; no sequence is longer than before.
        """
        together = [call for call in calls if len(call.token_ids) == 1 and not call.engine.batch_invariant]
        logits: dict[int, Logits] = {}  # by row
        if len(together) > 1:
            tokens = {call.engine.row: call.token_ids[0] for call in together}
            begin, end = min(tokens), max(tokens) + 1
            ids = [[tokens.get(row, 0)] for row in range(begin, end)]
            computed = self._run(begin, ids, 1)
            logits |= {row: computed[row - begin] for row in tokens}
        for call in calls:
            if call.engine.row not in logits:
                computed = self._run(call.engine.row, [call.token_ids], max(call.last, 1))
                logits[call.engine.row] = computed[0]
        for call in calls:
            call.engine.length += len(call.token_ids)
        self._evict()
        return [logits[call.engine.row][: call.last] for call in calls]

    def close(self) -> None:
        """Let go of weights and caches."""
        self._decoder = None
        self._buffers.clear()
        self._blocks.clear()

    def take_row(self, engine: RowEngine) -> int:
        """The first free row."""
        opened(self._decoder)
        self._rows.append(engine)
        return len(self._rows) - 1

    def free_row(self, row: int) -> None:
        """Move the last sequence there, and give the memory of its row back."""
        moved = self._rows.pop()
        for buffer in self._buffers.values():
            if len(self._rows) < len(buffer.array):
                if moved.row != row:
                    buffer.array[row, :, : moved.length] = buffer.array[moved.row, :, : moved.length]
                buffer.release(moved.row)
        if moved.row != row:
            moved.row = row
            self._rows[row] = moved

    def copy_blocks(self, row: int, hashes: Sequence[bytes]) -> int:
        """Fill a row with published blocks, up to the first that is not there; how many tokens they are."""
        found: list[list[NDArray[Any]]] = []
        for wanted in hashes:
            if (block := self._blocks.get(wanted)) is None:
                break
            self._blocks.move_to_end(wanted)
            found.append(block)
        length = len(found) * BLOCK_TOKENS
        self._fit(length)
        for index, buffer in enumerate(self._buffers.values()):
            for place, block in enumerate(found):
                buffer.array[row, :, place * BLOCK_TOKENS : (place + 1) * BLOCK_TOKENS] = block[index]
        return length

    def publish(self, row: int, hashes: Sequence[bytes]) -> None:
        """Keep copies of the first blocks of a row."""
        for place, found_by in enumerate(hashes):
            if found_by not in self._blocks:
                tokens = slice(place * BLOCK_TOKENS, (place + 1) * BLOCK_TOKENS)
                self._blocks[found_by] = [buffer.array[row, :, tokens].copy() for buffer in self._buffers.values()]
        self._evict()

    def read(self, row: int, length: int) -> Iterator[CacheTensor]:
        """Copies of the first tokens of a row."""
        for name, buffer in self._buffers.items():
            yield CacheTensor(name, buffer.array[row : row + 1, :, :length].copy())

    def write(self, row: int, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Fill the first tokens of a row."""
        self._fit(length)
        for name, tensor in check_cache_tensors(tensors, opened(self._decoder).layout.kinds(length)):
            self._buffers[name].array[row, :, :length] = tensor[0]

    def _run(self, begin: int, token_ids: Sequence[Sequence[int]], last: int) -> Logits:
        """Compute as many tokens for each row from `begin` on; logits [rows, last, vocabulary]."""
        decoder = opened(self._decoder)
        ids = np.array(token_ids, np.int64)
        rows = len(ids)
        past = np.array([engine.length for engine in self._rows[begin : begin + rows]])
        total = int(past.max()) + ids.shape[1]
        if total > decoder.layout.limit:
            raise EngineError(f"{total} tokens do not fit into the model's context of {decoder.layout.limit}")
        with translated(f"onnxruntime failed at token {total}"):
            self._fit(total)
            binding = decoder.session.io_binding()
            for name, present in decoder.layout.names.items():
                value = decoder.layout.place(self._buffers[name].array[begin : begin + rows])
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(present, value)
            return decoder.run(binding, ids, past, last)

    def _fit(self, tokens: int) -> None:
        """Have a row for each sequence, with room for so many tokens; buffers move when they grow."""
        layout = opened(self._decoder).layout
        had = len(next(iter(self._buffers.values())).array) if self._buffers else 0
        if len(self._rows) <= had and tokens <= self._capacity:
            return
        rows = had if len(self._rows) <= had else max(len(self._rows), 2 * had)
        self._capacity = max(self._capacity, -(-max(tokens, 1) // CAPACITY_STEP) * CAPACITY_STEP)
        for name in layout.names:
            grown = _Buffer((rows, layout.kv_heads, self._capacity, layout.head_dim), layout.dtype)
            for engine in self._rows[:had]:
                grown.array[engine.row, :, : engine.length] = self._buffers[name].array[engine.row, :, : engine.length]
            self._buffers[name] = grown

    def _evict(self) -> None:
        used = sum(blocks_of(engine.length) for engine in self._rows)
        while self._blocks and used + len(self._blocks) > self._most_blocks:
            self._blocks.popitem(last=False)


class _Buffer:
    """Zeros that take memory page by page as they are written, and give it back row by row where the system can."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self._row_bytes = size // shape[0]
        self._memory = mmap.mmap(-1, size, flags=_PRIVATE) if _PRIVATE else None
        self.array: NDArray[Any] = (
            np.zeros(shape, dtype) if self._memory is None else np.frombuffer(self._memory, dtype).reshape(shape)
        )

    def release(self, row: int) -> None:
        """Make a row zeros that take no memory."""
        if self._memory is not None and _DONT_NEED is not None and self._row_bytes % mmap.PAGESIZE == 0:
            self._memory.madvise(_DONT_NEED, row * self._row_bytes, self._row_bytes)
