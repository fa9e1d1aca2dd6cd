"""The same work through several libraries: prefill, decode, load, memory, and the share of bandwidth that is reached.

    python benchmarks/peers/compare.py --install ENVIRONMENTS
    python benchmarks/peers/compare.py --environments ENVIRONMENTS --models MODELS --shape half \\
        [--repeats 5] [--prompt 512] [--decode 32] [--threads N] [--only TEXT ...] [--reference STACK] \\
        [--openvino KEY=VALUE ...] [--onnx KEY=VALUE ...] --json OUT.json --report OUT.md

--install makes an environment for each library (7 GB; llama.cpp is compiled for this processor). A run needs the
development environment, which makes what MODELS lacks of a shape: the checkpoint (half: NorMistral-7B's shape with 16
of its layers, random; 7b: all 32; demo; tiny: to try this script), our artifacts, llama.cpp's GGUF files. OpenVINO
stacks share one artifact, onnxruntime stacks another; llama.cpp's Q4_0 and Q4_K_M and transformers' checkpoint hold the
same weights.

Every stack is a process of its own (worker.py). A repeat measures each once, in turn, another one first in each, on the
same new prompt: prefill, then decode. Who waits is stopped, so that nobody's idle threads take part. Stacks stay loaded
as far as memory goes; the others are loaded for each repeat. After loading, all are warmed up with one answer that
counts only as "cold". The bandwidth is measured first. What was measured is written after each measurement; a stack
that fails is reported with its last words, and the others go on.

--only takes stacks whose name holds the text. --openvino and --onnx add a stack: ours with these settings of the engine
over its plan. Speeds measured on a busy machine mean nothing: see "busy" in the report.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from environments import install_all, interpreter
from models import SHAPES, Models
from process import Process, StackError, machine_cpu_s
from stacks import Stack, choose_resident, describe_revision, list_stacks
from summary import Document, report

from normistral import hardware
from normistral.evaluation.bench.bandwidth import SINGLE_THREADED_BLAS

HERE = Path(__file__).parent
FIRST_ID, LAST_ID = 300, 3000  # ordinary tokens, where the vocabulary has so many
RESERVE_BYTES = 2 * 2**30  # of memory, for everything else
WARM_UP_TOKENS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="ENVIRONMENTS")
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--threads", type=int, default=hardware.plan_threads(hardware.read_machine()))
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--reference", default="normistral OpenVINO")
    for format in ("openvino", "onnx"):
        parser.add_argument(f"--{format}", action="append", default=[], type=setting, metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    if arguments.install is not None:
        install_all(arguments.install.resolve())
        return
    needed = ("environments", "models", "shape", "json", "report")
    if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
        parser.error(f"a run needs {', '.join(missing)}; --install ENVIRONMENTS makes the environments")
    if min(arguments.repeats, arguments.prompt, arguments.decode, arguments.threads) < 1:
        parser.error("--repeats, --prompt, --decode and --threads are at least 1")
    given = {name: dict(getattr(arguments, name)) for name in ("openvino", "onnx") if getattr(arguments, name)}
    stacks = list_stacks(arguments.threads, arguments.prompt + arguments.decode + WARM_UP_TOKENS, given)
    chosen = [s for s in stacks if not arguments.only or any(text in s.name for text in arguments.only)]
    if arguments.reference not in {stack.name for stack in chosen}:
        parser.error(f"--reference is one of the stacks that run: {', '.join(stack.name for stack in chosen)}")
    compare(chosen, arguments)


def compare(stacks: list[Stack], arguments: argparse.Namespace) -> None:
    environments = arguments.environments.resolve()
    uses_llama = any(stack.environment == "llama.cpp" for stack in stacks)
    models = Models(arguments.shape, arguments.models, interpreter(environments, "llama.cpp") if uses_llama else None)
    commands = {stack.name: stack.command(models, environments) for stack in stacks}
    prompts = make_prompts(models.vocabulary(), arguments.repeats + 1, arguments.prompt)
    document = describe_run(arguments) | {"bandwidth": measure_bandwidth(arguments.threads)}
    available = hardware.available_memory_bytes() - RESERVE_BYTES
    resident = choose_resident({stack.name: stack.likely_bytes(models) for stack in stacks}, available)
    document["stacks"] = {
        stack.name: {"resident": stack.name in resident, "bytes_per_token": stack.bytes_per_token(models)}
        | {"measurements": [], "ready_s": [], "load_s": [], "cold_first_token_s": []}
        | {"peak_resident_bytes": 0, "peak_anonymous_bytes": 0}
        for stack in stacks
    }
    run_repeats(commands, prompts, document, arguments)
    print(arguments.report.read_text(encoding="utf-8"))
    if any("error" in stack for stack in document["stacks"].values()):
        sys.exit(1)


def run_repeats(
    commands: dict[str, list[str]], prompts: list[list[int]], document: Document, arguments: argparse.Namespace
) -> None:
    """Measure every stack once in every repeat; the first prompt warms up."""
    warm_up, *others = prompts
    with ExitStack() as residents:
        processes: dict[str, Process] = {}
        for turn, prompt in enumerate(others, start=1):
            for name in rotated(list(commands), turn):
                row = document["stacks"][name]
                if "error" in row:
                    continue
                try:
                    with ExitStack() as once:
                        process = processes.get(name)
                        if process is None:
                            process = (residents if row["resident"] else once).enter_context(Process(commands[name]))
                            load(process, warm_up, row)
                        if row["resident"]:
                            processes[name] = process
                        figures = measure(process, prompt, arguments.decode)
                        note_memory(process, row)
                    row["measurements"].append(figures)
                    print(f"{turn} {name}: {one_line(figures, arguments)}", flush=True)
                except StackError as exc:
                    row["error"] = str(exc)
                    print(f"{turn} {name}: {exc}", flush=True)
                write(arguments.json, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
                write(arguments.report, report(document))


def rotated(names: list[str], turn: int) -> list[str]:
    """Another one is first in each repeat, so that a machine that slows down slows none more than the others."""
    start = (turn - 1) % len(names)
    return names[start:] + names[:start]


def load(process: Process, prompt: list[int], row: dict[str, Any]) -> None:
    """Load, and answer once: kernels are compiled and weights are paged in at first use."""
    loaded = process.ask({"do": "load"})
    row |= {"library": loaded["library"], "settings": loaded["settings"]}
    row["ready_s"].append(time.perf_counter() - process.started)
    row["load_s"].append(loaded["load_s"])
    cold = process.ask({"do": "decode", "ids": prompt, "tokens": WARM_UP_TOKENS})
    row["cold_first_token_s"].append(cold["prefill_s"])
    note_memory(process, row)


def measure(process: Process, prompt: list[int], decode: int) -> dict[str, Any]:
    before, own_before, started = machine_cpu_s(), process.cpu_s(), time.perf_counter()
    figures = process.ask({"do": "decode", "ids": prompt, "tokens": decode})
    others_s = machine_cpu_s() - before - (process.cpu_s() - own_before)
    return figures | {"busy": others_s / (time.perf_counter() - started)}


def note_memory(process: Process, row: dict[str, Any]) -> None:
    for kind in ("peak_resident_bytes", "peak_anonymous_bytes"):
        row[kind] = max(row[kind], getattr(process, kind))


def make_prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    """Random token ids; no prompt twice, because libraries keep what they have seen."""
    first, last = (FIRST_ID, LAST_ID) if vocabulary >= LAST_ID else (vocabulary // 4, vocabulary)
    return np.random.default_rng(0).integers(first, last, (count, length)).tolist()  # type: ignore[no-any-return]


def measure_bandwidth(threads: int) -> dict[str, Any]:
    """Fields of `normistral.evaluation.bench.bandwidth.Bandwidth`."""
    command = [sys.executable, str(HERE / "bandwidth.py"), str(threads)]
    variables = os.environ | SINGLE_THREADED_BLAS
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    bandwidth: dict[str, Any] = json.loads(done.stdout)
    return bandwidth


def describe_run(arguments: argparse.Namespace) -> Document:
    machine = hardware.read_machine()
    return {
        "shape": arguments.shape,
        "date": date.today().isoformat(),
        "revision": describe_revision(),
        "reference": arguments.reference,
        "prompt_tokens": arguments.prompt,
        "decode_tokens": arguments.decode,
        "repeats": arguments.repeats,
        "machine": {
            "cpu": machine.cpu,
            "threads": arguments.threads,
            "instruction_sets": sorted(machine.instruction_sets),
            "memory_gb": machine.total_memory_bytes / 1e9,
        },
    }


def one_line(figures: dict[str, Any], arguments: argparse.Namespace) -> str:
    prefill, decode = arguments.prompt / figures["prefill_s"], arguments.decode / figures["decode_s"]
    return f"prefill {prefill:.1f}, decode {decode:.2f} tokens/s, others busy {figures['busy']:.2f}"


def setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE")
    return key, value


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
