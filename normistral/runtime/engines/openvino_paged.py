"""OpenVINO's PagedAttention on the CPU: one sequence is a table of blocks in a KV cache that all sequences share.

The attention of the stateful graph reads the cache of a layer once for each query head, and keeps rejected tokens as
masked slots. PagedAttention reads K and V once for all query heads that share them, and takes its cache from the
caller: trimming is a shorter past, and saving and restoring copy rows.

    key_cache.N, value_cache.N    [blocks, kv_heads, 32, row]    row: head_dim values; of an 8-bit cache behind their
                                                                 scale and zero point (float32 each)
    a sequence of 70 tokens       block table [5, 2, 9]: token 40 is row 8 of block 2

Source of the layout: openvino/src/plugins/intel_cpu/src/nodes/paged_attn.cpp and its kernels. Other devices keep the
stateful graph.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ClosedError
from normistral.runtime.engines.base import CacheTensor, EngineInfo, Logits, TensorKinds, check_cache_tensors
from normistral.runtime.engines.openvino_graph import LAST
from normistral.runtime.engines.openvino_settings import translated

if TYPE_CHECKING:
    import openvino as ov

BLOCK_TOKENS = 32  # fixed by the CPU plugin
# An 8-bit key has a scale for each token, like a value: a scale for each channel of a block changes while it fills, and
# what was computed with the first 20 tokens of a block would not be what is there after 32.
KEYS_BY_TOKEN = {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"}
PAGED_PRECISIONS = ("u8", "f16", "f32")  # of the cache; bf16 keeps the stateful graph
_FIRST_BLOCKS = 8


def can_page(device: str) -> bool:
    """Whether a device has PagedAttention that takes its cache from the caller; windows and ALiBi included."""
    return device == "CPU"


class BlockPool:
    """The KV cache of all sequences on one compiled model, in blocks of 32 tokens of every layer.

    It grows by half when it is full, and gives its memory back when no sequence has a block.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.request = compiled.create_infer_request()
        self._ports = {  # key_cache.0, value_cache.0, key_cache.1, ...
            port.get_any_name(): port for port in compiled.inputs if "_cache." in port.get_any_name()
        }
        # Blocks come back from any thread, and from the garbage collector in the midst of anything: no lock can be
        # taken then, and a deque needs none. All else runs while no other sequence computes.
        self._free: deque[int] = deque()
        self._capacity = 0
        self._bytes: dict[str, NDArray[np.uint8]] = {}  # [blocks, kv_heads, 32, row bytes]
        self._resize(_FIRST_BLOCKS)

    def row_shapes(self) -> dict[str, tuple[int, int]]:
        """Heads, and bytes of one token's row, by tensor."""
        return {name: (array.shape[1], array.shape[3]) for name, array in self._bytes.items()}

    def allocate(self, count: int) -> list[int]:
        """So many blocks; their content is finite but undefined. Not while another thread is in a forward."""
        if count > len(self._free):
            used = self._capacity - len(self._free)
            self._resize(max(used + count, self._capacity + self._capacity // 2))
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Give blocks back; the list is empty afterwards."""
        self._free.extend(blocks)
        blocks.clear()

    def shrink(self) -> None:
        """Free the memory if no sequence has a block. Not while another thread is in a forward."""
        if len(self._free) == self._capacity > _FIRST_BLOCKS:
            self._free.clear()
            self._capacity = 0
            self._resize(_FIRST_BLOCKS)

    def read(self, name: str, blocks: Sequence[int], length: int) -> NDArray[np.uint8]:
        """The first `length` rows of a sequence: [kv_heads, length, row bytes], a copy."""
        rows = self._bytes[name][list(blocks)]  # [blocks, kv_heads, 32, row]
        heads, row = rows.shape[1], rows.shape[3]
        return np.ascontiguousarray(rows.swapaxes(0, 1).reshape(heads, -1, row)[:, :length])

    def write(self, name: str, blocks: Sequence[int], rows: NDArray[np.uint8]) -> None:
        """Fill the first rows of a sequence with [kv_heads, length, row bytes]."""
        heads, length, row = rows.shape
        padded = np.zeros((heads, len(blocks) * BLOCK_TOKENS, row), np.uint8)
        padded[:, :length] = rows
        self._bytes[name][list(blocks)] = padded.reshape(heads, len(blocks), BLOCK_TOKENS, row).swapaxes(0, 1)

    def _resize(self, capacity: int) -> None:
        import openvino as ov

        kept = self._capacity
        for name, port in self._ports.items():
            shape = [dimension.get_length() for dimension in list(port.get_partial_shape())[1:]]  # [kv_heads, 32, row]
            kind = port.get_element_type()
            # Zeros take no memory before they are written, and are finite: the kernel reads whole blocks, and a
            # weight of 0 does not hide a NaN.
            array = np.zeros((capacity, *shape[:-1], shape[-1] * kind.size), np.uint8)
            if kept:
                array[:kept] = self._bytes[name][:kept]
            tensor = ov.Tensor(array.reshape(-1), ov.Shape([capacity, *shape]), kind)
            self.request.set_tensor(port, tensor)
            self._bytes[name] = array
        self._free.extend(range(capacity - 1, kept - 1, -1))
        self._capacity = capacity


class PagedBackend:
    """A compiled model with PagedAttention; see `load_openvino`.

    Args:
        keeps: what has to live as long as the model: the int4 kernel's weights.
    """

    def __init__(self, compiled: ov.CompiledModel, capabilities: EngineInfo, keeps: object = None) -> None:
        self.capabilities = capabilities
        self._keeps = keeps
        with translated("OpenVINO could not make the KV cache"):
            self._pool: BlockPool | None = BlockPool(compiled)

    def create_engine(self) -> PagedEngine:
        """A new, empty sequence with blocks of its own."""
        if self._pool is None:
            raise ClosedError
        return PagedEngine(self._pool, self._keeps)

    def close(self) -> None:
        """Let go of weights and cache; they are freed with the last engine made from them."""
        self._pool = self._keeps = None


class PagedEngine:
    """One sequence: a block table into the pool that all sequences of a model share."""

    def __init__(self, pool: BlockPool, keeps: object = None) -> None:
        self._pool: BlockPool | None = pool
        self._keeps = keeps
        self._blocks: list[int] = []  # the block table
        self._release = weakref.finalize(self, pool.release, self._blocks)  # also where it is not closed
        self._release.atexit = False
        self.length = 0

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: OpenVINO failed.
        """
        import openvino as ov

        pool, past, end = self._open_pool(), self.length, self.length + len(token_ids)
        self._reserve(end)
        used = _blocks_of(end)
        inputs = {
            "input_ids": np.array(token_ids, np.int64),
            "position_ids": np.arange(past, end, dtype=np.int64),
            "past_lens": np.array([past], np.int32),
            "subsequence_begins": np.array([0, len(token_ids)], np.int32),
            "block_indices": np.array(self._blocks[:used], np.int32),
            "block_indices_begins": np.array([0, used], np.int32),
            "max_context_len": np.array(end, np.int32),
            LAST: np.array([last], np.int64),
        }
        with translated(f"OpenVINO failed at token {end}"):
            for name, values in inputs.items():
                pool.request.set_tensor(name, ov.Tensor(values))
            pool.request.infer()
            logits = pool.request.get_tensor("logits").data  # [last, 1, vocabulary]
        self.length = end
        return np.array(logits[:, 0], dtype=np.float32)  # a copy: the request overwrites its tensor at the next step

    @property
    def intact(self) -> int:
        """All of them: nothing is masked, and what is restored is what was saved."""
        return self.length

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens; `exactly` or not, nothing stays."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim {self.length} tokens to {length}")
        self.length = length
        surplus = self._blocks[_blocks_of(length) :]
        del self._blocks[_blocks_of(length) :]
        self._open_pool().release(surplus)

    def reset(self) -> None:
        """Forget everything."""
        self.trim(0)
        self._open_pool().shrink()

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, as they lie there: uint8 [kv_heads, length, row bytes]."""
        pool = self._open_pool()
        for name in pool.row_shapes():
            yield CacheTensor(name, pool.read(name, self._blocks[: _blocks_of(length)], length))

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        pool = self._open_pool()
        self.reset()
        self._reserve(length)
        kinds: TensorKinds = {
            name: [(np.dtype(np.uint8), (heads, length, row))] for name, (heads, row) in pool.row_shapes().items()
        }
        for name, rows in check_cache_tensors(tensors, kinds):
            pool.write(name, self._blocks, rows)
        self.length = length

    def close(self) -> None:
        """Free the KV cache."""
        self._release()
        self._pool = self._keeps = None

    def _reserve(self, length: int) -> None:
        missing = _blocks_of(length) - len(self._blocks)
        if missing > 0:
            with translated("OpenVINO could not enlarge the KV cache"):
                self._blocks += self._open_pool().allocate(missing)

    def _open_pool(self) -> BlockPool:
        if self._pool is None:
            raise ClosedError
        return self._pool


def _blocks_of(length: int) -> int:
    return -(-length // BLOCK_TOKENS)
