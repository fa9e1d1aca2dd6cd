"""Loads artifacts on OpenVINO alone: settings, changes to the graph, compilation.

On the CPU the graph gets PagedAttention (openvino_paged.py), elsewhere it stays stateful (openvino_stateful.py).

Exceptions of OpenVINO end here, as `EngineError` or `DeviceError`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import DeviceError, EngineError, UsageError
from normistral.runtime.engines.base import Backend, EngineInfo, load_hint, warm_up
from normistral.runtime.engines.openvino_graph import keep_last_logits, keep_logits_at, page_attention
from normistral.runtime.engines.openvino_paged import KEYS_BY_TOKEN, PAGED_PRECISIONS, PagedBackend
from normistral.runtime.engines.openvino_settings import (
    KV_CACHE_SETTINGS,
    REPORTED,
    known_settings,
    require_accepted,
    require_taken,
    said_first,
    settings_in_force,
)
from normistral.runtime.engines.openvino_stateful import StatefulBackend
from normistral.runtime.engines.settings import (
    ATTENTION,
    ATTENTION_SETTING,
    DEFAULT_CONFIG,
    ENGINES_KERNEL,
    INT4_KERNEL,
    INT4_WEIGHTS,
    INT4_WEIGHTS_SETTING,
    KERNEL,
    MAPPED,
    MEMORY,
    OUR_KERNEL,
    PAGED,
    PREFILL_CHUNK,
    STATEFUL,
    EngineConfig,
    override,
)
from normistral.runtime.kernels.library import BUILD, describe_absence, find_library, find_obstacle, open_library
from normistral.runtime.kernels.openvino_int4 import PackedWeights, pack_products, replace_products

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"
_VIRTUAL_DEVICES = ("AUTO", "HETERO")  # OpenVINO's own ways to combine devices
_KERNEL_WEIGHTS = ("int4", "int8")  # kinds of artifacts with products that the kernel can take


def load_openvino(artifact: Artifact, config: EngineConfig = DEFAULT_CONFIG) -> Backend:
    """Compile an artifact's IR for a device and warm it up.

    Args:
        config: devices are CPU, GPU, GPU.1, AUTO, AUTO:GPU,CPU ...; exact is float32 activations and KV cache, and no
            dynamic quantization; settings are properties of OpenVINO and those of `normistral.load`.

    Raises:
        DeviceError: the device is not there.
        UsageError: an unknown property, or a value that OpenVINO refuses or replaces by another.
        EngineError: OpenVINO could not read or compile the model.
    """
    import openvino as ov

    folder, manifest, device, overrides = artifact.folder, artifact.manifest, config.device, config.settings
    core = ov.Core()
    settings = choose_settings(core, manifest, config)
    prefill_chunk = settings.pop(PREFILL_CHUNK)
    kernel = settings.pop(INT4_KERNEL, None)
    placement = settings.pop(INT4_WEIGHTS, MAPPED)
    packed = None
    attention = settings.pop(ATTENTION, STATEFUL)
    try:
        model = core.read_model(folder / MODEL_FILE)
        if attention == PAGED:
            page_attention(model)
            keep_logits_at(model)
            settings |= KEYS_BY_TOKEN
        else:
            keep_last_logits(model)
        if kernel == OUR_KERNEL:
            packed = pack_for_our_kernel(
                model, folder / MODEL_FILE, mapped=placement == MAPPED, required=INT4_KERNEL in overrides
            )
        if packed is not None:
            replace_products(core, model, packed)
        compiled = core.compile_model(model, device, settings)
        in_force = settings_in_force(compiled, (*settings, *REPORTED))
    except RuntimeError as exc:
        said = said_first(exc)
        raise EngineError(f"OpenVINO could not load {folder.name} on {device}: {said}", load_hint(said)) from exc
    require_taken(overrides, in_force, device)
    in_force[PREFILL_CHUNK] = prefill_chunk
    kv_cache_key = settings_in_force(compiled, KV_CACHE_SETTINGS)
    if attention == PAGED:
        in_force[ATTENTION] = kv_cache_key[ATTENTION] = PAGED
    reported, kernel_key = kernel_in_force(kernel, packed)
    in_force |= reported
    kv_cache_key |= kernel_key
    logger.info("loaded %s on %s, settings by %s: %s", folder.name, device, config.settings_source, in_force)
    capabilities = EngineInfo(
        "openvino",
        device,
        int(prefill_chunk),
        in_force,
        config.settings_source,
        tuple(sorted(overrides)),
        kv_cache_key,
    )
    backend: Backend
    if attention == PAGED:
        backend = PagedBackend(compiled, capabilities, packed)
    else:
        backend = StatefulBackend(compiled, manifest, capabilities, packed)
    warm_up(backend)
    return backend


def choose_settings(core: ov.Core, manifest: Manifest, config: EngineConfig) -> dict[str, str]:
    """The properties to compile with, `prefill_chunk` among them.

    Raises:
        DeviceError: the device is not there.
        UsageError: an unknown property, or a value that OpenVINO refuses.
    """
    device, overrides = config.device, config.settings
    require_device(device, list(core.available_devices))
    plan = _plan(hardware.read_machine(), manifest, device, exact=config.exact)
    known = known_settings(core, device)
    if device == "CPU":
        known[ATTENTION] = ATTENTION_SETTING
        if manifest.recipe.weights in _KERNEL_WEIGHTS:
            known |= {INT4_KERNEL: KERNEL, INT4_WEIGHTS: INT4_WEIGHTS_SETTING}
    settings = override({**plan, **(config.tuned or {})}, overrides, known, engine="OpenVINO", exact=config.exact)
    if ATTENTION not in overrides and settings.get("KV_CACHE_PRECISION", "u8") not in PAGED_PRECISIONS:
        settings.pop(ATTENTION, None)
    for name in overrides.keys() - {PREFILL_CHUNK, INT4_KERNEL, INT4_WEIGHTS, ATTENTION}:
        require_accepted(core, device, name, settings[name])
    return settings


def _plan(machine: hardware.Machine, manifest: Manifest, device: str, *, exact: bool) -> dict[str, str]:
    settings = hardware.exact_openvino(machine) if exact else hardware.plan_openvino(machine, manifest.recipe.weights)
    if device == "CPU":
        settings[ATTENTION] = PAGED  # windows and ALiBi included
        if manifest.recipe.weights in _KERNEL_WEIGHTS and not exact:
            settings[INT4_KERNEL] = ENGINES_KERNEL if find_library(machine) is None else OUR_KERNEL
        return settings
    # The plan is for CPUs; elsewhere only what every plugin understands.
    shared = ("PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT") if exact else ("PERFORMANCE_HINT",)
    return {key: value for key, value in settings.items() if key in shared}


def pack_for_our_kernel(
    model: ov.Model, model_file: Path, *, required: bool, mapped: bool = False
) -> PackedWeights | None:
    """The weights of a model for our kernel; None where it cannot be used, with a warning that gives the reason.

    Args:
        model: as read from the file.
        required: None is an error.
        mapped: take them from a file of their own, where one can be had.

    Raises:
        UsageError: they are required, and there is no kernel, or no product that suits it.
        EngineError: they are required, and the kernel is damaged, not trusted, or cannot be loaded.
    """
    machine = hardware.read_machine()
    library = find_library(machine)
    try:
        if library is None:
            raise _no_kernel(machine)
        packed = pack_products(model, model_file, open_library(library), mapped=mapped)
    except (EngineError, UsageError) as exc:
        if required:
            raise
        logger.warning("the int4 kernel is not used: %s (%s)", exc, exc.hint)
        return None
    if required and packed is None:
        raise UsageError(f"{INT4_KERNEL} cannot be {OUR_KERNEL}: no product in this artifact suits it", "leave it out")
    return packed


def _no_kernel(machine: hardware.Machine) -> UsageError:
    obstacle = find_obstacle(machine)
    return UsageError(
        f"{INT4_KERNEL} cannot be {OUR_KERNEL}: {obstacle or describe_absence()}",
        f"say {ENGINES_KERNEL}" if obstacle else f"compile it: {BUILD}",
    )


def kernel_in_force(kernel: str | None, packed: PackedWeights | None) -> tuple[dict[str, str], dict[str, str]]:
    """Settings `int4_kernel` and `int4_weights` in force, for `settings`; for `kv_cache_key` the kernel if it is ours.

    Args:
        kernel: what was chosen; None where there is no such setting.
    """
    if packed is not None:
        placement = MAPPED if packed.mapped else MEMORY
        return {INT4_KERNEL: OUR_KERNEL, INT4_WEIGHTS: placement}, {INT4_KERNEL: OUR_KERNEL}
    return ({} if kernel is None else {INT4_KERNEL: ENGINES_KERNEL}), {}


def require_device(device: str, available: Sequence[str]) -> None:
    """Refuse a device that OpenVINO does not list.

    Raises:
        DeviceError: naming the devices that are there.
    """
    kind, _, members = device.partition(":")
    wanted = [member.strip() for member in members.split(",")] if members else []
    if kind not in _VIRTUAL_DEVICES:
        wanted.append(device)
    # OpenVINO lists "GPU" for one and "GPU.0", "GPU.1" for several; both "GPU" and "GPU.0" name the first.
    known = {
        name for entry in available for name in (entry, entry.split(".")[0], f"{entry}.0" if "." not in entry else "")
    }
    missing = [name for name in wanted if name not in known]
    if missing or not device:
        raise DeviceError(
            f"no device {', '.join(missing) or repr(device)} on this machine",
            f"OpenVINO sees: {', '.join([*available, *_VIRTUAL_DEVICES])}",
        )
