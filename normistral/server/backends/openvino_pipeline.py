"""Opens an OpenVINO artifact in openvino_genai's pipeline, with the settings that `normistral.load` would use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from normistral.artifact.artifact import Artifact
from normistral.errors import EngineError, MissingExtraError, install_extra
from normistral.runtime.engines.base import EngineInfo, load_hint
from normistral.runtime.engines.openvino import MODEL_FILE, choose_settings, kernel_in_force, pack_for_our_kernel
from normistral.runtime.engines.openvino_settings import (
    KV_CACHE_SETTINGS,
    REPORTED,
    require_taken,
    said_first,
    settings_in_force,
)
from normistral.runtime.engines.settings import (
    ATTENTION,
    DEFAULT_CONFIG,
    INT4_KERNEL,
    OUR_KERNEL,
    PREFILL_CHUNK,
    EngineConfig,
)
from normistral.runtime.kernels.openvino_folder import folder_with_kernel
from normistral.server.backends.openvino_batch import OpenVINOBatch, says_not_finite
from normistral.server.backends.settings import BATCHED_DEVICE, BatchSettings, plan_cache

logger = logging.getLogger(__name__)

# Keys are rounded a token at a time, as in the library's cache. The paged cache's own choice is a channel at a time for
# 32 tokens: its codes change as a block fills, and with them the answers.
_LIKE_THE_LIBRARY = {"KEY_CACHE_QUANT_MODE": "BY_TOKEN"}
# Tokens of a prompt that are computed in a step, all jobs together: nobody gets a token meanwhile. The library's pieces
# are for one sequence, where that matters to nobody (docs/decisions.md).
_LONGEST_PIECE = 128
_EXTENSIONS = "extensions"  # property of openvino_genai's pipelines: libraries with operators
_OF_THE_IR = "runtime_options"  # entry of an IR with properties that it is to be compiled with


class OpenedBatch(NamedTuple):
    """A batch, and how it is set up."""

    batch: OpenVINOBatch
    capabilities: EngineInfo


def open_openvino_batch(artifact: Artifact, batch: BatchSettings, config: EngineConfig = DEFAULT_CONFIG) -> OpenedBatch:
    """Load an OpenVINO artifact for many answers at once, on the CPU.

    Args:
        config: as `load_openvino` takes it; of the device BATCHED_DEVICE.

    Raises:
        MissingExtraError: openvino_genai is not installed.
        UsageError: an unknown property, a value that OpenVINO refuses or replaces, or a cache that is too small.
        EngineError: OpenVINO could not read or compile the model.
    """
    import openvino as ov

    openvino_genai = import_genai()
    folder, manifest, overrides = artifact.folder, artifact.manifest, config.settings
    core = ov.Core()
    settings = choose_settings(core, manifest, config)
    chunk = int(settings.pop(PREFILL_CHUNK))
    kernel = settings.pop(INT4_KERNEL, None)
    settings.pop(ATTENTION, None)  # openvino_genai pages by itself
    if PREFILL_CHUNK not in overrides:
        chunk = min(chunk, _LONGEST_PIECE)
    packed = None
    try:
        model = core.read_model(folder / MODEL_FILE)
        in_force = _ask_plugin(core, model, settings)
        if kernel == OUR_KERNEL:
            packed = pack_for_our_kernel(model, folder / MODEL_FILE, required=INT4_KERNEL in overrides)
    except RuntimeError as exc:
        raise _cannot_load(folder, exc) from exc
    require_taken(overrides, in_force, BATCHED_DEVICE)
    plan = plan_cache(manifest.architecture, in_force, batch)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = plan.blocks
    scheduler.max_num_batched_tokens = chunk + plan.jobs  # a piece of a prompt, and a token of everybody
    scheduler.max_num_seqs = plan.jobs
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = batch.one_tenant
    properties: dict[str, Any] = {**settings, **_LIKE_THE_LIBRARY}
    if packed is not None:
        properties[_EXTENSIONS] = [packed.library]
    try:
        with folder_with_kernel(folder / MODEL_FILE, packed) if packed else nullcontext(folder) as readable:
            pipeline = openvino_genai.ContinuousBatchingPipeline(str(readable), scheduler, BATCHED_DEVICE, properties)
        finite = _warm_up(openvino_genai, pipeline)
    except RuntimeError as exc:
        raise _cannot_load(folder, exc) from exc
    reported, kernel_key = kernel_in_force(kernel, packed)
    logger.info(
        "loaded %s for %d answers at once, settings by %s: %s", folder.name, plan.jobs, config.settings_source, in_force
    )
    capabilities = EngineInfo(
        "openvino",
        BATCHED_DEVICE,
        chunk,
        {name: in_force[name] for name in (*settings, *REPORTED) if name in in_force}
        | reported
        | {PREFILL_CHUNK: str(chunk)},
        config.settings_source,
        tuple(sorted(overrides)),
        {name: in_force[name] for name in KV_CACHE_SETTINGS if name in in_force} | kernel_key,
    )
    opened = OpenVINOBatch(
        pipeline, manifest, artifact.tokenizer, plan, one_tenant=batch.one_tenant, packed=packed, finite=finite
    )
    return OpenedBatch(opened, capabilities)


def import_genai() -> Any:
    """The package openvino_genai.

    Raises:
        MissingExtraError: it is not installed, or belongs to another OpenVINO.
    """
    try:
        import openvino_genai
    except ImportError as exc:
        raise MissingExtraError(
            f"answers of OpenVINO models at once need openvino-genai, which cannot be imported ({exc})",
            f"{install_extra('serve')}, or serve with --batching off",
        ) from exc
    return openvino_genai


def _cannot_load(folder: Path, exc: RuntimeError) -> EngineError:
    said = said_first(exc)
    return EngineError(f"openvino_genai could not load {folder.name}: {said}", load_hint(said))


def _ask_plugin(core: Any, model: Any, settings: Mapping[str, str]) -> dict[str, str]:
    """What the plugin makes of these settings, and of those that the IR brings along.

    The pipeline does not show its compiled model, so a model of one addition is compiled with the same settings.
    """
    from openvino import Model, Type
    from openvino import opset13 as ops

    number = ops.parameter([1], Type.f32)
    probe = Model([ops.add(number, number)], [number])
    if model.has_rt_info(_OF_THE_IR):
        for name, value in model.get_rt_info(_OF_THE_IR).value.items():
            probe.set_rt_info(getattr(value, "value", value), [_OF_THE_IR, name])
    compiled = core.compile_model(probe, BATCHED_DEVICE, dict(settings))
    return settings_in_force(compiled, (*settings, *REPORTED, *KV_CACHE_SETTINGS))


def _warm_up(openvino_genai: Any, pipeline: Any) -> bool:
    """Answer once, so that the first one asked for does not pay for compiling kernels, and the cache is there.

    Returns:
        Whether the logits were finite.
    """
    import numpy as np
    import openvino as ov

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.logprobs = 2, True, 1
    handle = pipeline.add_request(0, ov.Tensor(np.zeros((1, 8), np.int64)), config)
    try:
        while pipeline.has_non_finished_requests():
            pipeline.step()
    except RuntimeError as exc:
        if not says_not_finite(str(exc)):
            raise
        return False
    handle.read_all()
    return True
