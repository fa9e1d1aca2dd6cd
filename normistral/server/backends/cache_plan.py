"""The KV cache that jobs computed together share, in bytes and in tokens.

Arithmetic only. A token takes the same number of bytes in every layer and head, so memory is counted in tokens, and
given out in blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from normistral.artifact.manifest import Architecture
from normistral.errors import UsageError
from normistral.server.backends.settings import BatchSettings

BLOCK_TOKENS = 32  # what openvino_genai gives out at once on a CPU
_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
_ENDS = 8  # bytes of scale and zero point beside the codes of a group
BATCH_SLOTS = 32  # more at once gain little on a CPU, and each would be slower (docs/decisions.md)


@dataclass(frozen=True, slots=True)
class CachePlan:
    """A KV cache that does not grow.

    Attributes:
        blocks: of `block_tokens` tokens each.
        token_bytes: bytes of one token, all layers and heads.
        jobs: most jobs at once.
    """

    blocks: int
    token_bytes: int
    jobs: int
    block_tokens: int = BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        """Tokens that it holds, of all jobs together."""
        return self.blocks * self.block_tokens

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.tokens * self.token_bytes


def plan_cache(shape: Architecture, precisions: Mapping[str, str], batch: BatchSettings) -> CachePlan:
    """Choose the size of the KV cache: as many whole contexts as may be under way, within the memory that it may take.

    Args:
        precisions: settings in force; of these the precisions of the cache count.

    Raises:
        UsageError: it does not hold one context.
    """
    jobs = batch.slots or BATCH_SLOTS
    token_bytes = cache_bytes_of_token(shape, precisions)
    context_blocks = math.ceil(batch.context / BLOCK_TOKENS)
    blocks = min(jobs * context_blocks, batch.cache_bytes // (token_bytes * BLOCK_TOKENS))
    if blocks < context_blocks:
        needed = context_blocks * BLOCK_TOKENS * token_bytes
        raise UsageError(
            f"a KV cache of {batch.cache_bytes / 2**20:.0f} MiB does not hold one context of {batch.context} tokens "
            f"({math.ceil(needed / 2**20)} MiB)",
            "give --cache-mib more, or take a shorter --max-context",
        )
    return CachePlan(blocks, token_bytes, jobs)


def cache_bytes_of_token(shape: Architecture, settings: Mapping[str, str]) -> int:
    """Bytes that one token takes in the KV cache, keys and values of all layers and heads."""
    both = settings.get("KV_CACHE_PRECISION", "u8")
    row = sum(
        _row_bytes(
            shape.head_dim, settings.get(f"{part}_CACHE_PRECISION", both), settings.get(f"{part}_CACHE_GROUP_SIZE")
        )
        for part in ("KEY", "VALUE")
    )
    return row * shape.kv_heads * shape.layers


def _row_bytes(values: int, precision: str, group: str | None) -> int:
    """One token in one head: codes, and beside them the ends of each group if they are rounded to 4 or 8 bits."""
    bits = _BITS[precision]
    if bits > 8:
        return values * bits // 8
    groups = math.ceil(values / (int(group or 0) or values))
    return values * bits // 8 + groups * _ENDS
