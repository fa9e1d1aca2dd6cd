"""One line about the int4 kernel where it would serve and is not there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from normistral.hardware import read_machine
from normistral.runtime.engines.settings import ENGINES_KERNEL, INT4_KERNEL
from normistral.runtime.kernels.compiler import CompileError, find_compiler
from normistral.runtime.kernels.library import BUILD, find_library, find_obstacle, packaged_for


def name_faster_way(settings: Mapping[str, str], given: Mapping[str, str] | None = None) -> str | None:
    """How the int4 products of a loaded model could be faster; None where they cannot, or were chosen.

    Args:
        settings: those in force.
        given: those that the user chose.
    """
    if settings.get(INT4_KERNEL) != ENGINES_KERNEL or INT4_KERNEL in (given or {}):
        return None
    machine = read_machine()
    if find_obstacle(machine) is not None or find_library(machine) is not None:  # one that was refused was told
        return None
    if others := packaged_for():
        return (
            f"OpenVINO {version('openvino')} is installed, and the faster int4 kernel here is for {others}: "
            f"pip install openvino=={others}"
        )
    return f"a faster int4 kernel can be had: {how_to_build()}"


def how_to_build() -> str:
    """The command, and what it takes before."""
    try:
        find_compiler()
    except CompileError as exc:
        return f"{exc.hint} (on Debian: apt install g++), then: {BUILD}"
    return f"{BUILD} (some seconds, once)"
