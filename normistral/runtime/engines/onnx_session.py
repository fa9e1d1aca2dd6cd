"""Opens sessions of onnxruntime, and translates its exceptions."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.errors import DeviceError, EngineError, UsageError, first_line
from normistral.runtime.providers import Target

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_LIBRARIES = "https://onnxruntime.ai/docs/execution-providers"


def session_options(settings: dict[str, str], folder: Path) -> SessionOptions:
    """onnxruntime's options from a plan of `hardware.plan_onnxruntime`; weights are looked for in `folder`.

    Raises:
        UsageError: onnxruntime has no such field, or it is no whole number.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal: errors come as exceptions, and the terminal is the user's
    for key, value in settings.items():
        if key.startswith("session."):
            options.add_session_config_entry(key, value)
        else:
            if key.startswith("_") or not isinstance(getattr(options, key, None), int) or not value.isdigit():
                raise UsageError(
                    f"{key}={value} is no setting of onnxruntime",
                    "settings are whole-number fields of its SessionOptions, or session.NAME=VALUE",
                )
            setattr(options, key, int(value))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def open_session(model: bytes, options: SessionOptions, target: Target, name: str) -> InferenceSession:
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
            "check the artifact with: normistral info ARTIFACT --check"
            if target.is_cpu
            else f"see which libraries {target.provider} needs: {_LIBRARIES}"
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
    """What onnxruntime raises; its exceptions have no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception)]
    return (*own, RuntimeError, ValueError, MemoryError)
