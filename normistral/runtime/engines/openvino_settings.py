"""Settings of OpenVINO: properties of a device, the values they take, and those in force."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normistral.errors import EngineError, UsageError
from normistral.runtime.engines.settings import COUNT, Setting

if TYPE_CHECKING:
    import openvino as ov

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
# Reported even where they were not set: they decide speed and results.
REPORTED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "ENABLE_CPU_PINNING")

KV_CACHE_SETTINGS = (  # those that change the numbers which a KV cache holds
    "INFERENCE_PRECISION_HINT",
    "EXECUTION_MODE_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "KV_CACHE_PRECISION",
    "KEY_CACHE_PRECISION",
    "VALUE_CACHE_PRECISION",
    "KEY_CACHE_GROUP_SIZE",
    "VALUE_CACHE_GROUP_SIZE",
)


def known_settings(core: ov.Core, device: str) -> dict[str, Setting]:
    """The properties that this device lets a caller set."""
    supported: dict[str, str] = core.get_property(device, "SUPPORTED_PROPERTIES")
    names = {name for name, access in supported.items() if access == "RW"} - _NO_SETTINGS
    return {name: _PROPERTIES.get(name, _OTHER_PROPERTY) for name in names}


def settings_in_force(compiled: ov.CompiledModel, names: Iterable[str]) -> dict[str, str]:
    """Properties of a compiled model as it reports them, as far as it has them."""
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


def require_accepted(core: ov.Core, device: str, name: str, value: str) -> None:
    """Have the plugin check a value before anything is loaded; the core is not shared."""
    try:
        core.set_property(device, {name: value})
    except RuntimeError as exc:
        raise UsageError(f"{name} cannot be {value!r}: {said_first(exc)}", "take one that OpenVINO knows") from exc


def require_taken(overrides: Mapping[str, str], in_force: Mapping[str, str], device: str) -> None:
    """Refuse values that OpenVINO replaced silently: more threads than cores, a precision that is not there."""
    for name, value in overrides.items():
        if (actual := in_force.get(name, value)) != value:
            raise UsageError(
                f"OpenVINO on {device} does not take {name}={value}: it uses {actual}", f"leave it out, or say {actual}"
            )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """OpenVINO's exceptions as ours: "what: its own first line".

    Raises:
        EngineError: in place of a RuntimeError.
    """
    try:
        yield
    except RuntimeError as exc:
        raise EngineError(f"{what}: {said_first(exc)}") from exc


def said_first(exc: BaseException) -> str:
    """The part of OpenVINO's message that says what happened, without its source locations."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return (said or lines or [type(exc).__name__])[0]
