"""Engine on OpenVINO alone: a stateful IR, driven by our own loop over its infer requests.

The KV cache lives inside an infer request as variables (`past_key_values.N.key/value`, of shape
[1, kv_heads, length, head_dim]). One compiled model serves many requests, so every sequence has a cache of its own
and the weights exist once.

Exceptions of OpenVINO end here, as `EngineError` or `DeviceError`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normistral import hardware
from normistral.errors import ClosedError, DeviceError, EngineError, UsageError
from normistral.manifest import Manifest
from normistral.runtime.engines.base import Basis, Capabilities, Logits
from normistral.runtime.engines.settings import COUNT, PREFILL_CHUNK, Setting, override

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"
_VIRTUAL_DEVICES = ("AUTO", "HETERO")  # OpenVINO's own ways to combine devices
_WARM_UP_LENGTHS = (8, 1)  # kernels for a prompt and for one token are compiled at first use: do that at load

_SWITCH = Setting("YES|NO", "YES or NO")
_GROUP = Setting(r"0|[1-9]\d{0,4}", "a number of values, 0 to 99999", changes_results=True)
# Properties of the CPU plugin that bear only on where and when something is computed, and those whose values it reads
# loosely ("2x" is 2, "-5" is 2^64 - 5). The plugin itself checks the values of the others.
_PROPERTIES = {
    "PERFORMANCE_HINT": Setting("LATENCY|THROUGHPUT|CUMULATIVE_THROUGHPUT", "LATENCY or THROUGHPUT"),
    "INFERENCE_NUM_THREADS": COUNT,
    "NUM_STREAMS": COUNT,
    "ENABLE_CPU_PINNING": _SWITCH,
    "ENABLE_CPU_RESERVATION": _SWITCH,
    "ENABLE_HYPER_THREADING": _SWITCH,
    "SCHEDULING_CORE_TYPE": Setting("ANY_CORE|PCORE_ONLY|ECORE_ONLY", "ANY_CORE, PCORE_ONLY or ECORE_ONLY"),
    "TBB_PARTITIONER": Setting("STATIC|AUTO", "STATIC or AUTO"),
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP,
    "KEY_CACHE_GROUP_SIZE": _GROUP,
    "VALUE_CACHE_GROUP_SIZE": _GROUP,
}
_OTHER_PROPERTY = Setting(r"\S+", "what OpenVINO's documentation says", changes_results=True)
_NO_SETTINGS = {"DEVICE_ID", "LOG_LEVEL", "PERF_COUNT"}  # properties that choose the device or only print
# Reported even where nobody set them: they decide speed and results.
_REPORTED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "ENABLE_CPU_PINNING")


class OpenVINOBackend:
    """A compiled OpenVINO model; see `load_openvino`."""

    def __init__(self, compiled: ov.CompiledModel, capabilities: Capabilities) -> None:
        self._compiled: ov.CompiledModel | None = compiled
        self._takes_positions = any("position_ids" in port.get_names() for port in compiled.inputs)
        self.capabilities = capabilities

    def create_engine(self) -> OpenVINOEngine:
        """A new, empty sequence with a KV cache of its own."""
        if self._compiled is None:
            raise ClosedError("the model was closed", "load it again")
        try:
            return OpenVINOEngine(self._compiled.create_infer_request(), self._takes_positions)
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO could not create an infer request: {_first_line(exc)}") from exc

    def close(self) -> None:
        """Let go of the weights; they are freed with the last engine made from them."""
        self._compiled = None


@dataclass(frozen=True, slots=True)
class _SavedCache:
    length: int
    states: dict[str, Logits]  # variable name -> [1, kv_heads, length, head_dim]


class OpenVINOEngine:
    """One sequence in one infer request."""

    def __init__(self, request: ov.InferRequest, takes_positions: bool) -> None:
        self._request: ov.InferRequest | None = request
        self._takes_positions = takes_positions  # a model with ALiBi has no such input
        self._length = 0
        self._beam = np.zeros(1, np.int32)

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        return self._length

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; logits [last, vocabulary] of the last positions.

        Raises:
            EngineError: OpenVINO failed.
        """
        request = self._open_request()
        total = self._length + len(token_ids)
        inputs = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "beam_idx": self._beam,
            _LAST: np.array([last], np.int64),
        }
        if self._takes_positions:
            inputs["position_ids"] = np.arange(self._length, total, dtype=np.int64)[None]
        try:
            request.infer(inputs, share_inputs=True)
            logits = request.get_tensor("logits").data  # [1, last, vocabulary]
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO failed at token {total}: {_first_line(exc)}") from exc
        self._length = total
        return np.array(logits[0], dtype=np.float32)  # a copy: the request overwrites its tensor at the next step

    def trim(self, length: int) -> None:
        """Forget everything after the first `length` tokens; copies what stays."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot trim {self._length} tokens to {length}")
        if length == 0:
            self.reset()
        elif length < self._length:
            self._write_states({name: keys[:, :, :length] for name, keys in self._read_states().items()})
            self._length = length

    def reset(self) -> None:
        """Forget everything."""
        self._open_request().reset_state()
        self._length = 0

    def save(self) -> _SavedCache:
        """A copy of the KV cache, as float32."""
        return _SavedCache(self._length, {name: keys.copy() for name, keys in self._read_states().items()})

    def restore(self, saved: object) -> None:
        """Continue from what `save` gave."""
        assert isinstance(saved, _SavedCache)
        self.reset()
        if saved.length:
            self._write_states(saved.states)
        self._length = saved.length

    def close(self) -> None:
        """Free the KV cache."""
        self._request = None

    def _read_states(self) -> dict[str, Logits]:
        try:
            return {state.name: state.state.data for state in self._open_request().query_state()}
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO could not read the KV cache: {_first_line(exc)}") from exc

    def _write_states(self, states: dict[str, Logits]) -> None:
        import openvino as ov

        try:
            for state in self._open_request().query_state():
                state.state = ov.Tensor(np.ascontiguousarray(states[state.name]))
        except RuntimeError as exc:
            raise EngineError(f"OpenVINO could not write the KV cache: {_first_line(exc)}") from exc

    def _open_request(self) -> ov.InferRequest:
        if self._request is None:
            raise ClosedError("the model was closed", "load it again")
        return self._request


def load_openvino(
    folder: Path,
    manifest: Manifest,
    device: str = "CPU",
    *,
    exact: bool = False,
    tuned: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> OpenVINOBackend:
    """Compile an artifact's IR for a device and warm it up.

    Args:
        device: OpenVINO's name: CPU, GPU, GPU.1, AUTO, AUTO:GPU,CPU ...
        exact: reference arithmetic: float32 activations and KV cache, no dynamic quantisation.
        tuned: what `normistral tune` found for it here, over the rule for this kind of machine.
        given: properties over both; see `normistral.load`.

    Raises:
        DeviceError: the device is not there.
        UsageError: an unknown property, or a value that OpenVINO refuses or replaces by another.
        EngineError: OpenVINO could not read or compile the model.
    """
    import openvino as ov

    given = given or {}
    core = ov.Core()
    require_device(device, list(core.available_devices))
    plan = _plan(hardware.read_machine(), manifest, device, exact=exact)
    settings = override({**plan, **(tuned or {})}, given, known_settings(core, device), engine="OpenVINO", exact=exact)
    prefill_chunk = settings.pop(PREFILL_CHUNK)
    try:
        for name in given.keys() - {PREFILL_CHUNK}:
            _require_accepted(core, device, name, settings[name])
        model = core.read_model(folder / MODEL_FILE)
        keep_last_logits(model)
        compiled = core.compile_model(model, device, settings)
        in_force = settings_in_force(compiled, (*settings, *_REPORTED))
    except RuntimeError as exc:
        raise EngineError(
            f"OpenVINO could not load {folder.name} on {device}: {_first_line(exc)}",
            "check the artifact with: normistral info ARTIFACT --check",
        ) from exc
    _require_taken(given, in_force, device)
    in_force[PREFILL_CHUNK] = prefill_chunk
    basis: Basis = "exact" if exact else "rule" if tuned is None else "tuned"
    logger.info("loaded %s on %s, settings by %s: %s", folder.name, device, basis, in_force)
    capabilities = Capabilities("openvino", device, int(prefill_chunk), in_force, basis, tuple(sorted(given)))
    backend = OpenVINOBackend(compiled, capabilities)
    warm_up(backend)
    return backend


def _plan(machine: hardware.Machine, manifest: Manifest, device: str, *, exact: bool) -> dict[str, str]:
    settings = hardware.exact_openvino(machine) if exact else hardware.plan_openvino(machine, manifest.recipe.weights)
    if device == "CPU":
        return settings
    # The plan is for CPUs; elsewhere only what every plugin understands.
    shared = ("PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT") if exact else ("PERFORMANCE_HINT",)
    return {key: value for key, value in settings.items() if key in shared}


def known_settings(core: ov.Core, device: str) -> dict[str, Setting]:
    """The properties that this device lets a caller set."""
    supported: dict[str, str] = core.get_property(device, "SUPPORTED_PROPERTIES")
    names = {name for name, access in supported.items() if access == "RW"} - _NO_SETTINGS
    return {name: _PROPERTIES.get(name, _OTHER_PROPERTY) for name in names}


def settings_in_force(compiled: ov.CompiledModel, names: Iterable[str]) -> dict[str, str]:
    """What a compiled model answers when asked for its properties, as far as it has them."""
    supported = compiled.get_property("SUPPORTED_PROPERTIES")
    return {name: _as_text(compiled.get_property(name)) for name in dict.fromkeys(names) if name in supported}


def _as_text(value: Any) -> str:
    """A property's value as OpenVINO would read it."""
    if isinstance(value, bool):
        return "YES" if value else "NO"
    if isinstance(value, (set, list, tuple)):
        return ",".join(sorted(map(_as_text, value)))
    if hasattr(value, "get_type_name"):  # ov.Type: f32, bf16, u8
        return str(value.get_type_name())
    return str(getattr(value, "name", value))  # enumerations have a name


def _require_accepted(core: ov.Core, device: str, name: str, value: str) -> None:
    """Let the plugin itself look at a value, before anything is loaded; this core is nobody else's."""
    try:
        core.set_property(device, {name: value})
    except RuntimeError as exc:
        raise UsageError(f"{name} cannot be {value!r}: {_first_line(exc)}", "take one that OpenVINO knows") from exc


def _require_taken(given: Mapping[str, str], in_force: Mapping[str, str], device: str) -> None:
    """Refuse what OpenVINO quietly replaced: more threads than there are cores, a precision that is not there."""
    for name, value in given.items():
        if (actual := in_force.get(name, value)) != value:
            raise UsageError(
                f"OpenVINO on {device} does not take {name}={value}: it uses {actual}", f"leave it out, or say {actual}"
            )


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


_LAST = "last_positions"  # name of the input that `keep_last_logits` adds


def keep_last_logits(model: ov.Model) -> None:
    """Compute the output layer for the last positions only, as many as the new input `last_positions` [1] says.

    The exported IR computes logits of every position, as other loaders expect: for a prompt of 1,500 tokens that is
    a large product and 200 MB nobody reads. Changed in memory; the file stays as it is.
    """
    import openvino as ov
    from openvino import opset13 as ops

    output_layer: Any = model.output("logits").get_node().input_value(0).get_node()
    while output_layer.get_type_name() in ("Convert", "Add"):
        output_layer = output_layer.input_value(0).get_node()
    if output_layer.get_type_name() != "MatMul":
        raise EngineError(f"the model's logits come from {output_layer.get_type_name()}, not from a matrix product")
    last = ops.parameter([1], ov.Type.i64, name=_LAST)
    last.output(0).get_tensor().set_names({_LAST})
    start, stop = ops.negative(last), ops.constant(np.array([2**31 - 1], np.int64))
    step, axis = ops.constant(np.array([1], np.int64)), ops.constant(np.array([1], np.int64))
    hidden = output_layer.input_value(0)  # [1, n, hidden]
    output_layer.input(0).replace_source_output(ops.slice(hidden, start, stop, step, axis).output(0))
    model.add_parameters([last])
    model.validate_nodes_and_infer_types()


def warm_up(backend: OpenVINOBackend) -> None:
    """Run a short prompt and one token, so that the first answer does not pay for compiling kernels."""
    engine = backend.create_engine()
    for length in _WARM_UP_LENGTHS:
        engine.forward([0] * length)
    engine.close()


def _first_line(exc: BaseException) -> str:
    """The part of OpenVINO's message that says what happened, without its source locations."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return (said or lines or [type(exc).__name__])[0]
