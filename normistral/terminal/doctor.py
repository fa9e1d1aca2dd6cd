"""The view of `doctor`: what this machine has, what is installed, and what will be used and why.

OpenVINO is asked in a process of its own, so that a build that crashes on this processor is found and not suffered.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

from normistral import store
from normistral.hardware import Machine, free_disk_bytes, plan_openvino, plan_threads, read_machine
from normistral.terminal.console import format_columns
from normistral.terminal.progress import format_bytes

_RUNTIME = ("openvino", "tokenizers", "jinja2", "numpy", "msgspec", "typer", "rich", "prompt_toolkit")
_EXPORT = ("torch", "transformers", "optimum", "optimum-intel", "optimum-onnx", "nncf", "openvino-tokenizers")
_ONNX = ("onnxruntime", "onnxruntime-gpu")
_ASKED_FOR_S = 60

_ASK_OPENVINO = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import normistral, openvino
core = openvino.Core()
devices = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
print(json.dumps({"version": openvino.__version__, "devices": devices}))
"""


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as a document for programs."""
    machine = read_machine()
    described = asdict(machine) | {"instruction_sets": sorted(machine.instruction_sets)}
    openvino = ask_openvino()
    packages = {name: _version(name) for name in (*_RUNTIME, *_EXPORT, *_ONNX)}
    return {
        "normistral": _version("normistral"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": described,
        "openvino": openvino,
        "packages": packages,
        "store": {"path": str(store.artifacts_dir()), "free_bytes": _free_bytes()},
        "threads": plan_threads(machine),
        "threads_because": _why_threads(machine),
        "settings": {weights: plan_openvino(machine, weights) for weights in ("int4", "int8", "fp16")},
        "export": _describe_export(packages),
        "problems": _find_problems(openvino, packages),
    }


def ask_openvino(code: str = _ASK_OPENVINO) -> dict[str, Any]:
    """Version and devices of OpenVINO, or {"problem": ...} if it cannot be used."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(sys.path)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ASKED_FOR_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {"problem": f"could not be asked: {exc}"}
    if done.returncode < 0:
        return {"problem": f"it crashes on this machine ({_signal_name(-done.returncode)})"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"it ended with status {done.returncode}"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": "it answered nothing that could be read"}
    return answer


def doctor_lines(report: dict[str, Any]) -> Iterator[str]:
    """The document for people."""
    machine, openvino = report["machine"], report["openvino"]
    quota = "none" if machine["cpu_quota"] is None else f"{machine['cpu_quota']:g} CPUs"
    memory = f"{_gib(machine['available_memory_bytes'])} of {_gib(machine['total_memory_bytes'])} available"
    free = report["store"]["free_bytes"]
    yield "Machine"
    yield format_columns(
        [
            ("processor", machine["cpu"]),
            ("cores", f"{machine['physical_cores']} ({machine['logical_cpus']} logical CPUs)"),
            ("CPU limit", quota),
            ("memory", memory),
            ("instructions", " ".join(machine["instruction_sets"]) or "not known here"),
            ("system", report["system"]),
            ("store", f"{report['store']['path']}, {'?' if free is None else format_bytes(free)} free"),
        ],
        indent=2,
    )
    yield "OpenVINO"
    if "problem" in openvino:
        yield f"  cannot be used: {openvino['problem']}"
    else:
        rows = [("version", openvino["version"]), *openvino["devices"].items()]
        yield format_columns(rows, indent=2)
    yield "Packages"
    packages = {"python": report["python"], "normistral": report["normistral"]} | report["packages"]
    yield format_columns([(name, version or "not installed") for name, version in packages.items()], indent=2)
    yield f"  exporting is {report['export']}"
    yield "What will be used on the CPU"
    yield f"  {report['threads']} threads: {report['threads_because']}"
    rows = [
        (weights, ", ".join(f"{key}={value}" for key, value in settings.items()))
        for weights, settings in report["settings"].items()
    ]
    yield format_columns(rows, indent=2)
    if report["problems"]:
        yield "Problems"
        yield from (f"  {problem}" for problem in report["problems"])


def _why_threads(machine: Machine) -> str:
    cores = f"{machine.physical_cores} physical core{'s' if machine.physical_cores != 1 else ''}"
    if machine.cpu_quota is None or plan_threads(machine) == machine.physical_cores:
        return f"one for each of the {cores} that this process may use"
    return f"{cores}, but the container may use {machine.cpu_quota:g} CPUs"


def _find_problems(openvino: dict[str, Any], packages: dict[str, str | None]) -> list[str]:
    problems = []
    if "problem" in openvino:
        problems.append(
            f"OpenVINO cannot be used ({openvino['problem']}): pip install --force-reinstall --no-deps openvino"
        )
    elif "CPU" not in openvino["devices"]:
        problems.append("OpenVINO does not find the CPU: name another device with --device")
    if all(packages[name] for name in _ONNX):
        problems.append("onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one")
    return problems


def _describe_export(packages: dict[str, str | None]) -> str:
    missing = [name for name in _EXPORT if not packages[name]]
    return f'not possible without {", ".join(missing)}: pip install "normistral[export]"' if missing else "possible"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes() -> int | None:
    try:
        return free_disk_bytes(store.artifacts_dir())
    except OSError:
        return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
