"""Share of the machine's limits that is reached: prefill against multiply-adds, decoding against bytes read.

    cc -O3 -march=native -pthread benchmarks/peak_arithmetic.c -o PEAK
    python benchmarks/roofline.py PEAK ARTIFACT [ARTIFACT ...] [--repeats 10] [--prompt 256] [--decode 24] [--json FILE]

Each repeat measures both ceilings and then all artifacts, another one first in each, because a shared machine is
faster in one minute than in the next: a share is that of its own repeat, the median over repeats counts. The layers'
weights make a prompt's multiply-adds; attention is not counted, so a share of prefill says a little too little. The KV
cache is not counted in the bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from normistral import hardware
from normistral.artifact.manifest import read_manifest
from normistral.evaluation.bench.configuration import Configuration
from normistral.evaluation.bench.machine import SINGLE_THREADED_BLAS, choose_buffer_bytes, last_level_cache_bytes
from normistral.evaluation.bench.worker import Measurer, Worker


def measure_peak(program: Path, threads: int) -> float:
    """10^9 multiply-adds of int8 a second."""
    done = subprocess.run([program.absolute(), str(threads)], capture_output=True, text=True, check=True)
    found = re.search(r"^int8\s+([\d.]+)", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit("this processor has no instruction for products of int8 that peak_arithmetic.c knows")
    return float(found[1])


def measure_bandwidth(threads: int) -> float:
    """GB/s."""
    size = choose_buffer_bytes(last_level_cache_bytes(), hardware.available_memory_bytes())
    with Worker("the read bandwidth", SINGLE_THREADED_BLAS) as worker:
        return worker.ask(Measurer.read_bandwidth, threads, size).gb_per_s


def prefill_weights(configuration: Configuration) -> int:
    """Multiply-adds of a prompt's token: all weights but embeddings and output layer."""
    shape = configuration.manifest.architecture
    return shape.parameters - (1 if shape.tied_embeddings else 2) * shape.vocabulary * shape.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peak", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine = hardware.read_machine()
    threads = hardware.plan_threads(machine)
    configurations = [Configuration(folder.name, folder, read_manifest(folder)) for folder in arguments.artifacts]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(one.label)) for one in configurations]
        for worker, one in zip(workers, configurations, strict=True):
            worker.ask(Measurer.load, one.folder, one.manifest.format, one.engine)
            worker.ask(Measurer.one_pass, arguments.prompt, 4, 0)
        for repeat in range(arguments.repeats):
            gmac_per_s, gb_per_s = measure_peak(arguments.peak, threads), measure_bandwidth(threads)
            for index in range(len(workers)):
                index = (index + repeat) % len(workers)
                one = configurations[index]
                found = workers[index].ask(Measurer.one_pass, arguments.prompt, arguments.decode, repeat + 1)
                prefill, decode = found.prefill_tokens / found.prefill_s, found.decode_tokens / found.decode_s
                rows.append(
                    {
                        "artifact": one.label,
                        "peak_gmac_per_s": gmac_per_s,
                        "bandwidth_gb_per_s": gb_per_s,
                        "prefill_tokens_per_s": prefill,
                        "decode_tokens_per_s": decode,
                        "prefill_share": prefill * prefill_weights(one) / 1e9 / gmac_per_s,
                        "decode_share": decode * one.weight_bytes_per_token / 1e9 / gb_per_s,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    summary = {}
    for one in configurations:
        of_it = [row for row in rows if row["artifact"] == one.label]
        keys = [key for key in of_it[0] if key != "artifact"]
        summary[one.label] = {key: round(statistics.median(row[key] for row in of_it), 3) for key in keys}
    document = {"processor": machine.cpu, "threads": threads, "medians": summary, "repeats": rows}
    print(json.dumps(summary, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
