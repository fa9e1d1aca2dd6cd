"""Continuous batching of the rows of a batch job, on the server's backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from normistral.artifact.manifest import read_manifest
from normistral.batch.documents import Document, Row, find_prompt, read_document, with_system
from normistral.batch.job import BatchJob, Begin, Line, WorkerEngine, answer_line, failure_line
from normistral.errors import EngineError
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import BatchBackend
from normistral.server.backends.base import Job as GenerationJob
from normistral.server.backends.create import create_backend
from normistral.server.backends.settings import BatchSettings, plan_cache_bytes
from normistral.server.model_handler import ModelHandler

_TENANT = "batch"  # all documents are one owner's


def open_continuous(job: BatchJob, engine: WorkerEngine, workers: int) -> ContinuousAnswerer:
    """Load the model.

    Args:
        workers: how many share the machine's memory.
    """
    manifest = read_manifest(job.artifact)
    context = manifest.context_length
    settings = BatchSettings(engine.batching, plan_cache_bytes(manifest, context, workers), context, one_tenant=True)
    served = ModelHandler.open(job.artifact, settings)
    created = create_backend(job.artifact, settings, EngineConfig(engine.device, engine.exact, engine.settings))
    return ContinuousAnswerer(job, created.batch, served, created.slots)


@dataclass(slots=True)
class _UnderWay:
    row: Row
    document: Document
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
                    self._batch.add(self._make_job(row, document))
                except Exception as exc:
                    yield failure_line(row, document, exc)
                else:
                    under_way[str(row.number)] = _UnderWay(row, document)
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
                    yield answer_line(one.row, one.document, Completion.from_chunks(one.chunks))

    def close(self) -> None:
        """As `Answerer`."""
        self._batch.close()

    def _make_job(self, row: Row, document: Document) -> GenerationJob:
        prompt = find_prompt(document, self._job.instruction)
        if isinstance(prompt, str) and self._served.template is None:
            prompt_ids = self._served.encode_text(prompt)
        else:
            prompt_ids = self._served.encode_chat(with_system(prompt, self._job.system))
        config = self._served.resolve(self._job.options, len(prompt_ids))
        return GenerationJob(str(row.number), prompt_ids, config, _TENANT)
