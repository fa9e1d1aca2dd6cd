"""What stays of models that were loaded and closed, and of many short turns: threads, descriptors, memory.

    python tests/scripts/show_cycles.py OPENVINO_ARTIFACT ONNX_ARTIFACT [--openvino 100] [--onnx 300] [--turns 3000]

Each series runs in a process of its own. OpenVINO alone is shown beside the library, because it keeps a thread and some
memory for every model that it compiled. Exits with 1 if the library keeps a thread, a descriptor or much more memory
than its engine does.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Bytes of each cycle: of the library over OpenVINO alone, which compiles fewer kernels with its own settings and one
# length of prompt; and of everything else.
MOST_OVER_OPENVINO, MOST = 2.5 * 2**20, 0.1 * 2**20


def read_state() -> dict[str, int]:
    """Of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {
        "threads": int(fields["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "bytes": int(fields["VmRSS"].split()[0]) * 1024,
    }


def cycle_openvino(folder: str) -> None:
    """Compile, run and free a model with OpenVINO alone."""
    import numpy as np
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(f"{folder}/openvino_model.xml", "CPU")
    inputs = {
        "input_ids": np.ones((1, 16), np.int64),
        "attention_mask": np.ones((1, 16), np.int64),
        "position_ids": np.arange(16)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    compiled.create_infer_request().infer(inputs)


def cycle_library(folder: str) -> None:
    """Load a model, answer, close it."""
    import normistral

    with normistral.load(folder) as model:
        model.generate("Hello", max_new_tokens=2)


def run_series(kind: str, folder: str, count: int) -> None:
    """Print the state after a tenth of the cycles, and after all of them."""
    if kind == "turns":
        import normistral

        model = normistral.load(folder)
        chat = model.chat(overflow="drop-oldest")

    start = time.perf_counter()
    for number in range(1, count + 1):
        if kind == "turns":
            if number % 10 == 1:
                chat = model.chat()
            for _ in chat.stream("Hi", max_new_tokens=2):
                pass
        else:
            (cycle_openvino if kind == "alone" else cycle_library)(folder)
        if number in (max(1, count // 10), count):
            gc.collect()
            print(json.dumps({"cycles": number, "seconds": time.perf_counter() - start, **read_state()}), flush=True)


def measure(kind: str, folder: str, count: int) -> dict[str, float]:
    """Growth of a cycle between the first tenth and the end."""
    command = [sys.executable, __file__, "--series", kind, folder, str(count)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    first, last = (json.loads(line) for line in lines)
    cycles = last["cycles"] - first["cycles"]
    growth = {name: (last[name] - first[name]) / cycles for name in ("threads", "descriptors", "bytes")}
    print(
        f"{kind:8} {Path(folder).name:24} {count:5} times in {last['seconds']:5.0f} s: threads {first['threads']} -> "
        f"{last['threads']}, descriptors {first['descriptors']} -> {last['descriptors']}, memory "
        f"{first['bytes'] / 2**20:.0f} -> {last['bytes'] / 2**20:.0f} MiB ({growth['bytes'] / 2**20:+.3f} MiB each)",
        flush=True,
    )
    return growth


def main() -> int:
    if sys.argv[1] == "--series":
        run_series(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("openvino_artifact")
    parser.add_argument("onnx_artifact")
    parser.add_argument("--openvino", type=int, default=100)
    parser.add_argument("--onnx", type=int, default=300)
    parser.add_argument("--turns", type=int, default=3000)
    arguments = parser.parse_args()
    none = {"threads": 0.0, "descriptors": 0.0, "bytes": 0.0}
    alone = measure("alone", arguments.openvino_artifact, arguments.openvino)
    series = [
        (measure("library", arguments.openvino_artifact, arguments.openvino), alone, MOST_OVER_OPENVINO),
        (measure("library", arguments.onnx_artifact, arguments.onnx), none, MOST),
        (measure("turns", arguments.openvino_artifact, arguments.turns), none, MOST),
        (measure("turns", arguments.onnx_artifact, arguments.turns), none, MOST),
    ]
    kept = [
        grown["threads"] > engine["threads"] + 0.01
        or grown["descriptors"] > engine["descriptors"] + 0.01
        or grown["bytes"] > engine["bytes"] + most
        for grown, engine, most in series
    ]
    return int(any(kept))


if __name__ == "__main__":
    sys.exit(main())
