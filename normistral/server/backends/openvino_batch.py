"""Continuous batching on one OpenVINO model: `openvino_genai.ContinuousBatchingPipeline` computes and samples tokens.

The pipeline gets token ids and returns token ids; text is made here (`TextStream`). Its scheduler admits all requests
at once and, when the KV cache is full, preempts some and recomputes them later, or ends all of them where none can go
on. To avoid both, a job is admitted only when the cache has room for its prompt and all that it may generate.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ClosedError, EngineError, UsageError
from normistral.runtime.engines.openvino_settings import translated
from normistral.runtime.kernels.openvino_int4 import PackedWeights
from normistral.runtime.text_stream import TextStream
from normistral.server.backends.base import Job, JobUpdate
from normistral.server.backends.openvino_sequence import RunningSequence, find_unsupported, genai_config
from normistral.server.backends.settings import CachePlan

if TYPE_CHECKING:
    import openvino_genai

_NO_SUM = "m_full_vocab_log_sum_exp was not computed"


@dataclass(slots=True)
class _Request:
    """An answer that the pipeline works on, and the blocks of the KV cache that are kept for it."""

    answer: RunningSequence
    handle: Any
    blocks: int


class OpenVINOBatch:
    """Jobs under way on one pipeline; see `open_openvino_batch`.

    Args:
        plan: of the KV cache that the pipeline has.
        packed: weights that the pipeline uses beside its own.
        one_tenant: only jobs of the tenant that comes first are taken. It has to be so where the pipeline keeps
            prefixes, because it reuses them without asking whose they are.
        finite: whether the model's logits are, as a first answer showed. Where they are not, the pipeline draws from
            all tokens alike and says nothing.
    """

    def __init__(
        self,
        pipeline: openvino_genai.ContinuousBatchingPipeline,
        manifest: Manifest,
        tokenizer: Tokenizer,
        plan: CachePlan,
        *,
        one_tenant: bool,
        packed: PackedWeights | None = None,
        finite: bool = True,
    ) -> None:
        self.plan = plan
        self._finite = finite
        self._pipeline: openvino_genai.ContinuousBatchingPipeline | None = pipeline
        self._packed = packed
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._one_tenant = one_tenant
        self._tenant: str | None = None  # the first one
        self._waiting: deque[RunningSequence] = deque()
        self._running: dict[str, _Request] = {}
        self._leaving: list[_Request] = []  # their blocks are free after the next step
        self._request_ids = itertools.count()

    def add(self, job: Job) -> None:
        """Take up a job; it waits until the KV cache has room for all of it.

        Raises:
            UsageError: an option that openvino_genai does not honour, another tenant than the only one, or more tokens
                than the KV cache can ever hold.
            ClosedError: the batch was closed.
        """
        self._open_pipeline()
        if problem := find_unsupported(job.config):
            raise UsageError(f"this cannot be computed together with other answers: {problem}", "leave it out")
        if self._one_tenant and job.tenant != (self._tenant or job.tenant):
            raise UsageError("this model was loaded for one tenant, and there is another", "load it for many")
        self._tenant = job.tenant
        text = TextStream.after_prompt(self._tokenizer, self._manifest.reasoning, job.prompt_ids, job.config)
        answer = RunningSequence(job, text, self._manifest.stop_token_ids, self._manifest.context_length)
        if self._blocks(answer) > self.plan.blocks:
            raise UsageError(
                f"{len(job.prompt_ids)} tokens and {answer.room} new ones do not fit the KV cache of "
                f"{self.plan.tokens} tokens",
                "ask for fewer new tokens, shorten the prompt, or give the cache more memory",
            )
        self._waiting.append(answer)

    def cancel(self, job_id: str) -> None:
        """Give up a job; its place in the cache is free after the next step."""
        self._waiting = deque(answer for answer in self._waiting if answer.job.job_id != job_id)
        if job_id in self._running:
            self._end(job_id)

    def step(self) -> list[JobUpdate]:
        """Let in whom there is room for, and compute one step of all: a token each, or a piece of a prompt.

        The list may be empty while prompts are being computed.
        """
        progress = list(self._let_in())
        if not self._running and not self._leaving:
            return progress
        self._leaving.clear()  # whatever comes of it: the pipeline lets go of them in this step
        try:
            with translated("openvino_genai failed"):
                self._open_pipeline().step()
        except EngineError as exc:
            return [*progress, *self._give_up(not_finite() if says_not_finite(exc.message) else exc)]
        for request in list(self._running.values()):
            progress.extend(self._read(request))
        return progress

    @property
    def idle(self) -> bool:
        """No job is under way, and the pipeline holds none that has ended."""
        return not (self._waiting or self._running or self._leaving)

    def close(self) -> None:
        """Free pipeline and caches; jobs under way are heard of no more."""
        self._waiting.clear()
        for job_id in list(self._running):
            self._end(job_id)
        if self._leaving:
            self.step()  # the pipeline complains, on stdout, of requests that it still has when it ends
        self._pipeline = None
        self._packed = None

    def _let_in(self) -> Iterator[JobUpdate]:
        while self._waiting and len(self._running) < self.plan.jobs and self._has_room(self._waiting[0]):
            answer = self._waiting.popleft()
            try:
                yield from self._start(answer)
            except EngineError as exc:
                yield JobUpdate(answer.job.job_id, exc)

    def _has_room(self, answer: RunningSequence) -> bool:
        kept = sum(request.blocks for request in (*self._running.values(), *self._leaving))
        return kept + self._blocks(answer) <= self.plan.blocks

    def _blocks(self, answer: RunningSequence) -> int:
        return math.ceil(answer.tokens / self.plan.block_tokens)

    def _start(self, answer: RunningSequence) -> Iterator[JobUpdate]:
        if not self._finite:
            raise not_finite()
        answer.begin()
        while answer.must_force:
            chunk = answer.force()
            yield JobUpdate(answer.job.job_id, chunk)
            if chunk.finish_reason is not None:
                return
        config = genai_config(answer.job.config, answer.left, self._manifest.stop_token_ids, answer.part)
        with translated("openvino_genai did not take a request"):
            handle = self._pipeline_request(answer.token_ids, config)
        answer.part += 1
        self._running[answer.job.job_id] = _Request(answer, handle, self._blocks(answer))

    def _pipeline_request(self, token_ids: list[int], config: Any) -> Any:
        import openvino as ov

        prompt = ov.Tensor(np.array([token_ids], np.int64))
        return self._open_pipeline().add_request(next(self._request_ids), prompt, config)

    def _read(self, request: _Request) -> Iterator[JobUpdate]:
        """The chunks of what this step gave one request."""
        answer, job_id = request.answer, request.answer.job.job_id
        for token_id, logprob in _read_tokens(request.handle):
            if math.isnan(logprob):
                self._end(job_id)
                yield JobUpdate(job_id, not_finite())
                return
            chunk = answer.push(token_id, logprob)
            yield JobUpdate(job_id, chunk)
            if chunk.finish_reason is not None:
                self._end(job_id)
                return
            if answer.must_force:  # the model goes on behind what is put in
                self._end(job_id)
                self._waiting.appendleft(answer)
                return
        if not _is_running(request.handle):
            self._end(job_id)
            yield JobUpdate(job_id, EngineError("openvino_genai ended an answer on its own", "ask again"))

    def _end(self, job_id: str) -> None:
        request = self._running.pop(job_id)
        if _is_running(request.handle):
            request.handle.cancel()
            self._leaving.append(request)

    def _give_up(self, error: EngineError) -> list[JobUpdate]:
        """After an error in the pipeline, nobody knows what the caches hold: everything under way ends."""
        job_ids = list(self._running)
        for job_id in job_ids:
            self._end(job_id)
        return [JobUpdate(job_id, error) for job_id in job_ids]

    def _open_pipeline(self) -> openvino_genai.ContinuousBatchingPipeline:
        if self._pipeline is None:
            raise ClosedError("the model was closed", "load it again")
        return self._pipeline


def _read_tokens(handle: Any) -> Iterator[tuple[int, float]]:
    """Tokens that a request has given and nobody has read yet, with their log-probabilities."""
    while handle.can_read():
        (output,) = handle.read().values()
        yield from zip(output.generated_ids, output.generated_log_probs, strict=True)


def _is_running(handle: Any) -> bool:
    import openvino_genai

    running: bool = handle.get_status() == openvino_genai.GenerationStatus.RUNNING
    return running


def says_not_finite(message: str) -> bool:
    """Whether openvino_genai failed because logits were not finite: its sampler takes such a sum for none."""
    return _NO_SUM in message


def not_finite() -> EngineError:
    """The error of the library."""
    return EngineError(
        "the model returned logits that are not finite",
        "try --exact; if that helps, this device cannot run this artifact",
    )
