"""Devices of ONNX artifacts: names for `--device`, onnxruntime's execution providers, and proof of what they ran.

onnxruntime gives a node that a provider cannot run to the CPU and says nothing, and so it does when the provider itself
cannot start; a session's list of providers proves nothing. Its profile says where every node ran.

Tried on real ones: CPU and OPENVINO. The others follow onnxruntime's documentation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from normistral.errors import DeviceError, MissingExtraError, install_extra

_SHOWN_NODES = 3
_MATRIX_OPERATORS = ("MatMul", "Gemm", "Attention")  # parts of operator names, such as FusedMatMul, MatMulNBits
_MEMBERS = {"device_id": r"\d{1,3}", "device_type": r"[A-Z][A-Z0-9.:,]*"}  # what may stand after the colon
_EXAMPLES = {"": "", "device_id": ", or with an index, as in CUDA:1", "device_type": ", or as in OPENVINO:GPU"}


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider.

    Attributes:
        name: onnxruntime's.
        install: how to get an onnxruntime that has it.
        member_option: the provider's option for what stands after the colon in "CUDA:1"; "" where nothing may.
        memory: onnxruntime's name of the memory in which it computes.
        exact: options for float32 arithmetic without shortcuts.
    """

    name: str
    install: str
    member_option: str = "device_id"
    memory: str = "cpu"
    exact: dict[str, str] = field(default_factory=dict)


# Each package below is another build of onnxruntime and overwrites the others.
_REPLACE = "pip uninstall onnxruntime, then pip install {}"
PROVIDERS = {
    "CPU": Provider("CPUExecutionProvider", install_extra("onnx"), member_option=""),
    "CUDA": Provider(
        "CUDAExecutionProvider",
        f"pip uninstall onnxruntime, then {install_extra('gpu')}",
        memory="cuda",
        exact={"use_tf32": "0"},
    ),
    "ROCM": Provider("ROCMExecutionProvider", _REPLACE.format("onnxruntime-rocm"), memory="cuda"),  # HIP's name too
    "MIGRAPHX": Provider("MIGraphXExecutionProvider", _REPLACE.format("onnxruntime-migraphx"), memory="cuda"),
    "DIRECTML": Provider("DmlExecutionProvider", _REPLACE.format("onnxruntime-directml"), memory="dml"),
    "OPENVINO": Provider(
        "OpenVINOExecutionProvider", _REPLACE.format("onnxruntime-openvino"), "device_type", exact={"precision": "FP32"}
    ),
    "COREML": Provider(
        "CoreMLExecutionProvider", f"{install_extra('onnx')} on macOS: only its wheel has it", member_option=""
    ),
}


@dataclass(frozen=True, slots=True)
class ProviderTarget:
    """Execution provider, device and options of a session.

    Attributes:
        device: as the user named it.
        provider: onnxruntime's name.
        options: for the provider.
        memory, memory_index: where its tensors live, in onnxruntime's terms.
    """

    device: str
    provider: str
    options: dict[str, str]
    memory: str
    memory_index: int

    @property
    def is_cpu(self) -> bool:
        """Whether this is onnxruntime's own CPU provider, which has nowhere to fall back to."""
        return self.provider == PROVIDERS["CPU"].name


def import_onnxruntime() -> ModuleType:
    """The package onnxruntime, whichever build of it is installed.

    Raises:
        MissingExtraError: none is, or it cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as exc:
        raise MissingExtraError(f"ONNX artifacts need the package onnxruntime ({exc})", install_extra("onnx")) from exc
    module: ModuleType = onnxruntime
    return module


def find_target(device: str, available: Sequence[str], *, exact: bool = False) -> ProviderTarget:
    """Provider and device of a name such as "CUDA:1" or "OPENVINO:GPU".

    Args:
        available: the providers of the installed onnxruntime.
        exact: float32 arithmetic without shortcuts.

    Raises:
        DeviceError: an unknown name, or a provider that is not installed; naming those that are.
    """
    kind, colon, member = device.partition(":")
    provider = PROVIDERS.get(kind)
    here = f"this onnxruntime has: {', '.join(device_names(available))}"
    if provider is None:
        raise DeviceError(f"no device {device!r} for ONNX artifacts", f"{here}; known are: {', '.join(PROVIDERS)}")
    if provider.name not in available:
        raise DeviceError(f"the installed onnxruntime has no {provider.name}", f"{provider.install} ({here})")
    if colon and not re.fullmatch(_MEMBERS.get(provider.member_option, "(?!)"), member):
        raise DeviceError(
            f"no device {device!r} for ONNX artifacts", f"write {kind}{_EXAMPLES[provider.member_option]}"
        )
    options = dict(provider.exact) if exact else {}
    if colon:
        options[provider.member_option] = member
    elif provider.member_option == "device_type":
        options["device_type"] = "CPU"  # OpenVINO's own default, said
    index = int(member) if provider.member_option == "device_id" and colon else 0
    return ProviderTarget(device, provider.name, options, provider.memory, index)


def device_names(available: Iterable[str]) -> list[str]:
    """The names for `--device` of the providers that are there."""
    return [name for name, provider in PROVIDERS.items() if provider.name in set(available)]


def require_all_on(target: ProviderTarget, profile: Path) -> None:
    """Check where a session ran.

    Args:
        profile: what onnxruntime's `end_profiling` wrote.

    Raises:
        DeviceError: a matrix or attention node ran elsewhere, or nothing ran there; it names the nodes.
    """
    events: list[dict[str, Any]] = json.loads(profile.read_text(encoding="utf-8"))
    astray = find_astray(events, target.provider)
    if astray:
        shown = ", ".join(astray[:_SHOWN_NODES]) + (" ..." if len(astray) > _SHOWN_NODES else "")
        raise DeviceError(
            f"{len(astray)} matrix and attention nodes do not run on {target.provider}: {shown}",
            f"{target.device} cannot run this graph; try an export with --graph plain, or --device CPU",
        )


def find_astray(events: Iterable[dict[str, Any]], provider: str) -> list[str]:
    """Nodes of a profile that multiply matrices or attend, and ran on another provider: "name (provider)", each once.

    What a provider compiles into a node of its own shows as one node of that provider; where nothing ran on it at all,
    every node is named.
    """
    ran = [event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    anything = any(event["args"]["provider"] == provider for event in ran)
    names = {
        f"{event['name'].removesuffix('_kernel_time')} ({event['args']['provider']})": None
        for event in ran
        if event["args"]["provider"] != provider
        and (not anything or any(part in event["args"].get("op_name", "") for part in _MATRIX_OPERATORS))
    }
    return list(names) or ([] if anything else ["the profile shows no node"])
