"""The view of `doctor`: what this machine has, what is installed, and what will be used and why.

Engines are asked in processes of their own, so that a build that crashes on this processor is found and not suffered.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from normistral.artifact import store
from normistral.commands.console import format_columns
from normistral.commands.progress import format_bytes
from normistral.commands.tune import artifact_lines, describe_artifact, describe_tuned, tuned_table
from normistral.errors import EngineError, install_extra
from normistral.hardware import (
    Machine,
    free_disk_bytes,
    instruction_set_limit,
    plan_onnxruntime,
    plan_openvino,
    plan_threads,
    read_machine,
)
from normistral.runtime.kernels.advice import how_to_build
from normistral.runtime.kernels.library import (
    describe_absence,
    find_library,
    find_obstacle,
    is_packaged,
    open_library,
    variant_of,
)

_RUNTIME = ("openvino", "tokenizers", "jinja2", "numpy", "msgspec", "typer", "rich", "prompt_toolkit")
_EXPORT = ("torch", "transformers", "optimum", "optimum-intel", "optimum-onnx", "nncf", "openvino-tokenizers")
_ONNX = (  # builds of one Python package
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-migraphx"),
    "onnxruntime-rocm",
)
_NO_ONNX = f"not installed: {install_extra('onnx')}"
_ASKED_FOR_S = 60

_ASK_OPENVINO = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import normistral, openvino
core = openvino.Core()
devices = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
print(json.dumps({"version": openvino.__version__, "devices": devices}))
"""
_ASK_ONNXRUNTIME = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import normistral, onnxruntime
from normistral.runtime.providers import PROVIDERS, device_names
devices = {name: PROVIDERS[name].name for name in device_names(onnxruntime.get_available_providers())}
print(json.dumps({"version": onnxruntime.__version__, "devices": devices}))
"""


def examine(artifact: Path | None = None) -> dict[str, Any]:
    """Everything that `doctor` shows, as a document for programs.

    Args:
        artifact: a folder, to say what will be used for it.
    """
    machine = read_machine()
    described = asdict(machine) | {"instruction_sets": sorted(machine.instruction_sets)}
    openvino = ask_engine(_ASK_OPENVINO)
    builds = {name: version for name in _ONNX if (version := _version(name))}
    onnxruntime = ask_engine(_ASK_ONNXRUNTIME) if builds else {"problem": _NO_ONNX}
    engines = {"openvino": openvino, "onnxruntime": onnxruntime}
    versions = {name: answer["version"] for name, answer in engines.items() if "version" in answer}
    loaded = None if artifact is None else describe_artifact(artifact, machine, versions)
    packages = {name: _version(name) for name in (*_RUNTIME, *_EXPORT, *(builds or _ONNX[:1]))}
    return {
        "normistral": _version("normistral"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": described,
        "openvino": openvino,
        "onnxruntime": onnxruntime,
        "packages": packages,
        "store": {"path": str(store.artifacts_dir()), "free_bytes": _free_bytes()},
        "threads": plan_threads(machine),
        "threads_because": _why_threads(machine),
        "settings": {weights: plan_openvino(machine, weights) for weights in ("int4", "int8", "fp16")},
        "int4_kernel": _describe_kernel(machine),
        "onnx_settings": plan_onnxruntime(machine),
        "artifact": loaded,
        "tuned": describe_tuned(machine, versions),
        "export": _describe_export(packages),
        "problems": _find_problems(openvino, onnxruntime, list(builds)) + _stale(loaded),
    }


def ask_engine(code: str) -> dict[str, Any]:
    """What a script prints about an engine (version, devices), or {"problem": ...} if that cannot be used."""
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
    machine = report["machine"]
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
            ("instructions", (" ".join(machine["instruction_sets"]) or "not known here") + _limit()),
            ("system", report["system"]),
            ("store", f"{report['store']['path']}, {'?' if free is None else format_bytes(free)} free"),
        ],
        indent=2,
    )
    yield "OpenVINO"
    yield _describe_engine(report["openvino"])
    yield "onnxruntime, for ONNX artifacts: --device and its execution providers"
    yield _describe_engine(report["onnxruntime"])
    yield "Packages"
    packages = {"python": report["python"], "normistral": report["normistral"]} | report["packages"]
    yield format_columns([(name, version or "not installed") for name, version in packages.items()], indent=2)
    yield f"  exporting is {report['export']}"
    yield "What will be used on the CPU"
    yield f"  {report['threads']} threads: {report['threads_because']}"
    plans = {f"OpenVINO, {weights}": settings for weights, settings in report["settings"].items()}
    plans["onnxruntime"] = report["onnx_settings"]
    rows = [(name, ", ".join(f"{key}={value}" for key, value in settings.items())) for name, settings in plans.items()]
    yield format_columns([*rows, ("int4 on OpenVINO", report["int4_kernel"])], indent=2)
    yield from tuned_table(report["tuned"])
    if report["artifact"]:
        yield from artifact_lines(report["artifact"])
    if report["problems"]:
        yield "Problems"
        yield from (f"  {problem}" for problem in report["problems"])


def _limit() -> str:
    limit = instruction_set_limit(os.environ)
    return f" (as ONEDNN_MAX_CPU_ISA={limit} allows)" if limit else ""


def _describe_engine(answer: dict[str, Any]) -> str:
    if "problem" in answer:
        return f"  cannot be used: {answer['problem']}"
    return format_columns([("version", answer["version"]), *answer["devices"].items()], indent=2)


def _describe_kernel(machine: Machine) -> str:
    if obstacle := find_obstacle(machine):
        return f"OpenVINO's own products; ours cannot run here: {obstacle}"
    library = find_library(machine)
    if library is None:
        return f"OpenVINO's own products, because {describe_absence()}; ours are faster: {how_to_build()}"
    try:
        open_library(library)
    except EngineError as exc:
        return f"OpenVINO's own products, because {exc} ({exc.hint})"
    origin = "came with the package" if is_packaged(library) else "from the store"
    return f"our own products for {variant_of(machine).name}, {origin}: {library}"


def _why_threads(machine: Machine) -> str:
    cores = f"{machine.physical_cores} physical core{'s' if machine.physical_cores != 1 else ''}"
    if machine.cpu_quota is None or plan_threads(machine) == machine.physical_cores:
        return f"one for each of the {cores} that this process may use"
    return f"{cores}, but the container may use {machine.cpu_quota:g} CPUs"


def _find_problems(openvino: dict[str, Any], onnxruntime: dict[str, Any], builds: list[str]) -> list[str]:
    problems = []
    if "problem" in openvino:
        problems.append(
            f"OpenVINO cannot be used ({openvino['problem']}): pip install --force-reinstall --no-deps openvino"
        )
    elif "CPU" not in openvino["devices"]:
        problems.append("OpenVINO does not find the CPU: name another device with --device")
    if len(builds) > 1:
        problems.append(f"{' and '.join(builds)} overwrite each other: uninstall all of them, then install one")
    elif builds and "problem" in onnxruntime:
        reinstall = f"pip install --force-reinstall --no-deps {builds[0]}"
        problems.append(f"onnxruntime cannot be used ({onnxruntime['problem']}): {reinstall}")
    return problems


def _stale(loaded: dict[str, Any] | None) -> list[str]:
    if loaded is None or loaded["problem"] is None:
        return []
    return [f"what was tuned for {loaded['name']} is not used ({loaded['problem']}): tune it again, or --forget it"]


def _describe_export(packages: dict[str, str | None]) -> str:
    missing = [name for name in _EXPORT if not packages[name]]
    return f"not possible without {', '.join(missing)}: {install_extra('export')}" if missing else "possible"


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
