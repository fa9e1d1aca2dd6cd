"""Choice of the engine for a batch job, and sequential generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from normistral.artifact.manifest import read_manifest
from normistral.batch.documents import Document, Row, find_prompt, read_document, with_system
from normistral.batch.job import Answerer, BatchJob, Begin, Line, WorkerEngine, answer_line, failure_line
from normistral.errors import EngineError, UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.loading import load
from normistral.server.backends.settings import uses_continuous_batching


def has_genai() -> bool:
    """Whether openvino_genai is installed."""
    return find_spec("openvino_genai") is not None


def open_answerer(job: BatchJob, engine: WorkerEngine, workers: int = 1) -> Answerer:
    """Load the model in this process.

    Args:
        workers: how many share the machine's memory.

    Raises:
        NormistralError: as `normistral.load`.
    """
    if uses_continuous_batching(read_manifest(job.artifact), engine.batching, engine.device) and has_genai():
        from normistral.batch.continuous import open_continuous

        return open_continuous(job, engine, workers)
    return SequentialAnswerer(job, engine)


class SequentialAnswerer:
    """Sequential generation; a common prefix of the documents is computed once."""

    def __init__(self, job: BatchJob, engine: WorkerEngine) -> None:
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
