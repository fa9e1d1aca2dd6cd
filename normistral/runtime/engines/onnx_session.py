"""Opens sessions of onnxruntime, and translates its exceptions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.errors import DeviceError, EngineError, first_line
from normistral.runtime.engines.base import load_hint
from normistral.runtime.engines.settings import COUNT, ZERO_OR_ONE, Setting
from normistral.runtime.providers import ProviderTarget

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_LIBRARIES = "https://onnxruntime.ai/docs/execution-providers"

_MICROSECONDS = Setting(r"\d{1,7}", "microseconds, 0 to 9999999")
# Of SessionOptions and onnxruntime_session_options_config_keys.h those that bear on one CPU session's speed or results.
SESSION_SETTINGS = {
    "intra_op_num_threads": COUNT,
    "inter_op_num_threads": COUNT,
    "enable_cpu_mem_arena": ZERO_OR_ONE,
    "enable_mem_pattern": ZERO_OR_ONE,
    "enable_mem_reuse": ZERO_OR_ONE,
    "execution_mode": Setting("[01]", "0 (sequential) or 1 (parallel)"),
    "graph_optimization_level": Setting("0|1|2|99", "0, 1, 2 or 99 (all)", changes_results=True),
    "use_deterministic_compute": ZERO_OR_ONE,
    "session.intra_op.allow_spinning": ZERO_OR_ONE,
    "session.inter_op.allow_spinning": ZERO_OR_ONE,
    "session.intra_op.spin_duration_us": _MICROSECONDS,
    "session.inter_op.spin_duration_us": _MICROSECONDS,
    "session.force_spinning_stop": ZERO_OR_ONE,
    "session.intra_op_thread_affinities": Setting(
        r"\d+([,-]\d+)*(;\d+([,-]\d+)*)*", "CPUs of each thread but the first, as in 1;2;3"
    ),
    "session.dynamic_block_base": Setting(r"\d{1,4}", "a number from 0 to 9999"),
    "session.disable_prepacking": Setting("[01]", "0 or 1", changes_results=True),
    "session.set_denormal_as_zero": Setting("[01]", "0 or 1", changes_results=True),
    "session.use_device_allocator_for_initializers": ZERO_OR_ONE,
}


def session_options(settings: Mapping[str, str], folder: Path) -> SessionOptions:
    """onnxruntime's options from settings such as those of `hardware.plan_onnxruntime`.

    Args:
        folder: where the weights are.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal: errors come as exceptions, and the terminal is the user's
    for key, value in settings.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
        else:
            setattr(options, key, type(getattr(options, key))(int(value)))  # int, bool, or an enumeration
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def settings_in_force(session: InferenceSession, names: Iterable[str]) -> dict[str, str]:
    """Settings of a session as it reports them."""
    options = session.get_session_options()
    return {
        name: options.get_session_config_entry(name)
        if name.startswith("session.")
        else str(int(getattr(options, name)))
        for name in names
    }


def open_session(model: bytes, options: SessionOptions, target: ProviderTarget, name: str) -> InferenceSession:
    """A session on one provider, and on the CPU for what is no matrix.

    Raises:
        DeviceError: onnxruntime started without the provider.
        EngineError: it could not load the model.
    """
    import onnxruntime as ort

    cpu: list[Any] = [] if target.is_cpu else ["CPUExecutionProvider"]
    try:
        with translated(f"onnxruntime could not load {name} on {target.device}"):
            session = ort.InferenceSession(
                model, options, providers=[(target.provider, target.options), *cpu], enable_fallback=0
            )
    except EngineError as exc:
        exc.hint = (
            load_hint(exc.message) if target.is_cpu else f"see which libraries {target.provider} needs: {_LIBRARIES}"
        )
        raise
    if target.provider not in session.get_providers():
        raise DeviceError(
            f"{target.provider} could not start",
            f"the device, its driver or the provider's libraries are missing: {_LIBRARIES}",
        )
    return session


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise onnxruntime's exceptions as `EngineError`."""
    try:
        yield
    except _foreign_errors() as exc:
        raise EngineError(f"{what}: {_STATUS.sub('', first_line(exc))}") from exc


@functools.cache
def _foreign_errors() -> tuple[type[Exception], ...]:
    """Exceptions of onnxruntime; they have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)
