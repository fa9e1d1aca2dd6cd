"""Choice of the backend that serves an artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from normistral.artifact.artifact import Artifact
from normistral.errors import ArtifactError
from normistral.runtime import loading
from normistral.runtime.engines.base import EngineInfo
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import BatchBackend, Job, JobUpdate
from normistral.server.backends.openvino_pipeline import open_openvino_batch
from normistral.server.backends.openvino_sequence import find_unsupported
from normistral.server.backends.scheduler import RoundRobinScheduler
from normistral.server.backends.settings import (
    BATCHED_DEVICE,
    CONTINUOUS,
    ROUND_ROBIN,
    ROUND_ROBIN_SLOTS,
    BatchSettings,
    cache_token_bytes,
    uses_continuous_batching,
)


class LoadedBackend(NamedTuple):
    """A batch, and what there is to say of it.

    Attributes:
        slots: jobs that it should be given at once.
        batching: how they share the model, in a word.
        cache_tokens, cache_bytes: what the KV caches of all jobs hold at most, and take for it.
    """

    batch: BatchBackend
    capabilities: EngineInfo
    slots: int
    batching: str
    cache_tokens: int
    cache_bytes: int


def create_backend(
    folder: Path, settings: BatchSettings, config: EngineConfig, manifest_sha256: str | None = None
) -> LoadedBackend:
    """Load an artifact for many jobs at once.

    Args:
        manifest_sha256: of the artifact that it has to be; None takes what is there.

    Raises:
        NormistralError: as `normistral.load`; or it is another artifact.
    """
    artifact = _open(folder, manifest_sha256)
    manifest = artifact.manifest
    if uses_continuous_batching(manifest, settings.batching, config.device):
        return _compute_together(artifact, settings, config)
    model = loading.load(folder, config.device, exact=config.exact, settings=config.settings)
    fair = RoundRobinScheduler(model, settings)
    slots = settings.slots or ROUND_ROBIN_SLOTS
    return LoadedBackend(
        fair, model.capabilities, slots, ROUND_ROBIN, fair.room, fair.room * cache_token_bytes(manifest)
    )


def _compute_together(artifact: Artifact, settings: BatchSettings, config: EngineConfig) -> LoadedBackend:
    """An OpenVINO model on openvino_genai, with the library beside it for what that does not honour."""
    artifact.check_files()
    artifact.tokenizer  # noqa: B018 - a damaged one is found before the weights are loaded
    tuned = None if config.exact else loading.find_tuned_settings(artifact, BATCHED_DEVICE)
    opened = open_openvino_batch(artifact, settings, replace(config, tuned=tuned))

    def open_side() -> RoundRobinScheduler:
        _open(artifact.folder, artifact.manifest.sha256)
        side = replace(settings, cache_bytes=0)  # one context
        return RoundRobinScheduler(
            loading.load(artifact.folder, config.device, exact=config.exact, settings=config.settings), side
        )

    batch = FallbackBackend(opened.batch, open_side, find_unsupported)
    plan = opened.batch.plan
    return LoadedBackend(batch, opened.capabilities, plan.jobs, CONTINUOUS, plan.tokens, plan.bytes)


def _open(folder: Path, manifest_sha256: str | None) -> Artifact:
    """The artifact in a folder, its files unchecked, if it is the right one."""
    artifact = Artifact.open(folder, verify=False)
    if manifest_sha256 not in (None, artifact.manifest.sha256):
        raise ArtifactError(
            f"{folder.name} is another artifact than was opened at the start", "put that back, or start the server anew"
        )
    return artifact


class FallbackBackend:
    """Both as one `BatchBackend`.

    Args:
        main: for every job of which `find_unsupported` says nothing.
        open_side: loads what takes the others.
    """

    def __init__(
        self,
        main: BatchBackend,
        open_side: Callable[[], BatchBackend],
        find_unsupported: Callable[[GenerationConfig], str | None],
    ) -> None:
        self._main = main
        self._open_side = open_side
        self._find_unhonoured = find_unsupported
        self._side: BatchBackend | None = None

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

    def step(self) -> list[JobUpdate]:
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
    def _batches(self) -> list[BatchBackend]:
        return [self._main] if self._side is None else [self._main, self._side]
