"""Batch jobs: answers to many documents in a file; a killed job resumes.

    from normistral.batch.run import run_batch
    run_batch("normistral-int4", "letters.jsonl", "summaries.jsonl", instruction="Summarise: {text}", workers=4)

The answers are in the order of the documents. Durability: `normistral.batch.journal`.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import MANIFEST_NAME, Manifest
from normistral.batch.documents import TEXT_SUFFIXES, Row, check_instruction, index_documents
from normistral.batch.job import (
    BatchJob,
    OnRow,
    Part,
    WorkerEngine,
    Workers,
    answer_part,
    cut_parts,
    open_answerer,
)
from normistral.batch.journal import (
    begin_run,
    find_answers,
    join_answers,
    open_journal,
    parts_folder,
    remove_journal,
)
from normistral.errors import NormistralError, UsageError
from normistral.files import explain, require_place, sha256_file
from normistral.progress import NoProgress, Progress
from normistral.runtime.options import GenerationConfig, require_applicable, resolve_options
from normistral.runtime.overflow import OVERFLOW, Overflow, require_overflow
from normistral.server.backends.base import uses_continuous_batching


@dataclass(frozen=True, slots=True)
class BatchSummary:
    """Result of a batch job.

    Attributes:
        rows: documents, and so lines of the output.
        failed: of these, how many have an error in place of an answer.
        cut_off: answers that ended because of `max_new_tokens` or a full context.
        found: rows that an earlier run had done.
        prompt_tokens, new_tokens: of all answers.
        seconds: of this run.
    """

    output: str
    rows: int
    failed: int
    cut_off: int
    found: int
    prompt_tokens: int
    new_tokens: int
    seconds: float


def run_batch(
    artifact: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    instruction: str | None = None,
    system: str | None = None,
    engine: WorkerEngine | None = None,
    workers: Workers | None = None,
    overflow: Overflow = OVERFLOW,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> BatchSummary:
    """Answer every document and write OUTPUT, a line of JSON for each.

    Args:
        source: a JSONL file, or a folder of texts.
        instruction: what to ask, with {fields} of the document; None takes the document's own "prompt" or "messages".
        system: system message.
        engine, workers: None is the default of each.
        overflow: what to do where a document is longer than the context, as `Model.chat` takes it.
        force: replace OUTPUT.
        options: fields of `GenerationConfig`.

    Raises:
        UsageError: a wrong option; OUTPUT exists, or came while the job ran, without `force`; or what an earlier run
            left belongs to another job.
        NormistralError: the model cannot be loaded, or workers cannot be had; what is answered is kept, and the same
            call goes on from there.
    """
    started = time.perf_counter()
    engine, workers, progress = engine or WorkerEngine(), workers or Workers(), progress or NoProgress()
    opened = Artifact.find(artifact)
    folder, manifest = opened.folder.absolute(), opened.manifest
    source, output = Path(source).absolute(), Path(output).absolute()
    job = BatchJob(folder, source, parts_folder(output), "", instruction, system, options, overflow)
    _check(job, manifest, output, workers, force=force)
    with progress.stage(f"looking through {source.name}"):
        index = index_documents(source)
    with open_journal(output, _identity(job, index.sha256, engine)) as parts:
        job = replace(job, run=begin_run(parts))
        answered, _ = find_answers(parts)
        missing = [row for row in index.rows if row.number not in answered]
        if answered:
            progress.note(f"{len(answered):,} of {len(index.rows):,} documents were answered before")
        if missing:
            with progress.stage("answering", total=len(missing), unit="documents") as stage:
                _answer(job, missing, manifest, engine, workers, stage.advance)
        places, lines = find_answers(parts)
        lost = [row.number for row in index.rows if row.number not in places]
        if lost:
            raise NormistralError(f"{len(lost)} rows have no answer, the first is {lost[0]}", "run the same again")
        _require_new(output, force=force)  # it may have come while the job ran
        try:
            join_answers((places[row.number] for row in index.rows), output)
        except OSError as exc:
            reason, hint = explain(exc)
            raise NormistralError(f"cannot write {output}: {reason}", f"{hint}; then run the same again") from exc
        remove_journal(parts)
    return BatchSummary(
        output=str(output),
        rows=len(index.rows),
        failed=sum(line.error is not None for line in lines.values()),
        cut_off=sum(line.finish_reason in ("length", "context") for line in lines.values()),
        found=len(answered),
        prompt_tokens=sum(line.prompt_tokens for line in lines.values()),
        new_tokens=sum(line.new_tokens for line in lines.values()),
        seconds=time.perf_counter() - started,
    )


def _answer(
    job: BatchJob, rows: list[Row], manifest: Manifest, engine: WorkerEngine, workers: Workers, on_row: OnRow
) -> None:
    if workers.count is not None:
        from normistral.batch.ray_data import answer_on_ray

        parts = cut_parts(
            rows, workers.count, together=uses_continuous_batching(manifest, engine.batching, engine.device)
        )
        answer_on_ray(job, parts, manifest.format, engine, workers, on_row)
        return
    with closing(open_answerer(job, engine)) as answerer:
        for _ in answer_part(answerer, job, Part(0, rows)):
            on_row(1)


def _check(job: BatchJob, manifest: Manifest, output: Path, workers: Workers, *, force: bool) -> None:
    name = job.artifact.name
    require_applicable(resolve_options(manifest.sampling, job.options), manifest, name)
    require_overflow(job.overflow)
    if job.overflow != OVERFLOW and manifest.template is None:
        raise UsageError(f"{name} is a base model and knows no conversation to leave anything out of", "leave it out")
    if job.instruction is not None:
        check_instruction(job.instruction)
    if job.system is not None and manifest.template is None:
        raise UsageError(f"{name} is a base model and knows no system message", "leave it out")
    if workers.count is not None and workers.count < 1:
        raise UsageError(f"there cannot be {workers.count} workers", "take 1 or more")
    if workers.threads is not None and workers.threads < 1:
        raise UsageError(f"a worker cannot have {workers.threads} threads", "take 1 or more")
    if workers.count is None and (workers.threads is not None or workers.address is not None):
        raise UsageError("without --workers there is no Ray", "add --workers N")
    require_place(output)
    if _is_document(output, job.source):
        raise UsageError(f"{output} would be one of the documents", "choose an OUTPUT elsewhere, such as answers.jsonl")
    _require_new(output, force=force)


def _require_new(output: Path, *, force: bool) -> None:
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output} exists already", "choose another OUTPUT, or replace it with --force")


def _is_document(output: Path, source: Path) -> bool:
    """Whether OUTPUT is INPUT, or belongs to it."""
    if source.is_dir():
        return output.suffix.lower() in TEXT_SUFFIXES and output.resolve().is_relative_to(source.resolve())
    return output.exists() and source.exists() and output.samefile(source)


def _identity(job: BatchJob, documents: str, engine: WorkerEngine) -> dict[str, Any]:
    """Inputs that determine the answers; workers and machines do not.

    Args:
        documents: their SHA-256.
    """
    # With a seed the answers are the same together and one by one, so either may continue what the other began.
    seeded = GenerationConfig(seed=job.options.get("seed")).reproducible
    return {
        "artifact": sha256_file(job.artifact / MANIFEST_NAME),
        "documents": documents,
        "instruction": job.instruction,
        "system": job.system,
        "device": engine.device,
        "exact": engine.exact,
        "settings": dict(engine.settings),
        "batching": "off" if seeded else engine.batching,
        "options": job.options,
    } | ({} if job.overflow == OVERFLOW else {"overflow": job.overflow})  # so that journals of before it still fit
