"""NorMistral on CPUs: export to OpenVINO IR, and run it without torch.

    import normistral
    with normistral.load("demo-openvino-int4") as model:
        print(model.chat().send("Hva heter hovedstaden i Norge?").text)

Public names are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from normistral.telemetry import silence_telemetry

if TYPE_CHECKING:
    from normistral.artifact.manifest import Manifest
    from normistral.errors import NormistralError
    from normistral.export.pipeline import export_model
    from normistral.runtime.chat import Chat
    from normistral.runtime.chunks import Chunk, Completion, Timings
    from normistral.runtime.loading import load
    from normistral.runtime.model import Model
    from normistral.runtime.options import GenerationConfig
    from normistral.runtime.prefix import Prefix
    from normistral.runtime.structured.structure import Structure

__version__ = "0.1.0"

silence_telemetry()  # before anything that carries telemetry is imported

_HOME = {
    "Chat": "normistral.runtime.chat",
    "Chunk": "normistral.runtime.chunks",
    "Completion": "normistral.runtime.chunks",
    "GenerationConfig": "normistral.runtime.options",
    "Manifest": "normistral.artifact.manifest",
    "Model": "normistral.runtime.model",
    "NormistralError": "normistral.errors",
    "Prefix": "normistral.runtime.prefix",
    "Structure": "normistral.runtime.structured.structure",
    "Timings": "normistral.runtime.chunks",
    "export_model": "normistral.export.pipeline",
    "load": "normistral.runtime.loading",
}

__all__ = [
    "Chat",
    "Chunk",
    "Completion",
    "GenerationConfig",
    "Manifest",
    "Model",
    "NormistralError",
    "Prefix",
    "Structure",
    "Timings",
    "__version__",
    "export_model",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normistral' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
