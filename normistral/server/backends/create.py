"""Choice of the backend that serves an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from normistral.artifact.artifact import Artifact
from normistral.errors import ArtifactError
from normistral.runtime import loading
from normistral.runtime.engines.base import Backend, EngineInfo, describe_arithmetic
from normistral.runtime.engines.batching import BatchingBackend
from normistral.runtime.engines.onnx_batch import OnnxBatch
from normistral.runtime.engines.onnxruntime import OnnxBackend
from normistral.runtime.engines.openvino_paged import PagedBackend
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import (
    CONTINUOUS,
    ROUND_ROBIN,
    ROUND_ROBIN_SLOTS,
    BatchBackend,
    BatchSettings,
    cache_token_bytes,
)
from normistral.server.backends.continuous import ContinuousScheduler, plan_cache
from normistral.server.backends.prefixes import LoadedPrefix, NamedPrefix, load_prefixes
from normistral.server.backends.scheduler import RoundRobinScheduler
from normistral.server.ipc import Loaded


class LoadedBackend(NamedTuple):
    """A batch; what its engine can, what the server is told of it, and the prefixes in its KV cache."""

    batch: BatchBackend
    capabilities: EngineInfo
    told: Loaded
    prefixes: Sequence[LoadedPrefix]


def create_backend(
    folder: Path,
    settings: BatchSettings,
    config: EngineConfig,
    manifest_sha256: str | None = None,
    prefixes: Sequence[NamedPrefix] = (),
) -> LoadedBackend:
    """Load an artifact for many jobs at once.

    Args:
        manifest_sha256: of the artifact that it has to be; None takes what is there.
        prefixes: to have in the KV cache.

    Raises:
        NormistralError: as `normistral.load` and `load_prefixes`; or it is another artifact, or the KV cache is too
            small.
    """
    manifest = Artifact.open(folder, verify=False).manifest
    if manifest_sha256 not in (None, manifest.sha256):
        raise ArtifactError(
            f"{folder.name} is another artifact than was opened at the start", "put that back, or start the server anew"
        )
    model = loading.load(folder, config.device, exact=config.exact, settings=config.settings)
    batching = _find_batching(model.backend, prefixes)
    loaded = load_prefixes(model, prefixes)
    batch: ContinuousScheduler | RoundRobinScheduler
    if settings.batching == "auto" and batching is not None:
        plan = plan_cache(batching.token_bytes, settings)
        batch = ContinuousScheduler(model, batching, plan, loaded)
        slots, how, tokens, cache_bytes = plan.jobs, CONTINUOUS, plan.tokens, plan.bytes
    else:
        batch = RoundRobinScheduler(model, settings, loaded)
        slots, how, tokens = settings.slots or ROUND_ROBIN_SLOTS, ROUND_ROBIN, batch.room
        cache_bytes = tokens * cache_token_bytes(manifest)
    info, described = model.capabilities, [prefix.describe() for prefix in loaded]
    arithmetic = describe_arithmetic(info)
    told = Loaded(slots, info.name, info.device, info.settings, how, tokens, cache_bytes, arithmetic, described)
    return LoadedBackend(batch, info, told, loaded)


def _find_batching(backend: Backend, prefixes: Sequence[NamedPrefix]) -> BatchingBackend | None:
    """What computes several sequences in one forward on these weights; None where nothing does.

    With onnxruntime, prefixes are in caches of their own, from which only jobs that take turns can copy.
    """
    if isinstance(backend, PagedBackend):
        return backend
    if isinstance(backend, OnnxBackend) and backend.decoder.takes_lengths and not prefixes:
        return OnnxBatch(backend.decoder, backend.capabilities)
    return None
