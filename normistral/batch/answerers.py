"""The engines of a batch job: continuous batching on the server's backend, or sequential generation."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from normistral.artifact.manifest import read_manifest
from normistral.batch.documents import Document, Row, find_prompt, read_document, with_system
from normistral.batch.job import Answerer, BatchJob, Begin, Line, WorkerEngine, answer_line, failure_line
from normistral.errors import EngineError, UsageError
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load
from normistral.runtime.overflow import LeftOut
from normistral.server.backends.base import BatchBackend
from normistral.server.backends.base import Job as GenerationJob
from normistral.server.backends.create import create_backend
from normistral.server.backends.settings import BatchSettings, plan_cache_bytes, uses_continuous_batching
from normistral.server.model_handler import ModelHandler


def open_answerer(job: BatchJob, engine: WorkerEngine, workers: int = 1) -> Answerer:
    """Load the model in this process.

    Args:
        workers: how many share the machine's memory.

    Raises:
        NormistralError: as `normistral.load`.
    """
    if uses_continuous_batching(read_manifest(job.artifact), engine.batching, engine.device):
        return open_continuous(job, engine, workers)
    return SequentialAnswerer(job, engine)


class SequentialAnswerer:
    """Sequential generation; a common prefix of the documents is computed once."""

    def __init__(self, job: BatchJob, engine: WorkerEngine) -> None:
        self._job = job
        self._model = load(job.artifact, device=engine.device, exact=engine.exact, settings=engine.settings)
        self._chat = None if self._model.manifest.template is None else self._model.chat(overflow=job.overflow)

    def answer_all(self, rows: Sequence[Row], begin: Begin) -> Iterator[Line]:
        """As `Answerer`."""
        for row in rows:
            begin(row.number)
            document: Document = {}
            try:
                document = read_document(self._job.source, row)
                completion = self._complete(document)
                yield answer_line(row, document, completion, None if self._chat is None else self._chat.left_out)
            except EngineError:
                raise
            except Exception as exc:
                yield failure_line(row, document, exc)

    def close(self) -> None:
        """As `Answerer`."""
        self._model.close()

    def _complete(self, document: Document) -> Completion:
        prompt = find_prompt(document, self._job.instruction)
        if self._chat is None:
            if not isinstance(prompt, str):
                raise UsageError(f"{self._model.name} is a base model and knows no conversation", 'give "prompt"')
            return self._model.generate(prompt, **self._job.options)
        messages = with_system(prompt, self._job.system)
        self._chat.replace(messages[:-1])
        return self._chat.send(messages[-1]["content"], **self._job.options)


_TENANT = "batch"  # all documents are one owner's


def open_continuous(job: BatchJob, engine: WorkerEngine, workers: int) -> ContinuousAnswerer:
    """Load the model.

    Args:
        workers: how many share the machine's memory.
    """
    manifest = read_manifest(job.artifact)
    context = manifest.context_length
    settings = BatchSettings(engine.batching, plan_cache_bytes(manifest, context, workers), context)
    served = ModelHandler.open(job.artifact, settings)
    created = create_backend(job.artifact, settings, EngineConfig(engine.device, engine.exact, engine.settings))
    return ContinuousAnswerer(job, created.batch, served, created.slots)


@dataclass(slots=True)
class _UnderWay:
    row: Row
    document: Document
    left_out: LeftOut | None
    chunks: list[Chunk] = field(default_factory=list)


class ContinuousAnswerer:
    """Generation of many rows at once.

    Args:
        slots: rows at once.
    """

    def __init__(self, job: BatchJob, batch: BatchBackend, served: ModelHandler, slots: int) -> None:
        self._job, self._batch, self._served, self._slots = job, batch, served, slots

    def answer_all(self, rows: Sequence[Row], begin: Begin) -> Iterator[Line]:
        """As `Answerer`."""
        waiting, under_way = deque(rows), dict[str, _UnderWay]()
        while waiting or under_way:
            while waiting and len(under_way) < self._slots:
                row = waiting.popleft()
                begin(row.number)
                document: Document = {}
                try:
                    document = read_document(self._job.source, row)
                    job, left_out = self._make_job(row, document)
                    self._batch.add(job)
                except Exception as exc:
                    yield failure_line(row, document, exc)
                else:
                    under_way[str(row.number)] = _UnderWay(row, document, left_out)
            for job_id, outcome in self._batch.step():
                one = under_way[job_id]
                if isinstance(outcome, EngineError):
                    raise outcome
                if isinstance(outcome, Exception):
                    yield failure_line(one.row, under_way.pop(job_id).document, outcome)
                    continue
                one.chunks.append(outcome)
                if outcome.finish_reason is not None:
                    del under_way[job_id]
                    yield answer_line(one.row, one.document, Completion.from_chunks(one.chunks), one.left_out)

    def close(self) -> None:
        """As `Answerer`."""
        self._batch.close()

    def _make_job(self, row: Row, document: Document) -> tuple[GenerationJob, LeftOut | None]:
        prompt, left_out = find_prompt(document, self._job.instruction), None
        if isinstance(prompt, str) and self._served.template is None:
            prompt_ids = self._served.encode_text(prompt)
        else:
            messages = with_system(prompt, self._job.system)
            prompt_ids, left_out = self._served.fit_chat(messages, self._job.overflow, self._job.options)
        config = self._served.resolve(self._job.options, len(prompt_ids))
        return GenerationJob(str(row.number), prompt_ids, config, _TENANT), left_out
