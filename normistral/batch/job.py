"""Batch job as its workers receive it, and generation of one part of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from normistral.batch.documents import Document, Row
from normistral.batch.journal import PartJournal
from normistral.errors import NormistralError, first_line
from normistral.runtime.chunks import Completion
from normistral.runtime.overflow import OVERFLOW, LeftOut, Overflow
from normistral.server.backends.settings import Batching

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


class Answerer(Protocol):
    """A loaded model that answers rows."""

    def answer_all(self, rows: Sequence[Row], begin: Begin) -> Iterator[Line]:
        """Output line of each row in order of completion: its answer or its error.

        Raises:
            EngineError: the engine failed; what was given so far holds.
        """
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def cut_parts(rows: Sequence[Row], workers: int, *, together: bool) -> list[Part]:
    """Split rows into parts, small enough to balance the workers at the end.

    Args:
        together: the rows of a part are computed together, so that they should be several.
    """
    share = len(rows) // (workers * (_FEW_PARTS if together else _MANY_PARTS))
    size = max(1, min(_MOST_ROWS_A_PART, share))
    return [Part(number, list(rows[start : start + size])) for number, start in enumerate(range(0, len(rows), size))]


def answer_part(answerer: Answerer, job: BatchJob, part: Part) -> Iterator[int]:
    """Answer the unanswered rows of a part; yields each row's number once its answer is on disk."""
    with PartJournal(job.folder, job.run, part.number) as journal:
        yield from sorted(journal.answered)
        missing = [row for row in part.rows if row.number not in journal.answered]
        hopeless = [row for row in missing if journal.begun[row.number] >= MOST_BEGINNINGS]
        for row in hopeless:
            journal.finish(failure_line(row, {}, _gave_up()))
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


def _gave_up() -> NormistralError:
    return NormistralError(
        f"{MOST_BEGINNINGS} workers ended while they answered this row", "see how much memory a worker needs and has"
    )
