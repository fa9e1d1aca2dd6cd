"""Batch job as its workers receive it, the models that answer its rows, and the generation of one part of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from normistral.artifact.manifest import read_manifest
from normistral.batch.documents import Document, Row, find_prompt, read_document, with_system
from normistral.batch.journal import PartJournal
from normistral.errors import EngineError, NormistralError, UsageError, first_line
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load
from normistral.runtime.overflow import OVERFLOW, LeftOut, Overflow
from normistral.server.backends.base import (
    BatchBackend,
    Batching,
    BatchSettings,
    Job,
    plan_cache_bytes,
    uses_continuous_batching,
)
from normistral.server.backends.create import create_backend
from normistral.server.model_handler import ModelHandler

_TENANT = "batch"  # all documents are one owner's
MOST_BEGINNINGS = 3  # so often a row may take its worker down with it, and no more
_MOST_ROWS_A_PART = 64
_FEW_PARTS, _MANY_PARTS = 4, 16  # of each worker, at least

Line = dict[str, Any]
Begin = Callable[[int], None]
"""Told the number of a row before it is worked on."""
OnRow = Callable[[int], None]
"""Told how many rows more are done."""


@dataclass(frozen=True, slots=True)
class WorkerEngine:
    """How the model is loaded, in every worker; as `normistral.load` takes it.

    Attributes:
        batching: "auto" computes many answers together where the engine can (OpenVINO on the CPU); "off"
            writes one after the other.
    """

    device: str = "CPU"
    exact: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    batching: Batching = "auto"


@dataclass(frozen=True, slots=True)
class Workers:
    """Where the models run.

    Attributes:
        count: models side by side under Ray; None is one, in this process and without Ray.
        threads: each one's; None divides the processors that there are.
        address: of a running Ray cluster; None starts one on this machine for as long as the job takes.
    """

    count: int | None = None
    threads: int | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True)
class BatchJob:
    """Prompt options and paths of a batch job; small, because it is sent to every worker.

    Attributes:
        artifact, source, folder: the model, the documents and the journal, as paths that every worker can open.
        run: which start of the job this is.
        instruction: text with {fields} of the document; None takes the document's own prompt or messages.
        system: system message.
        options: fields of `GenerationConfig`.
        overflow: what to do where a document is longer than the context.
    """

    artifact: Path
    source: Path
    folder: Path
    run: str
    instruction: str | None = None
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    overflow: Overflow = OVERFLOW


class Part(NamedTuple):
    """Rows for one worker."""

    number: int
    rows: list[Row]


def cut_parts(rows: Sequence[Row], workers: int, *, together: bool) -> list[Part]:
    """Split rows into parts, small enough to balance the workers at the end.

    Args:
        together: the rows of a part are computed together, so that they should be several.
    """
    share = len(rows) // (workers * (_FEW_PARTS if together else _MANY_PARTS))
    size = max(1, min(_MOST_ROWS_A_PART, share))
    return [Part(number, list(rows[start : start + size])) for number, start in enumerate(range(0, len(rows), size))]


def answer_part(answerer: SequentialAnswerer | ContinuousAnswerer, job: BatchJob, part: Part) -> Iterator[int]:
    """Answer the unanswered rows of a part; yields each row's number once its answer is on disk."""
    with PartJournal(job.folder, job.run, part.number) as journal:
        yield from sorted(journal.answered)
        missing = [row for row in part.rows if row.number not in journal.answered]
        hopeless = [row for row in missing if journal.begun[row.number] >= MOST_BEGINNINGS]
        for row in hopeless:
            given_up = NormistralError(
                f"{MOST_BEGINNINGS} workers ended while they answered this row",
                "see how much memory a worker needs and has",
            )
            journal.finish(failure_line(row, {}, given_up))
            yield row.number
        for line in answerer.answer_all([row for row in missing if row not in hopeless], journal.begin):
            journal.finish(line)
            yield line["row"]


def answer_line(row: Row, document: Document, completion: Completion, left_out: LeftOut | None = None) -> Line:
    """Output line of an answer."""
    return (
        _heading(row, document)
        | {"text": completion.text}
        | ({"reasoning": completion.reasoning} if completion.reasoning else {})
        | {"finish_reason": completion.finish_reason}
        | {"prompt_tokens": completion.timings.prompt_tokens, "new_tokens": completion.timings.new_tokens}
        | ({} if left_out is None else {"left_out": left_out.document()})
    )


def failure_line(row: Row, document: Document, exc: Exception) -> Line:
    """Output line of an error."""
    error = {"type": type(exc).__name__, "message": first_line(exc)}
    if isinstance(exc, NormistralError) and exc.hint:
        error["hint"] = exc.hint
    return _heading(row, document) | {"error": error}


def _heading(row: Row, document: Document) -> Line:
    return {"row": row.number} | ({"id": document["id"]} if "id" in document else {})


def open_answerer(job: BatchJob, engine: WorkerEngine, workers: int = 1) -> SequentialAnswerer | ContinuousAnswerer:
    """Load the model in this process.

    Args:
        workers: how many share the machine's memory.

    Raises:
        NormistralError: as `normistral.load`.
    """
    manifest = read_manifest(job.artifact)
    if not uses_continuous_batching(manifest, engine.batching, engine.device):
        return SequentialAnswerer(job, engine)
    context = manifest.context_length
    settings = BatchSettings(engine.batching, plan_cache_bytes(manifest, context, workers), context)
    served = ModelHandler.open(job.artifact, settings)
    created = create_backend(job.artifact, settings, EngineConfig(engine.device, engine.exact, engine.settings))
    return ContinuousAnswerer(job, created.batch, served, created.told.slots)


class SequentialAnswerer:
    """Sequential generation; a common prefix of the documents is computed once."""

    def __init__(self, job: BatchJob, engine: WorkerEngine) -> None:
        self._job = job
        self._model = load(job.artifact, device=engine.device, exact=engine.exact, settings=engine.settings)
        self._chat = None if self._model.manifest.template is None else self._model.chat(overflow=job.overflow)

    def answer_all(self, rows: Sequence[Row], begin: Begin) -> Iterator[Line]:
        """Output line of each row in order of completion: its answer or its error.

        Raises:
            EngineError: the engine failed; what was given so far holds.
        """
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
        """Free the model."""
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
        """As `SequentialAnswerer.answer_all`."""
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
        """Free the model."""
        self._batch.close()

    def _make_job(self, row: Row, document: Document) -> tuple[Job, LeftOut | None]:
        prompt, left_out = find_prompt(document, self._job.instruction), None
        if isinstance(prompt, str) and self._served.template is None:
            prompt_ids = self._served.encode_text(prompt)
        else:
            messages = with_system(prompt, self._job.system)
            prompt_ids, left_out = self._served.fit_chat(messages, self._job.overflow, self._job.options)
        config = self._served.resolve(self._job.options, len(prompt_ids))
        return Job(str(row.number), prompt_ids, config, _TENANT), left_out
