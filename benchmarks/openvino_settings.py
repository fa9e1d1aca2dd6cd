"""Decode and prefill of one artifact under different OpenVINO settings, interleaved in one run.

    python benchmarks/openvino_settings.py ARTIFACT [--prompt 512] [--decode 16] [--repeats 3] [--json FILE]

"ours" is what `normistral.load` uses on this machine, "openvino" is OpenVINO's own default, "exact" is `exact=True`.
Loaded together where memory allows (--apart: one after the other), measured in turn, medians over the repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import openvino as ov

from normistral import hardware
from normistral.artifact.manifest import read_manifest
from normistral.runtime.engines.base import EngineInfo, warm_up
from normistral.runtime.engines.openvino import MODEL_FILE
from normistral.runtime.engines.openvino_graph import keep_last_logits
from normistral.runtime.engines.openvino_stateful import StatefulBackend

PREFILL_CHUNKS = (64, 128, 256, 512)


def load(folder: Path, settings: dict[str, str]) -> tuple[StatefulBackend, float]:
    """Backend and the seconds it took, warm-up included."""
    started = time.perf_counter()
    core = ov.Core()
    model = core.read_model(folder / MODEL_FILE)
    keep_last_logits(model)
    compiled = core.compile_model(model, "CPU", settings)
    backend = StatefulBackend(compiled, EngineInfo("openvino", "CPU", 256, settings))
    warm_up(backend)
    return backend, time.perf_counter() - started


def measure(backend: StatefulBackend, prompt: int, decode: int, chunk: int) -> tuple[float, float]:
    """Prefill and decode speed in tokens/s: a fresh sequence of `prompt` tokens, then `decode` more."""
    ids = np.random.default_rng(0).integers(300, 3000, prompt).tolist()
    engine = backend.create_engine()
    started = time.perf_counter()
    for start in range(0, prompt, chunk):
        engine.forward(ids[start : start + chunk])
    prefill_s = time.perf_counter() - started
    steps = []
    for token in range(decode):
        started = time.perf_counter()
        engine.forward([300 + token])
        steps.append(time.perf_counter() - started)
    engine.close()
    return prompt / prefill_s, 1 / statistics.median(steps)


def measure_chunks(backend: StatefulBackend, prompt: int) -> dict[str, float]:
    """Prefill speed by the size of the pieces a prompt is fed in."""
    return {str(chunk): round(measure(backend, prompt, 1, chunk)[0], 2) for chunk in PREFILL_CHUNKS if chunk <= prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunks", action="store_true", help="also compare sizes of prefill chunks")
    parser.add_argument("--apart", action="store_true", help="load one setting at a time (for little memory)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    machine = hardware.read_machine()
    manifest = read_manifest(arguments.artifact)
    variants = {
        "ours": hardware.plan_openvino(machine, manifest.recipe.weights),
        "openvino": {},
        "exact": hardware.exact_openvino(machine),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    load_s: dict[str, float] = {}
    chunks: dict[str, float] = {}
    loaded: dict[str, StatefulBackend] = {}
    for repeat in range(arguments.repeats):
        for name, settings in variants.items():
            if name not in loaded:
                loaded[name], seconds = load(arguments.artifact, settings)
                load_s.setdefault(name, round(seconds, 1))
            if arguments.chunks and name == "ours" and not chunks:
                chunks = measure_chunks(loaded[name], arguments.prompt)
            speeds[name].append(measure(loaded[name], arguments.prompt, arguments.decode, 256))
            print(f"{repeat} {name}: pp {speeds[name][-1][0]:.1f} tg {speeds[name][-1][1]:.2f}", flush=True)
            if arguments.apart:
                loaded.pop(name).close()
                gc.collect()
    report = {
        "artifact": arguments.artifact.name,
        "weights_gb": round(manifest.total_bytes / 1e9, 2),
        "cpu": machine.cpu,
        "threads": hardware.plan_threads(machine),
        "instruction_sets": sorted(machine.instruction_sets),
        "openvino": ov.__version__,
        "python": platform.python_version(),
        "prompt": arguments.prompt,
        "repeats": arguments.repeats,
        "prefill_by_chunk": chunks,
        "variants": {
            name: {
                "settings": variants[name],
                "load_s": load_s[name],
                "prefill_tokens_per_s": round(statistics.median(pp for pp, _ in results), 2),
                "decode_tokens_per_s": round(statistics.median(tg for _, tg in results), 3),
                "decode_range": [round(min(tg for _, tg in results), 3), round(max(tg for _, tg in results), 3)],
            }
            for name, results in speeds.items()
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
