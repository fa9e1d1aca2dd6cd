"""Protocol between the worker process and its backends; limits of jobs that share a model, and of their KV caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import msgspec

from normistral.artifact.manifest import Manifest
from normistral.errors import NormistralError, UsageError
from normistral.hardware import available_memory_bytes
from normistral.runtime.chunks import Chunk
from normistral.runtime.options import GenerationConfig

Batching = Literal["auto", "off"]

CONTINUOUS, ROUND_ROBIN = "together", "in turns"  # how an engine computes the answers under way
BATCHED_DEVICE = "CPU"  # where answers are computed together; elsewhere nothing was tried
ROUND_ROBIN_SLOTS = 8  # answers that take turns token by token; more would only be slower each
_FLOAT_BYTES = 4
_CACHE_SHARE = 4  # of the memory that the weights leave, the KV caches take one in so many
_MOST_CONTEXTS = 8  # that the KV caches hold, unless told otherwise
BATCH_SLOTS = 32  # more at once gain little on a CPU, and each would be slower (docs/decisions.md)


def never() -> bool:
    """Whether a generation is cancelled that nobody cancels so."""
    return False


class Job(msgspec.Struct, frozen=True, tag=True):
    """One answer to generate.

    Attributes:
        job_id: of the caller's choosing, unique among those under way.
        prompt_ids: the rendered and tokenised prompt, checked to fit the context.
        config: resolved and applicable to the model.
        tenant: whose it is; nothing computed for one tenant is ever reused for another.
    """

    job_id: str
    prompt_ids: Sequence[int]
    config: GenerationConfig
    tenant: str


class JobUpdate(NamedTuple):
    """What became of a job: the next chunk (the last one has a finish reason), or the error that ended it."""

    job_id: str
    output: Chunk | NormistralError


class BatchBackend(Protocol):
    """Jobs under way on one model; used from one thread."""

    def add(self, job: Job) -> None:
        """Take up a job; it moves with the next `step`.

        Raises:
            UsageError: an option that this engine cannot honour.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Give up a job, if it is still under way; nothing more is heard of it."""
        ...

    def step(self) -> list[JobUpdate]:
        """Compute for a moment: about a token for each job that has its turn, or a piece of a prompt.

        Empty when idle, and while prompts are being computed.
        """
        ...

    @property
    def idle(self) -> bool:
        """No job is under way."""
        ...

    def close(self) -> None:
        """Free engine and caches."""
        ...


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How jobs share a model.

    Attributes:
        batching: "auto" computes jobs together where the engine can; "off" lets them take turns.
        cache_bytes: for the KV caches of jobs under way and of those kept for their beginnings.
        slots: jobs under way at once; None is as many as suit the engine.
        context: the most tokens that prompt and answer take together.
    """

    batching: Batching
    cache_bytes: int
    context: int
    slots: int | None = None


def uses_continuous_batching(manifest: Manifest, batching: Batching, device: str) -> bool:
    """Whether one step of the engine is one of all answers under way; otherwise they take turns."""
    return batching == "auto" and manifest.format == "openvino" and device == BATCHED_DEVICE


def cache_token_bytes(manifest: Manifest) -> int:
    """The most that one token takes in a KV cache: keys and values of all layers in float32."""
    return manifest.architecture.kv_values_per_token * _FLOAT_BYTES


def plan_cache_bytes(manifest: Manifest, context: int, sharers: int, available: int | None = None) -> int:
    """Bytes for the KV caches of one model by the memory that there is: one to eight contexts.

    Args:
        context: the most tokens that prompt and answer take together.
        sharers: models or processes that divide what is left.
        available: bytes of memory; None is what is available now.
    """
    one_context = context * cache_token_bytes(manifest)
    available = available_memory_bytes() if available is None else available
    spare = max(0, available - manifest.total_bytes) // _CACHE_SHARE // sharers
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
