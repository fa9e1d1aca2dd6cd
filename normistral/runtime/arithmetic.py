"""A name for everything besides weights and input that decides the last bits of a model's logits."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import version

from normistral.hardware import read_machine
from normistral.runtime.engines.base import Capabilities


def describe_arithmetic(capabilities: Capabilities) -> str:
    """SHA-256 of engine, device, settings in force (threads and prefill chunk among them), versions and processor."""
    machine = read_machine()
    engine = sys.modules.get(capabilities.name)  # the scripted one is no package
    named = (
        capabilities.name,
        str(getattr(engine, "__version__", "")),
        version("normistral"),
        capabilities.device,
        sorted(capabilities.settings.items()),
        sorted(capabilities.numerics.items()),
        machine.cpu,
        sorted(machine.instruction_sets),
    )
    return hashlib.sha256(repr(named).encode()).hexdigest()
