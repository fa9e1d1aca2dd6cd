"""Protocol between the worker process and its backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from normistral.errors import NormistralError
from normistral.runtime.chunks import Chunk
from normistral.runtime.options import GenerationConfig


@dataclass(frozen=True, slots=True)
class Job:
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
