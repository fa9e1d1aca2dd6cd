"""Limits of concurrent sequences on one model: their number, and the bytes of their KV caches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from normistral.artifact.manifest import Architecture, Manifest
from normistral.errors import UsageError
from normistral.hardware import available_memory_bytes

Batching = Literal["auto", "off"]

CONTINUOUS, ROUND_ROBIN = "together", "in turns"  # how an engine computes the answers under way
BATCHED_DEVICE = "CPU"  # where answers are computed together; elsewhere nothing was tried
ROUND_ROBIN_SLOTS = 8  # answers that take turns token by token; more would only be slower each
_FLOAT_BYTES = 4
_CACHE_SHARE = 4  # of the memory that the weights leave, the KV caches take one in so many
_MOST_CONTEXTS = 8  # that the KV caches hold, unless told otherwise
BLOCK_TOKENS = 32  # what openvino_genai gives out at once on a CPU
_BITS = {"u4": 4, "i4": 4, "u8": 8, "i8": 8, "f16": 16, "bf16": 16, "f32": 32}
_ENDS = 8  # bytes of scale and zero point beside the codes of a group
BATCH_SLOTS = 32  # more at once gain little on a CPU, and each would be slower (docs/decisions.md)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How jobs share a model.

    Attributes:
        batching: "auto" computes jobs together where the engine can; "off" lets them take turns.
        cache_bytes: for the KV caches of jobs under way and of those kept for their beginnings.
        slots: jobs under way at once; None is as many as suit the engine.
        context: the most tokens that prompt and answer take together.
        one_tenant: all jobs are of one tenant. An engine that keeps beginnings without asking whose they are may do so
            only then.
    """

    batching: Batching
    cache_bytes: int
    context: int
    slots: int | None = None
    one_tenant: bool = False


def uses_continuous_batching(manifest: Manifest, batching: Batching, device: str) -> bool:
    """Whether one step of the engine is one of all answers under way; otherwise they take turns."""
    return batching == "auto" and manifest.format == "openvino" and device == BATCHED_DEVICE


def cache_token_bytes(manifest: Manifest) -> int:
    """The most that one token takes in a KV cache: keys and values of all layers in float32."""
    return manifest.architecture.kv_values_per_token * _FLOAT_BYTES


def plan_cache_bytes(manifest: Manifest, context: int, sharers: int) -> int:
    """Bytes for the KV caches of one model by the memory available now: one to eight contexts.

    Args:
        context: the most tokens that prompt and answer take together.
        sharers: models or processes that divide what is left.
    """
    one_context = context * cache_token_bytes(manifest)
    spare = max(0, available_memory_bytes() - manifest.total_bytes) // _CACHE_SHARE // sharers
    return max(one_context, min(spare, _MOST_CONTEXTS * one_context))


def require_one_context(manifest: Manifest, settings: BatchSettings) -> None:
    """Raise UsageError unless the cache holds one job of the longest kind, where jobs take turns.

    What is computed together has caches of the engine's precision, and tells when it is loaded (`cache_plan`).
    """
    needed = settings.context * cache_token_bytes(manifest)
    if settings.cache_bytes < needed:
        raise UsageError(
            f"a KV cache of {settings.cache_bytes / 2**20:.0f} MiB does not hold one context of "
            f"{settings.context} tokens ({needed / 2**20:.0f} MiB)",
            "give --cache-mib more, or take a shorter --max-context",
        )


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
