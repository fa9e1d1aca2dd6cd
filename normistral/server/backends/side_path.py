"""A batch for most jobs, and beside it the library for those that ask for what the batch cannot do.

The library is loaded when the first of those comes, and stays: weights that an engine has laid out for its processor
are then there twice. Neither knows of the other; while both have jobs, they take turns step by step.
"""

from __future__ import annotations

from collections.abc import Callable

from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import Batch, Job, Progress


class SidePath:
    """Both as one `Batch`.

    Args:
        main: for every job of which `find_unhonoured` says nothing.
        open_side: loads what takes the others.
    """

    def __init__(
        self, main: Batch, open_side: Callable[[], Batch], find_unhonoured: Callable[[GenerationConfig], str | None]
    ) -> None:
        self._main = main
        self._open_side = open_side
        self._find_unhonoured = find_unhonoured
        self._side: Batch | None = None

    def add(self, job: Job) -> None:
        """Take up a job.

        Raises:
            NormistralError: it is refused, or the library cannot be loaded beside the batch.
        """
        if self._find_unhonoured(job.config) is None:
            self._main.add(job)
            return
        if self._side is None:
            self._side = self._open_side()
        self._side.add(job)

    def cancel(self, job_id: str) -> None:
        """Give up a job, wherever it is."""
        for batch in self._batches:
            batch.cancel(job_id)

    def step(self) -> list[Progress]:
        """A step of each that has something to do."""
        return [progress for batch in self._batches if not batch.idle for progress in batch.step()]

    @property
    def idle(self) -> bool:
        """No job is under way."""
        return all(batch.idle for batch in self._batches)

    def close(self) -> None:
        """Free both."""
        for batch in self._batches:
            batch.close()

    @property
    def _batches(self) -> list[Batch]:
        return [self._main] if self._side is None else [self._main, self._side]
