"""How much memory the KV cache of all jobs together takes, and how many jobs may be under way: said here and nowhere else.

Arithmetic only. A token takes the same number of bytes in every layer and head, so memory is counted in tokens, and
given out in blocks of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from normistral.errors import ResourceError
from normistral.manifest import Architecture

BLOCK_TOKENS = 32  # what openvino_genai gives out at once on a CPU
_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
_ENDS = 8  # bytes of scale and zero point beside the codes of a group
_SHARE = 0.5  # of what the weights leave: activations, the parent process and other programs need some too


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What many jobs at once may take.

    Attributes:
        jobs: most jobs at once; more wait.
        cache_bytes: of the KV cache; None is what `jobs` whole contexts take, within half of the memory that is free.
    """

    jobs: int = 32
    cache_bytes: int | None = None


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


def plan_cache(
    shape: Architecture, context_length: int, settings: Mapping[str, str], limits: BatchLimits, free_bytes: int
) -> CachePlan:
    """Choose the size of the KV cache.

    Args:
        settings: in force; of these the precisions of the cache count.
        free_bytes: memory that is there once the weights are loaded.

    Raises:
        ResourceError: not even one block fits.
    """
    token_bytes = cache_bytes_of_token(shape, settings)
    block_bytes = token_bytes * BLOCK_TOKENS
    most = limits.jobs * math.ceil(context_length / BLOCK_TOKENS)
    budget = int(free_bytes * _SHARE) if limits.cache_bytes is None else limits.cache_bytes
    blocks = min(most, budget // block_bytes)
    if blocks < 1:
        raise ResourceError(
            f"the KV cache needs {block_bytes} bytes for {BLOCK_TOKENS} tokens and may take {max(budget, 0)}",
            "give it more memory, or load a smaller model",
        )
    return CachePlan(blocks, token_bytes, limits.jobs)


def cache_bytes_of_token(shape: Architecture, settings: Mapping[str, str]) -> int:
    """Bytes that one token takes in the KV cache, keys and values of all layers and heads."""
    both = settings.get("KV_CACHE_PRECISION", "u8")
    row = sum(
        _row_bytes(shape.head_dim, settings.get(f"{part}_CACHE_PRECISION", both), settings.get(f"{part}_CACHE_GROUP_SIZE"))
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
