"""`normistral doctor` and `build-kernel`: this machine, what will be used on it and why; int4 kernels for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from normistral.artifact import store
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.options import Debug, Verbose
from normistral.commands.translate import translate
from normistral.hardware import instruction_set_limit
from normistral.progress import format_bytes


def doctor(
    artifact: Annotated[
        str | None, typer.Argument(metavar="[ARTIFACT]", help="Also say what will be used for this artifact.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show this machine, and what will be used and why."""
    from normistral.runtime.collect_env import collect_env

    report = collect_env(None if artifact is None else store.resolve_artifact(artifact))
    if as_json:
        console.print_json(report)
    else:
        console.print_lines(doctor_lines(report))


def doctor_lines(report: dict[str, Any]) -> Iterator[str]:
    """Lines of the report."""
    machine = report["machine"]
    quota = translate("none" if machine["cpu_quota"] is None else f"{machine['cpu_quota']:g} CPUs")
    memory = translate(f"{_gib(machine['available_memory_bytes'])} of {_gib(machine['total_memory_bytes'])} available")
    free = report["store"]["free_bytes"]
    yield translate("Machine")
    yield format_columns(
        [
            (translate("processor"), machine["cpu"]),
            (translate("cores"), translate(f"{machine['physical_cores']} ({machine['logical_cpus']} logical CPUs)")),
            (translate("CPU limit"), quota),
            (translate("memory"), memory),
            (
                translate("instructions"),
                (" ".join(machine["instruction_sets"]) or translate("not known here")) + _limit(),
            ),
            (translate("system"), report["system"]),
            (
                translate("store"),
                report["store"]["path"] + ("" if free is None else ", " + translate(f"{format_bytes(free)} free")),
            ),
        ],
        indent=2,
    )
    yield "OpenVINO"
    yield _describe_engine(report["openvino"])
    yield translate("onnxruntime, for ONNX artifacts: --device and its execution providers")
    yield _describe_engine(report["onnxruntime"])
    yield translate("Packages")
    packages = {"python": report["python"], "normistral": report["normistral"]} | report["packages"]
    yield format_columns(
        [(name, version or translate("not installed")) for name, version in packages.items()], indent=2
    )
    yield "  " + translate(f"exporting is {translate(report['export'])}")
    yield translate("What will be used on the CPU")
    yield "  " + translate(f"{report['threads']} threads: {report['threads_because']}")
    plans = {f"OpenVINO, {weights}": settings for weights, settings in report["settings"].items()}
    plans["onnxruntime"] = report["onnx_settings"]
    rows = [(name, ", ".join(f"{key}={value}" for key, value in settings.items())) for name, settings in plans.items()]
    yield format_columns([*rows, (translate("int4 and int8 on OpenVINO"), translate(report["int4_kernel"]))], indent=2)
    yield from _tuned_table(report["tuned"])
    if report["artifact"]:
        yield from _artifact_lines(report["artifact"])
    if report["problems"]:
        yield translate("Problems")
        yield from ("  " + translate(problem) for problem in report["problems"])


def _tuned_table(described: list[dict[str, Any]]) -> Iterator[str]:
    if not described:
        return
    yield translate("Tuned settings")
    rows = []
    for result in described:
        if "artifact" in result:
            facts = f"{result['profile']}, {result['created'][:10]}, {result['gain'] - 1:+.0%}"
            rows.append(
                (
                    result["artifact"],
                    facts,
                    translate(f"not here: {result['problem']}" if result["problem"] else "holds here"),
                )
            )
        else:
            rows.append((result["file"], "", translate(result["problem"])))
    yield format_columns(rows, indent=2)


def _artifact_lines(described: dict[str, Any]) -> Iterator[str]:
    origin = {"rule": "settings chosen for this kind of machine", "tuned": "settings tuned on this machine"}
    yield translate(f"What will be used for {described['name']}: {origin[described['basis']]}")
    yield format_columns(list(described["settings"].items()), indent=2)
    yield from ("  " + translate(reason) for reason in described["why"])


def _describe_engine(answer: dict[str, Any]) -> str:
    if "problem" in answer:
        return "  " + translate(f"cannot be used: {answer['problem']}")
    return format_columns([(translate("version"), answer["version"]), *answer["devices"].items()], indent=2)


def _limit() -> str:
    limit = instruction_set_limit(os.environ)
    return " " + translate(f"(as ONEDNN_MAX_CPU_ISA={limit} allows)") if limit else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def build_kernel(debug: Debug = False) -> None:
    """Compile the faster int4 kernel for OpenVINO. Prints where they lie.

    Seldom needed: wheels for Linux on x86-64 bring them, and an installation from source compiles them where there is
    a C++ compiler. It is for an installation without one, for a changed source, and for another OpenVINO than theirs.
    Takes seconds and a compiler (g++ or clang++; CXX names another), for processors with AVX2, AVX-VNNI or AVX512.
    """
    from normistral.hardware import read_machine
    from normistral.runtime.kernels.library import build_library

    print(build_library(read_machine()))
