"""Resident and anonymous memory of one artifact: while it loads, while it answers, and at rest.

    python benchmarks/load_memory.py ARTIFACT [--prompt 512] [--decode 32] [--device CPU] [--json FILE]

The model runs in a process of its own, and this one reads that one's memory 100 times a second. "resident" counts
mapped files as far as they are in memory, "anonymous" is what the kernel cannot drop; both are a phase's peak.
"peak_over_need" is the highest resident memory over the size of the files plus the KV cache as float32.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from watch import PRIVATE, read_memory

INTERVAL_S = 0.01
REST_S = 1.0


def run(report: Connection, artifact: Path, prompt: int, decode: int, device: str) -> None:
    """Load, answer and rest, announcing every phase as it begins."""
    import numpy as np

    import normistral

    time.sleep(REST_S)
    report.send("load")
    with normistral.load(artifact, device) as model:
        report.send("loaded, at rest")
        time.sleep(REST_S)
        report.send("prefill")
        ids = np.random.default_rng(0).integers(300, 3000, prompt).tolist()
        for step, _ in enumerate(
            model.stream(ids, max_new_tokens=decode, temperature=0.0, ignore_eos=True, draft="off")
        ):
            if step == 0:
                report.send("decode")
        report.send("answered, at rest")
        time.sleep(REST_S)
        report.send("close")
    time.sleep(REST_S)
    report.close()


def observe(process: Any, phases: Connection) -> dict[str, dict[str, int]]:
    """Bytes of each kind of memory in each phase: peaks, and resident memory as the phase ended."""
    peaks: dict[str, dict[str, int]] = {}
    phase = "import"
    while True:
        memory = read_memory(process.pid)
        anonymous = sum(memory[kind] for kind in PRIVATE)
        peak = peaks.setdefault(phase, {"anonymous": 0, "resident": 0, "resident_at_end": 0})
        peak["resident_at_end"] = anonymous + memory["RssFile"] or peak["resident_at_end"]  # 0: the process is gone
        for kind, now in (("anonymous", anonymous), ("resident", anonymous + memory["RssFile"])):
            peak[kind] = max(peak[kind], now)
        if phases.poll(INTERVAL_S):
            try:
                phase = phases.recv()
            except EOFError:
                return peaks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    start = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    phases, report = start.Pipe(duplex=False)
    process = start.Process(
        target=run, args=(report, arguments.artifact, arguments.prompt, arguments.decode, arguments.device)
    )
    process.start()
    report.close()  # so that the pipe ends with the process
    peaks = observe(process, phases)
    process.join()
    if process.exitcode:
        return 1

    from normistral.artifact.manifest import read_manifest

    manifest = read_manifest(arguments.artifact)
    shape = manifest.architecture
    tokens = arguments.prompt + arguments.decode
    cache_bytes = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * tokens
    need = manifest.total_bytes + cache_bytes
    highest = {kind: max(peak[kind] for peak in peaks.values()) for kind in ("anonymous", "resident")}
    figures = {
        "artifact": arguments.artifact.name,
        "files_gb": round(manifest.total_bytes / 1e9, 3),
        "kv_cache_gb": round(cache_bytes / 1e9, 3),
        "peaks_gb": {
            phase: {kind: round(value / 1e9, 3) for kind, value in peak.items()} for phase, peak in peaks.items()
        },
        "highest_gb": {kind: round(value / 1e9, 3) for kind, value in highest.items()},
        "peak_over_need": round(highest["resident"] / need, 3),
    }
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
