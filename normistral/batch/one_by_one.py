"""Answers one after the other, on the library's own decode loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from normistral.batch.documents import Document, Row, read_document
from normistral.batch.job import Begin, Engine, Job, Line, answer_line, failure_line
from normistral.batch.questions import find_prompt, with_system
from normistral.errors import EngineError, UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.loading import load


class OneByOne:
    """What the documents begin with in common, such as an instruction, is computed once."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job = job
        self._model = load(job.artifact, device=engine.device, exact=engine.exact, settings=engine.settings)
        self._chat = None if self._model.manifest.template is None else self._model.chat()

    def answer_all(self, rows: Sequence[Row], begin: Begin) -> Iterator[Line]:
        """As `Answerer`."""
        for row in rows:
            begin(row.number)
            document: Document = {}
            try:
                document = read_document(self._job.source, row)
                yield answer_line(row, document, self._complete(document))
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
