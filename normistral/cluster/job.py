"""A batch job as its workers see it: what is asked, and how one part of the rows is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from normistral.cluster.documents import Document, Row, read_document
from normistral.cluster.journal import PartJournal
from normistral.cluster.questions import find_prompt
from normistral.errors import NormistralError, UsageError, first_line
from normistral.runtime.chunks import Completion
from normistral.runtime.model import Model

MOST_BEGINNINGS = 3  # so often a row may take its worker down with it, and no more
_MOST_ROWS_A_PART = 64
_PARTS_A_WORKER = 16


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of every document, and where everything is; small, for it goes to every worker.

    Attributes:
        artifact, source, folder: the model, the documents and the journal, as paths that every worker can open.
        run: which start of the job this is.
        instruction: text with {fields} of the document; None takes the document's own prompt or messages.
        system: system message.
        options: fields of `GenerationConfig`.
    """

    artifact: Path
    source: Path
    folder: Path
    run: str
    instruction: str | None = None
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Part(NamedTuple):
    """Rows that one worker answers one after the other."""

    number: int
    rows: list[Row]


def cut_parts(rows: Sequence[Row], workers: int) -> list[Part]:
    """Pieces small enough that no worker is left alone with much at the end, and not more than needed for that."""
    size = max(1, min(_MOST_ROWS_A_PART, len(rows) // (workers * _PARTS_A_WORKER)))
    return [Part(number, list(rows[start : start + size])) for number, start in enumerate(range(0, len(rows), size))]


def answer_part(model: Model, job: Job, part: Part) -> Iterator[int]:
    """Answer the rows of a part that nobody has answered yet; gives each row's number once its answer is on disk."""
    with PartJournal(job.folder, job.run, part.number) as journal:
        answerer = Answerer(model, job)
        for row in part.rows:
            if row.number not in journal.answered:
                if journal.begun[row.number] >= MOST_BEGINNINGS:
                    journal.finish(_failure(row, {}, _gave_up()))
                else:
                    journal.begin(row.number)
                    journal.finish(answerer.answer(row))
            yield row.number


class Answerer:
    """Answers documents; what they begin with in common, such as an instruction, is computed once."""

    def __init__(self, model: Model, job: Job) -> None:
        self._model, self._job = model, job
        self._chat = None if model.manifest.template is None else model.chat()

    def answer(self, row: Row) -> dict[str, Any]:
        """The line about a row: its answer, or the error that it met; a bad row stops nothing."""
        document: Document = {}
        try:
            document = read_document(self._job.source, row)
            completion = self._complete(document)
        except Exception as exc:
            return _failure(row, document, exc)
        timings = completion.timings
        return (
            _heading(row, document)
            | {"text": completion.text}
            | ({"reasoning": completion.reasoning} if completion.reasoning else {})
            | {"finish_reason": completion.finish_reason}
            | {"prompt_tokens": timings.prompt_tokens, "new_tokens": timings.new_tokens}
        )

    def _complete(self, document: Document) -> Completion:
        prompt = find_prompt(document, self._job.instruction)
        if self._chat is None:
            if not isinstance(prompt, str):
                raise UsageError(f"{self._model.name} is a base model and knows no conversation", 'give "prompt"')
            return self._model.generate(prompt, **self._job.options)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self._job.system is not None:
            if messages[0]["role"] == "system":
                raise UsageError("the document has a system message of its own", "leave --system out, or take it out")
            messages = [{"role": "system", "content": self._job.system}, *messages]
        self._chat.replace(messages[:-1])
        return self._chat.send(messages[-1]["content"], **self._job.options)


def _heading(row: Row, document: Document) -> dict[str, Any]:
    return {"row": row.number} | ({"id": document["id"]} if "id" in document else {})


def _failure(row: Row, document: Document, exc: Exception) -> dict[str, Any]:
    error = {"type": type(exc).__name__, "message": first_line(exc)}
    if isinstance(exc, NormistralError) and exc.hint:
        error["hint"] = exc.hint
    return _heading(row, document) | {"error": error}


def _gave_up() -> NormistralError:
    return NormistralError(
        f"{MOST_BEGINNINGS} workers ended while they answered this row", "see how much memory a worker needs and has"
    )


OnRow = Callable[[int], None]
"""Told how many rows more are done."""
