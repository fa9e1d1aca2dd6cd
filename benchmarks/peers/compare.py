"""The same work through several libraries: prefill and decode at several lengths, load, memory, and the share of the
memory's bandwidth that is reached.

    python benchmarks/peers/compare.py --install ENVIRONMENTS
    python benchmarks/peers/compare.py --environments ENVIRONMENTS --models MODELS --shape half \\
        --measurements OUT.jsonl [--lengths 256,3500] [--rounds 5] [--decode 24] [--segments 3] [--threads N] \\
        [--only TEXT ...] [--most-busy CORES] [--stop-after SECONDS] [--reference STACK] [--openvino KEY=VALUE ...] \\
        [--onnx KEY=VALUE ...] [--report OUT.md]

--install makes an environment for each library (7 GB; llama.cpp and ik_llama.cpp are compiled for this processor). A
run needs the development environment, which makes what MODELS lacks of a shape: the checkpoint (half: NorMistral-7B's
shape with 16 of its layers, random; 7b: all 32; demo; tiny: to try this script), our artifacts, GGUF files. OpenVINO
stacks share one artifact, onnxruntime stacks another; the GGUF files and transformers' checkpoint hold the same
weights.

In each round every stack is loaded once, another one first each time, in a process of its own (worker.py), and warmed
up with one answer, which counts only as "cold". Then each length: a prompt, new in each round and the same for all,
then segments of decoding. The memory of virtual machines changes its speed within a minute, so its read bandwidth is
measured before and after each segment, while the stack stands still; a segment counts where the two agree within 10 %.

OUT.jsonl gets one line a measurement. The same command goes on where the last one ended: what is there already is not
measured again, so rounds can be added, and stacks or lengths with rounds of their own. --stop-after begins nothing that
would end later than that. A stack that fails is reported with its last words, and the others go on; the next run tries
it again.

--only takes the stack of that name, or else all whose name holds the text. --openvino and --onnx add a stack: ours with
these settings of the engine over its plan. Speeds measured on a busy machine mean nothing: where everybody else took
more than --most-busy cores during the prompt, the line says "disturbed" and does not count; the next run measures it
again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import BandwidthMeter
from environments import install_all, interpreter
from models import SHAPES, Models
from process import Process, StackError, machine_cpu_s
from stacks import Stack, describe_revision, list_stacks
from summary import REFERENCE, Record, measurements, read_records, report

from normistral import hardware

FIRST_ID, LAST_ID = 300, 3000  # ordinary tokens, where the vocabulary has so many
WARM_UP_PROMPT, WARM_UP_TOKENS = 256, 4
LOAD_S, SLOWEST_TOKENS_PER_S = 20.0, 30.0  # for the time that a measurement will take, before one was made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="ENVIRONMENTS")
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--measurements", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--lengths", type=whole_numbers, default=[256, 3500])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=24, help="tokens of a segment")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--threads", type=int, default=hardware.plan_threads(hardware.read_machine()))
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--most-busy", type=float, default=0.15, metavar="CORES")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--reference", default=REFERENCE)
    for format in ("openvino", "onnx"):
        parser.add_argument(f"--{format}", action="append", default=[], type=setting, metavar="KEY=VALUE")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    arguments.started = time.monotonic()
    if arguments.install is not None:
        install_all(arguments.install.resolve())
        return
    needed = ("environments", "models", "shape", "measurements")
    if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
        parser.error(f"a run needs {', '.join(missing)}; --install ENVIRONMENTS makes the environments")
    if min(arguments.rounds, arguments.decode, arguments.segments, arguments.threads) < 1:
        parser.error("--rounds, --decode, --segments and --threads are at least 1")
    given = {name: dict(getattr(arguments, name)) for name in ("openvino", "onnx") if getattr(arguments, name)}
    context = max(arguments.lengths) + arguments.decode * arguments.segments + WARM_UP_TOKENS
    stacks = list_stacks(arguments.threads, context, given)
    names = {stack.name for stack in stacks}
    chosen = [
        stack
        for stack in stacks
        if not arguments.only
        or any(text == stack.name or (text not in names and text in stack.name) for text in arguments.only)
    ]
    if not chosen:
        parser.error(f"--only is a part of one of these names: {', '.join(stack.name for stack in stacks)}")
    failed = compare(chosen, arguments)
    text = report(read_records(arguments.measurements), arguments.reference)
    if arguments.report is not None:
        write(arguments.report, text)
    print(text)
    if failed:
        sys.exit(1)


def compare(stacks: list[Stack], arguments: argparse.Namespace) -> bool:
    """Measure what OUT.jsonl lacks; True if a stack failed."""
    environments = arguments.environments.resolve()
    used = {stack.environment for stack in stacks} & {"llama.cpp", "ik_llama.cpp"}
    models = Models(arguments.shape, arguments.models, {name: interpreter(environments, name) for name in used})
    commands = {stack.name: stack.command(models, environments) for stack in stacks}
    sizes = {
        stack.name: {
            "weight_bytes": stack.bytes_per_token(models),
            "cache_bytes": stack.cache_bytes_per_token(models),
        }
        for stack in stacks
    }
    vocabulary = models.vocabulary()
    with Journal(arguments.measurements) as journal, BandwidthMeter(arguments.threads) as meter:
        journal.add(describe_run(arguments))
        return run_rounds(commands, sizes, vocabulary, arguments, journal, meter.gb_per_s)


class Journal:
    """The file of measurements: what it held, and new lines, each written when it is known."""

    def __init__(self, path: Path) -> None:
        self.records = read_records(path)
        self._file = path.open("a+", encoding="utf-8")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a line that a killed run left

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def run_rounds(
    commands: dict[str, list[str]],
    sizes: dict[str, dict[str, float]],
    vocabulary: int,
    arguments: argparse.Namespace,
    journal: Journal,
    gb_per_s: Callable[[], float],
) -> bool:
    """Load every stack once in every round, and measure each length; True if one failed."""
    failed: set[str] = set()
    for turn in range(1, arguments.rounds + 1):
        for name in rotated(list(commands), turn):
            done = {(one["stack"], one["length"], one["round"]) for one in measurements(journal.records)}
            lengths = [length for length in arguments.lengths if (name, length, turn) not in done]
            lengths = [length for length in lengths if has_time(name, length, arguments, journal.records)]
            if not lengths or name in failed:
                continue
            try:
                with Process(commands[name]) as process:
                    loaded = load(process, make_prompt(vocabulary, min(WARM_UP_PROMPT, *arguments.lengths), 0))
                    for length in lengths:
                        if not has_time(name, length, arguments, journal.records):
                            continue
                        started, prompt = time.monotonic(), make_prompt(vocabulary, length, turn)
                        figures = measure(process, prompt, arguments, gb_per_s)
                        kind = "measurement" if figures["busy"] <= arguments.most_busy else "disturbed"
                        record = {"kind": kind, "shape": arguments.shape, "stack": name, "length": length}
                        record |= {"round": turn, "time": time.strftime("%H:%M:%S")} | loaded | figures | sizes[name]
                        record |= {
                            kind: getattr(process, kind) for kind in ("peak_resident_bytes", "peak_anonymous_bytes")
                        }
                        journal.add(record | {"wall_s": time.monotonic() - started})
                        print(f"{turn} {name}: {one_line(record)}", flush=True)
            except StackError as exc:
                failed.add(name)
                journal.add({"kind": "failure", "stack": name, "round": turn, "error": str(exc)})
                print(f"{turn} {name}: {exc}", flush=True)
    return bool(failed)


def has_time(name: str, length: int, arguments: argparse.Namespace, records: list[Record]) -> bool:
    """True if a measurement, loading included, would end in time: the longest one of this kind so far tells."""
    known = [one["wall_s"] for one in measurements(records) if (one["stack"], one["length"]) == (name, length)]
    expected_s = LOAD_S + max(known, default=length / SLOWEST_TOKENS_PER_S)
    return bool(time.monotonic() - arguments.started + expected_s <= arguments.stop_after)


def rotated(names: list[str], turn: int) -> list[str]:
    """Another one is first in each round, so that a machine that slows down slows none more than the others."""
    start = (turn - 1) % len(names)
    return names[start:] + names[:start]


def load(process: Process, prompt: list[int]) -> dict[str, Any]:
    """Load, and answer once: kernels are compiled and weights are paged in at first use."""
    loaded = process.ask({"do": "load"})
    ready_s = time.perf_counter() - process.started
    cold = process.ask({"do": "decode", "ids": prompt, "tokens": WARM_UP_TOKENS, "segments": 1})
    return loaded | {"ready_s": ready_s, "cold_first_token_s": cold["prefill_s"]}


def measure(
    process: Process, prompt: list[int], arguments: argparse.Namespace, gb_per_s: Callable[[], float]
) -> dict[str, Any]:
    """A prompt and segments of decoding, with the bandwidth before and after each, and the time of others meanwhile."""
    before, own_before, started = machine_cpu_s(), process.cpu_s(), time.perf_counter()
    bandwidths: list[float] = []
    busy = 0.0

    def at_mark() -> None:
        nonlocal busy
        if not bandwidths:  # the prompt has been read
            others_s = machine_cpu_s() - before - (process.cpu_s() - own_before)
            busy = others_s / (time.perf_counter() - started)
        bandwidths.append(gb_per_s())

    request = {"do": "decode", "ids": prompt, "tokens": arguments.decode, "segments": arguments.segments}
    figures = process.ask(request, at_mark)
    bandwidths.append(gb_per_s())
    return figures | {"bandwidth_gb_per_s": bandwidths, "decode_tokens": arguments.decode, "busy": busy}


def make_prompt(vocabulary: int, length: int, turn: int) -> list[int]:
    """Random token ids, the same for all stacks; no prompt twice, because libraries keep those that they have seen."""
    first, last = (FIRST_ID, LAST_ID) if vocabulary >= LAST_ID else (vocabulary // 4, vocabulary)
    return np.random.default_rng((turn, length)).integers(first, last, length).tolist()  # type: ignore[no-any-return]


def describe_run(arguments: argparse.Namespace) -> Record:
    machine = hardware.read_machine()
    return {
        "kind": "run",
        "shape": arguments.shape,
        "date": date.today().isoformat(),
        "time": time.strftime("%H:%M:%S"),
        "revision": describe_revision(),
        "machine": {
            "cpu": machine.cpu,
            "threads": arguments.threads,
            "instruction_sets": sorted(machine.instruction_sets),
            "memory_gb": machine.total_memory_bytes / 1e9,
        },
    }


def one_line(record: Record) -> str:
    decoded = [record["decode_tokens"] / segment["decode_s"] for segment in record["segments"]]
    memory = ", ".join(f"{one:.0f}" for one in record["bandwidth_gb_per_s"])
    return (
        f"{record['length']} tokens: prefill {record['length'] / record['prefill_s']:.1f}, decode "
        f"{', '.join(f'{one:.2f}' for one in decoded)} tokens/s, memory {memory} GB/s, others busy {record['busy']:.2f}"
    )


def whole_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths, such as 256,3500")
    return sorted({int(part) for part in parts})


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
