"""Engine on OpenVINO alone: a stateful IR, driven by our own loop over its infer requests.

The KV cache lives inside an infer request as variables (`past_key_values.N.key/value`, of shape
[1, kv_heads, length, head_dim]). One compiled model serves many requests, so every sequence has a cache of its own
and the weights exist once.

Exceptions of OpenVINO end here, as `EngineError` or `DeviceError`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import ClosedError, DeviceError, EngineError, UsageError
from normistral.runtime.engines.base import (
    DEFAULT_CONFIG,
    Backend,
    CacheTensor,
    Capabilities,
    EngineConfig,
    Logits,
    check_cache_tensors,
    load_hint,
)
from normistral.runtime.engines.openvino_cache import is_lossless, pack, packed_kinds, unpack
from normistral.runtime.engines.openvino_graph import LAST, keep_last_logits, page_attention
from normistral.runtime.engines.openvino_paged import KEYS_BY_TOKEN, PAGED_PRECISIONS, PagedBackend, can_page
from normistral.runtime.engines.openvino_settings import (
    NUMERICS,
    REPORTED,
    known_settings,
    require_accepted,
    require_taken,
    said_first,
    settings_in_force,
    translated,
)
from normistral.runtime.engines.openvino_slots import Slots
from normistral.runtime.engines.settings import (
    ATTENTION,
    ATTENTION_SETTING,
    ENGINES_KERNEL,
    INT4_KERNEL,
    KERNEL,
    OUR_KERNEL,
    PAGED,
    PREFILL_CHUNK,
    STATEFUL,
    override,
)
from normistral.runtime.kernels.library import BUILD, describe_absence, find_library, find_obstacle, open_library
from normistral.runtime.kernels.openvino_int4 import PackedWeights, pack_products, replace_products

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"
_VIRTUAL_DEVICES = ("AUTO", "HETERO")  # OpenVINO's own ways to combine devices
_WARM_UP_LENGTHS = (8, 1)  # kernels for a prompt and for one token are compiled at first use: do that at load


class OpenVINOBackend:
    """A compiled OpenVINO model; see `load_openvino`."""

    def __init__(
        self,
        compiled: ov.CompiledModel,
        manifest: Manifest,
        capabilities: Capabilities,
        packed: PackedWeights | None = None,
    ) -> None:
        """Take over a compiled model, and the weights that it uses beside its own."""
        shape = manifest.architecture
        self._packed = packed
        self._compiled: ov.CompiledModel | None = compiled
        self._takes_positions = any("position_ids" in port.get_names() for port in compiled.inputs)
        self._slot_limit = min(shape.sliding_window or manifest.context_length, manifest.context_length)
        # ALiBi takes its positions from the running sum of the mask; any other graph without the input, from the slots.
        self._keeps_dead = self._takes_positions or shape.positions == "alibi"
        # A device that does not say it may keep 8 bits; what does not look like that is left as it is.
        self._cache_precision = capabilities.numerics.get("KV_CACHE_PRECISION", "u8")
        self.capabilities = capabilities

    def create_engine(self) -> OpenVINOEngine:
        """A new, empty sequence with a KV cache of its own."""
        if self._compiled is None:
            raise ClosedError("the model was closed", "load it again")
        try:
            request = self._compiled.create_infer_request()
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO could not create an infer request: {said_first(exc)}") from exc
        slots = Slots(self._slot_limit, keeps_dead=self._keeps_dead)
        return OpenVINOEngine(request, self._takes_positions, slots, self._cache_precision, self._packed)

    def close(self) -> None:
        """Let go of the weights; they are freed with the last engine made from them."""
        self._compiled = None
        self._packed = None


class OpenVINOEngine:
    """One sequence in one infer request."""

    def __init__(
        self,
        request: ov.InferRequest,
        takes_positions: bool,
        slots: Slots,
        cache_precision: str,
        packed: PackedWeights | None = None,
    ) -> None:
        self._request: ov.InferRequest | None = request
        self._packed = packed  # held here too: the backend may be closed first
        self._takes_positions = takes_positions  # a model with ALiBi has no such input
        self._slots = slots
        self._cache_precision = cache_precision
        self._beam = np.zeros(1, np.int32)
        self._requantised = False  # by a restore: what was shown did not fit the plugin's formula (openvino_cache.py)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._slots.length

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: OpenVINO failed.
        """
        request, slots, count = self._open_request(), self._slots, len(token_ids)
        if slots.must_compact(count):
            self._compact()
        total = slots.length + count
        inputs = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": slots.extended_mask(count),
            "beam_idx": self._beam,
            LAST: np.array([last], np.int64),
        }
        if self._takes_positions:
            inputs["position_ids"] = np.arange(slots.length, total, dtype=np.int64)[None]
        try:
            request.infer(inputs, share_inputs=True)
            logits = request.get_tensor("logits").data  # [1, last, vocabulary]
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO failed at token {total}: {said_first(exc)}") from exc
        slots.append(count)
        return np.array(logits[0], dtype=np.float32)  # a copy: the request overwrites its tensor at the next step

    @property
    def intact(self) -> int:
        """Those before the first masked slot; none after a restore that had to quantise values anew."""
        return 0 if self._requantised else self._slots.intact

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens; unless `exactly`, they may stay in the cache, masked."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim {self.length} tokens to {length}")
        if length == 0:
            self.reset()
        else:
            self._slots.trim(length)
            if self._slots.must_compact(1) or (exactly and self._slots.dead):
                self._compact()

    def reset(self) -> None:
        """Forget everything."""
        self._open_request().reset_state()
        self._slots.compacted(0)
        self._requantised = False

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, packed as openvino_cache.py says.

        Dead slots go first: with them here and not in the copy, the two would go on with other last bits.
        """
        if self._slots.dead:
            self._compact()
        yield from self._read(length)

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        import openvino as ov

        self.reset()
        states = {state.name: state for state in self._query_states()}
        empty = {name: state.state for name, state in states.items()}  # [0, kv_heads, 0, head_dim]
        kinds = {name: packed_kinds((1, tensor.shape[1], length, tensor.shape[3])) for name, tensor in empty.items()}
        requantised = False
        for name, packed in check_cache_tensors(tensors, kinds):
            requantised = requantised or not is_lossless(packed, self._cache_precision)
            values = unpack(packed).astype(empty[name].element_type.to_dtype(), copy=False)
            with translated("OpenVINO could not write the KV cache"):
                states[name].state = ov.Tensor(values, shared_memory=True)  # the state makes the one copy
        self._slots.compacted(length)
        self._requantised = requantised

    def close(self) -> None:
        """Free the KV cache."""
        self._request = None
        self._packed = None

    def _compact(self) -> None:
        """Copy the living slots out and in, and with that get rid of the dead ones."""
        self.restore(self.length, list(self._read(self.length)))

    def _read(self, length: int) -> Iterator[CacheTensor]:
        living = self._slots.living()[:length]
        for state in self._query_states():
            with translated("OpenVINO could not read the KV cache"):
                values = state.state.data  # [1, kv_heads, slots, head_dim], a copy
            yield CacheTensor(state.name, pack(np.ascontiguousarray(values[:, :, living]), self._cache_precision))

    def _query_states(self) -> list[Any]:
        with translated("OpenVINO could not find the KV cache"):
            return list(self._open_request().query_state())

    def _open_request(self) -> ov.InferRequest:
        if self._request is None:
            raise ClosedError("the model was closed", "load it again")
        return self._request


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

    folder, manifest, device, given = artifact.folder, artifact.manifest, config.device, config.settings
    core = ov.Core()
    settings = choose_settings(core, manifest, config)
    prefill_chunk = settings.pop(PREFILL_CHUNK)
    kernel = settings.pop(INT4_KERNEL, None)
    packed = None
    attention = settings.pop(ATTENTION, STATEFUL)
    try:
        model = core.read_model(folder / MODEL_FILE)
        if attention == PAGED:
            page_attention(model)
            settings |= KEYS_BY_TOKEN
        keep_last_logits(model, axis=0 if attention == PAGED else 1)
        if kernel == OUR_KERNEL:
            packed = pack_for_our_kernel(model, folder / MODEL_FILE, required=INT4_KERNEL in given)
        if packed is not None:
            replace_products(core, model, packed)
        compiled = core.compile_model(model, device, settings)
        in_force = settings_in_force(compiled, (*settings, *REPORTED))
    except RuntimeError as exc:
        said = said_first(exc)
        raise EngineError(f"OpenVINO could not load {folder.name} on {device}: {said}", load_hint(said)) from exc
    require_taken(given, in_force, device)
    in_force[PREFILL_CHUNK] = prefill_chunk
    numerics = settings_in_force(compiled, NUMERICS)
    if attention == PAGED:
        in_force[ATTENTION] = numerics[ATTENTION] = PAGED
    reported, in_numerics = kernel_in_force(kernel, packed)
    in_force |= reported
    numerics |= in_numerics
    logger.info("loaded %s on %s, settings by %s: %s", folder.name, device, config.basis, in_force)
    capabilities = Capabilities(
        "openvino",
        device,
        int(prefill_chunk),
        in_force,
        config.basis,
        tuple(sorted(given)),
        numerics,
    )
    backend: Backend
    if attention == PAGED:
        backend = PagedBackend(compiled, capabilities, packed)
    else:
        backend = OpenVINOBackend(compiled, manifest, capabilities, packed)
    warm_up(backend)
    return backend


def choose_settings(core: ov.Core, manifest: Manifest, config: EngineConfig) -> dict[str, str]:
    """The properties to compile with, `prefill_chunk` among them.

    Raises:
        DeviceError: the device is not there.
        UsageError: an unknown property, or a value that OpenVINO refuses.
    """
    device, given = config.device, config.settings
    require_device(device, list(core.available_devices))
    plan = _plan(hardware.read_machine(), manifest, device, exact=config.exact)
    known = known_settings(core, device)
    if can_page(device):
        known[ATTENTION] = ATTENTION_SETTING
    if device == "CPU" and manifest.recipe.weights == "int4":
        known[INT4_KERNEL] = KERNEL
    settings = override({**plan, **(config.tuned or {})}, given, known, engine="OpenVINO", exact=config.exact)
    if ATTENTION not in given and settings.get("KV_CACHE_PRECISION", "u8") not in PAGED_PRECISIONS:
        settings.pop(ATTENTION, None)
    for name in given.keys() - {PREFILL_CHUNK, INT4_KERNEL, ATTENTION}:
        require_accepted(core, device, name, settings[name])
    return settings


def _plan(machine: hardware.Machine, manifest: Manifest, device: str, *, exact: bool) -> dict[str, str]:
    settings = hardware.exact_openvino(machine) if exact else hardware.plan_openvino(machine, manifest.recipe.weights)
    if device == "CPU":
        if can_page(device):
            settings[ATTENTION] = PAGED
        if manifest.recipe.weights == "int4" and not exact:
            settings[INT4_KERNEL] = ENGINES_KERNEL if find_library(machine) is None else OUR_KERNEL
        return settings
    # The plan is for CPUs; elsewhere only what every plugin understands.
    shared = ("PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT") if exact else ("PERFORMANCE_HINT",)
    return {key: value for key, value in settings.items() if key in shared}


def pack_for_our_kernel(model: ov.Model, model_file: Path, *, required: bool) -> PackedWeights | None:
    """The int4 weights of a model for our products; None where these cannot serve, with a warning that says why.

    Args:
        model: as read from the file.
        required: None is an error.

    Raises:
        UsageError: they are required, and there is no kernel, or no product that suits it.
        EngineError: they are required, and the kernel is damaged, of somebody else's making, or cannot be loaded.
    """
    machine = hardware.read_machine()
    library = find_library(machine)
    try:
        if library is None:
            raise _no_kernel(machine)
        packed = pack_products(model, model_file, open_library(library))
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
    """What became of the setting `int4_kernel`: as settings report it, and as numerics do, which name ours alone.

    Args:
        kernel: what was chosen; None where there is no such setting.
    """
    if packed is not None:
        return {INT4_KERNEL: OUR_KERNEL}, {INT4_KERNEL: OUR_KERNEL}
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


def warm_up(backend: Backend) -> None:
    """Run a short prompt and one token, so that the first answer does not pay for compiling kernels."""
    engine = backend.create_engine()
    for length in _WARM_UP_LENGTHS:
        engine.forward([0] * length)
    engine.close()
