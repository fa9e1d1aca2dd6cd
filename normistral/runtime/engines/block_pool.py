"""KV cache of all sequences on one compiled model, in blocks; a prefix cache of blocks by content.

    key_cache.N, value_cache.N    [blocks, kv_heads, 32, row]    row: head_dim values; of an 8-bit cache behind their
                                                                 scale and zero point (float32 each)
    a sequence of 70 tokens       block table [5, 2, 9]: token 40 is row 8 of block 2

A full block may be published under the hash of its owner's name, its tokens and all tokens before them
(`block_hashes`); other sequences of the same owner with the same prefix take it into their tables. A published block in
no table stays until its memory is needed; the least recently used one is evicted first.

Source of the layout: openvino/src/plugins/intel_cpu/src/nodes/paged_attn.cpp and its kernels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import openvino as ov

BLOCK_TOKENS = 32  # fixed by the CPU plugin
_FIRST_BLOCKS = 8
_HASH_BYTES = 32  # one owner must not find two texts with one hash, and serve another answer than was asked for


def blocks_of(length: int) -> int:
    """Blocks that so many tokens take."""
    return -(-length // BLOCK_TOKENS)


def block_hashes(owner: str, token_ids: Sequence[int]) -> Iterator[bytes]:
    """Hash of each full block of a sequence: of its owner, its tokens and all tokens before them."""
    known = hashlib.blake2b(owner.encode(), digest_size=_HASH_BYTES).digest()
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        tokens = np.array(token_ids[start : start + BLOCK_TOKENS], np.int64).tobytes()
        known = hashlib.blake2b(known + tokens, digest_size=_HASH_BYTES).digest()
        yield known


class BlockPool:
    """Blocks of 32 tokens of every layer.

    It grows by half when it is full, and gives its memory back when no sequence has a block. Its methods, but
    `release`, must not be called while a thread is in a forward.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.request = compiled.create_infer_request()
        self._ports = {  # key_cache.0, value_cache.0, key_cache.1, ...
            port.get_any_name(): port for port in compiled.inputs if "_cache." in port.get_any_name()
        }
        # Blocks come back from any thread, and from the garbage collector in the midst of anything: no lock can be
        # taken then, and a deque needs none. They are counted at the next call.
        self._returned: deque[int] = deque()
        self._free: list[int] = []
        self._holders: list[int] = []  # of each block: tables that it is in
        self._published: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}  # of published blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, in no table; the one used longest ago first
        self._capacity = 0
        self._least = _FIRST_BLOCKS
        self._bytes: dict[str, NDArray[np.uint8]] = {}  # [blocks, kv_heads, 32, row bytes]
        self._resize(_FIRST_BLOCKS)

    def row_shapes(self) -> dict[str, tuple[int, int]]:
        """Heads, and bytes of one token's row, by tensor."""
        return {name: (array.shape[1], array.shape[3]) for name, array in self._bytes.items()}

    def reserve(self, blocks: int) -> None:
        """Have so many blocks from now on, so that nothing is copied to grow."""
        self._least = max(blocks, _FIRST_BLOCKS)
        if self._capacity < self._least:
            self._resize(self._least)

    def allocate(self, count: int) -> list[int]:
        """So many blocks; their content is finite but undefined."""
        self._count_returned()
        while len(self._free) < count and self._idle:
            block, _ = self._idle.popitem(last=False)
            self._withdraw(block)
            self._free.append(block)
        if len(self._free) < count:
            used = self._capacity - len(self._free)
            self._resize(max(used + count, self._capacity + self._capacity // 2))
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Take blocks out of a table; the list is empty afterwards. May be called at any time."""
        self._returned.extend(reversed(blocks))  # of a published beginning, the end is the first to go
        blocks.clear()

    def publish(self, blocks: Iterable[int], hashes: Iterable[bytes]) -> None:
        """Let others find full blocks. They are not written any more: `writable`."""
        for block, found_by in zip(blocks, hashes, strict=False):
            if block not in self._hashes and found_by not in self._published:
                self._hashes[block] = found_by
                self._published[found_by] = block

    def share(self, hashes: Iterable[bytes]) -> list[int]:
        """Published blocks of a beginning, up to the first that is not there; they are in one more table now."""
        self._count_returned()
        blocks: list[int] = []
        for wanted in hashes:
            block = self._published.get(wanted)
            if block is None:
                break
            self._idle.pop(block, None)
            self._holders[block] += 1
            blocks.append(block)
        return blocks

    def writable(self, block: int) -> int:
        """The block, which is then no longer published; or a copy where other tables have it too."""
        self._count_returned()
        if self._holders[block] == 1:
            self._withdraw(block)
            return block
        (copy,) = self.allocate(1)
        for array in self._bytes.values():
            array[copy] = array[block]
        self.release([block])
        return copy

    def shrink(self) -> None:
        """Free the memory if no sequence has a block."""
        self._count_returned()
        if len(self._free) == self._capacity > self._least:
            self._free.clear()
            self._holders.clear()
            self._capacity = 0
            self._resize(self._least)

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

    def _count_returned(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._hashes:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def _withdraw(self, block: int) -> None:
        if (found_by := self._hashes.pop(block, None)) is not None:
            del self._published[found_by]

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
        self._holders.extend([0] * (capacity - kept))
        self._capacity = capacity
