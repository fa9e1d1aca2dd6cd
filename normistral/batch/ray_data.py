"""A batch job on Ray Data: a pool of actors with one model each.

Only positions of rows go through Ray, never their text. When a worker dies, Ray restarts it and repeats the part; the
journal records the finished rows of that part.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from normistral.batch.job import BatchJob, OnRow, Part, WorkerEngine, Workers, answer_part, open_answerer
from normistral.batch.journal import JOB_NAME
from normistral.errors import NormistralError, UsageError, first_line
from normistral.hardware import plan_threads, read_machine
from normistral.ray_runtime import cpu_settings, ray_running, threads_per_model
from normistral.server.ipc import Failure

# Two parts wait at each worker, so that none stands still between them; more would be missing elsewhere at the end.
_PARTS_AT_A_WORKER = 2


def answer_on_ray(
    job: BatchJob, parts: list[Part], format: str, engine: WorkerEngine, workers: Workers, on_row: OnRow
) -> None:
    """Answer all parts with `workers.count` models at once.

    Raises:
        UsageError: more workers than cores.
        MissingExtraError: Ray is not installed.
        NormistralError: there is no cluster, or the workers could not do their work.
    """
    assert workers.count is not None
    here = plan_threads(read_machine())
    if workers.address is None:
        threads_per_model(here, workers.count)
    with ray_running(workers.address, here) as ray:
        cores = int(ray.cluster_resources().get("CPU", 0))
        threads = workers.threads or threads_per_model(cores, workers.count)
        if threads * workers.count > cores:
            raise UsageError(
                f"{workers.count} workers of {threads} threads cannot share {cores} cores", "take fewer of either"
            )
        from ray.data import ActorPoolStrategy, DataContext, from_items
        from ray.exceptions import RayError

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        settings = cpu_settings(format, engine.device, threads, engine.settings)
        try:
            answered = from_items(
                [{"part": msgspec.json.encode(part)} for part in parts], override_num_blocks=len(parts)
            ).map_batches(
                _Worker,
                fn_constructor_kwargs={
                    "job": job,
                    "engine": replace(engine, settings=settings),
                    "workers": workers.count,
                },
                batch_size=1,
                compute=ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=_PARTS_AT_A_WORKER),
                num_cpus=threads,
            )
            for row in answered.iter_rows():
                if row["failure"]:
                    raise msgspec.json.decode(row["failure"], type=Failure).as_error()
                on_row(int(row["answered"]))
        except RayError as exc:
            raise NormistralError(f"the workers failed: {first_line(exc)}", "see Ray's logs") from exc


class _Worker:
    """An actor of the pool: one model, loaded once.

    What goes wrong is told as data: out of an exception, Ray would make a text with a traceback.
    """

    def __init__(self, job: BatchJob, engine: WorkerEngine, workers: int) -> None:
        self._job = job
        self._failure: NormistralError | None = None
        try:
            for path in (job.artifact, job.source, job.folder / JOB_NAME):
                _require_shared(path)
            self._answerer = open_answerer(job, engine, workers)
        except NormistralError as error:
            self._failure = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answered, failure = 0, b""
        try:
            if self._failure is not None:
                raise self._failure
            for encoded in batch["part"]:
                part = msgspec.json.decode(encoded, type=Part)
                answered += sum(1 for _ in answer_part(self._answerer, self._job, part))
        except NormistralError as error:
            failure = _told(error)
        except OSError as exc:
            failure = _told(NormistralError(f"cannot write in {self._job.folder}: {exc.strerror}", "make room"))
        return {"answered": [answered], "failure": [failure]}


def _told(error: NormistralError) -> bytes:
    return msgspec.json.encode(Failure.of(error))


def _require_shared(path: Path) -> None:
    if not path.exists():
        raise UsageError(f"this machine has no {path}", "keep artifact, input and output where every machine sees them")
