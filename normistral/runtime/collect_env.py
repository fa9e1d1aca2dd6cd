"""Collects the environment: machine, engines, packages, and the settings that will be used and why (`doctor`).

Engines are asked in processes of their own, so that a build that crashes on this processor is found and not suffered.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from normistral.artifact import store
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.errors import EngineError, install_extra
from normistral.hardware import (
    Machine,
    explain_openvino,
    free_disk_bytes,
    plan_onnxruntime,
    plan_openvino,
    plan_threads,
    read_machine,
)
from normistral.processes import python_command, signal_name
from normistral.runtime.engines.settings import DEFAULT_CHUNK, PREFILL_CHUNK
from normistral.runtime.kernels.library import (
    describe_absence,
    find_library,
    find_obstacle,
    how_to_build,
    is_packaged,
    open_library,
    variant_of,
)
from normistral.runtime.tuned import (
    Tuned,
    find_mismatch,
    list_tuned,
    make_key,
    read_tuned,
    tuned_path,
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
import normistral, openvino
core = openvino.Core()
devices = {name: core.get_property(name, "FULL_DEVICE_NAME") for name in core.available_devices}
print(json.dumps({"version": openvino.__version__, "devices": devices}))
"""
_ASK_ONNXRUNTIME = """
import normistral, onnxruntime
from normistral.runtime.providers import PROVIDERS, device_names
devices = {name: PROVIDERS[name].name for name in device_names(onnxruntime.get_available_providers())}
print(json.dumps({"version": onnxruntime.__version__, "devices": devices}))
"""


def collect_env(artifact: Path | None = None) -> dict[str, Any]:
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
    """Version and devices of an engine as a script prints them, or {"problem": ...} if it cannot be used."""
    try:
        done = subprocess.run(
            python_command(code),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_ASKED_FOR_S,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {"problem": f"could not be asked: {exc}"}
    if done.returncode < 0:
        return {"problem": f"it crashes on this machine ({signal_name(-done.returncode)})"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"problem": lines[-1] if lines else f"it ended with status {done.returncode}"}
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"problem": "it answered nothing that could be read"}
    return answer


def describe_tuned(machine: Machine, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Every result in the store, for `doctor`; "problem" says why one does not hold here.

    Args:
        versions: of the engines that are there, by name.
    """
    described: list[dict[str, Any]] = []
    for path, content in list_tuned():
        if isinstance(content, str):
            described.append({"file": path.name, "problem": content})
            continue
        there = content.key
        here = make_key(None, machine, there.engine, versions.get(there.engine, "missing"), there.device)
        problem = find_mismatch(there, replace(here, manifest_sha256=there.manifest_sha256))
        described.append({"file": path.name, **tuned_document(content), "problem": problem})
    return described


def describe_artifact(folder: Path, machine: Machine, versions: dict[str, str]) -> dict[str, Any]:
    """Settings that loading an artifact on the CPU would use, and reasons, for `doctor`."""
    manifest = read_manifest(folder)
    engine = "openvino" if manifest.format == "openvino" else "onnxruntime"
    key = make_key(folder, machine, engine, versions.get(engine, "missing"), "CPU")
    settings = heuristic_settings(machine, manifest)
    why = explain_openvino(machine, manifest.recipe.weights) if engine == "openvino" else []
    basis, problem = "rule", None
    try:
        tuned = read_tuned(tuned_path(key))
        if (problem := find_mismatch(tuned.key, key)) is None:
            basis, settings = "tuned", tuned.settings
            why = [f"tuned for {tuned.profile} on {tuned.created[:10]}; gain: {describe_gain(tuned)}"]
    except (FileNotFoundError, NotADirectoryError):
        why.append("not tuned on this machine: normistral tune finds what is faster here")
    except (OSError, ValueError) as exc:
        problem = str(exc)
    return {"name": folder.name, "basis": basis, "settings": settings, "why": why, "problem": problem}


def heuristic_settings(machine: Machine, manifest: Manifest) -> dict[str, str]:
    """The settings of an artifact that `load` takes without a tuning."""
    is_openvino = manifest.format == "openvino"
    plan = plan_openvino(machine, manifest.recipe.weights) if is_openvino else plan_onnxruntime(machine)
    return {**plan, PREFILL_CHUNK: DEFAULT_CHUNK}


def tuned_document(tuned: Tuned) -> dict[str, Any]:
    """For programs."""
    document: dict[str, Any] = msgspec.to_builtins(tuned)
    return document | {"gain": tuned.gain}


def describe_gain(tuned: Tuned) -> str:
    """Gain of tuned settings, in words."""
    seconds = f"{tuned.tuned_s:.3g} s for {tuned.rule_s:.3g} s"
    return f"{tuned.gain - 1:+.0%} in speed at {tuned.profile} ({seconds})" if tuned.changed else "none"


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
    cores = "1 physical core" if machine.physical_cores == 1 else f"{machine.physical_cores} physical cores"
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
