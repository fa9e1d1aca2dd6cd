"""Seconds by operator for a prompt and for decoding, by the engine's own profiler.

    python benchmarks/profile_operators.py ARTIFACT [--prompt 256] [--decode 24] [--json FILE]

The engine has the settings that `normistral.load` gives it. "between" is time outside of operators: the engine's
own bookkeeping, and ours. Profiling takes some time for each operator, so read shares.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import normistral
from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.runtime.engines import onnxruntime as onnx
from normistral.runtime.engines.base import Engine
from normistral.runtime.engines.openvino import load_openvino
from normistral.runtime.engines.openvino_paged import PagedBackend
from normistral.runtime.engines.settings import PREFILL_CHUNK, override
from normistral.runtime.providers import find_target, import_onnxruntime

TOKEN = 300  # an ordinary one, wherever there are so many
PREFILL, DECODE = "prefill", "decode"
WARM_UP_LENGTHS = (256, 1)  # kernels are made at the first of each kind
LOADED_INFERENCES = 2  # of `warm_up` as a model is loaded
COUNTERS = {"PERF_COUNT": "YES"}

Seconds = dict[str, float]  # operator -> seconds


class Clock:
    """Wall time of each phase, and of the operators in it."""

    def __init__(self, prompt: int, decode: int) -> None:
        self.prompt, self.decode = prompt, decode
        self.wall_s: Seconds = {}
        self.operators_s: dict[str, Seconds] = {}

    def run(self, engine: Engine, chunk: int, after_phase: Callable[[str], None] = lambda phase: None) -> None:
        """Feed a prompt in chunks, then single tokens."""
        lengths = [min(chunk, self.prompt - start) for start in range(0, self.prompt, chunk)]
        for phase, steps in ((PREFILL, lengths), (DECODE, [1] * self.decode)):
            started = time.perf_counter()
            for length in steps:
                engine.forward([TOKEN] * length)
            self.wall_s[phase] = time.perf_counter() - started
            after_phase(phase)


def profile_onnx(folder: Path, manifest: Manifest, clock: Clock) -> None:
    """onnxruntime's profile: one event for each operator of each run, in order."""
    target = find_target("CPU", import_onnxruntime().get_available_providers(), exact=False)
    graph = onnx.read_graph(folder, manifest)
    in_place = onnx.onnx_graph.is_fused(graph)
    plan = hardware.plan_onnxruntime(hardware.read_machine())
    settings = override(plan, {}, onnx.known_settings(graph), engine="onnxruntime", exact=False)
    chunk = int(settings.pop(PREFILL_CHUNK))
    onnx.adapt_graph(graph, None, onnx.choose_activation_bits(graph, target, None, None))
    options = onnx.session_options(settings, folder)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = str(Path(scratch, "profile"))
        session = onnx.open_session(bytes(graph), options, target, folder.name)
        backend = onnx.OnnxBackend(onnx.describe_decoder(session, manifest, target, in_place=in_place), None)  # type: ignore[arg-type]
        engine = backend.create_engine()
        for length in WARM_UP_LENGTHS:
            engine.forward([TOKEN] * length)
        engine.reset()
        clock.run(engine, chunk)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event["name"] == "model_run"]
    chunks = -(-clock.prompt // chunk)
    counted = {PREFILL: runs[-clock.decode - chunks : -clock.decode], DECODE: runs[-clock.decode :]}
    for phase, phase_runs in counted.items():
        begin, end = phase_runs[0]["ts"], phase_runs[-1]["ts"] + phase_runs[-1]["dur"]
        seconds: Seconds = defaultdict(float)
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time") and begin <= event["ts"] <= end:
                seconds[event["args"]["op_name"]] += event["dur"] / 1e6
        clock.operators_s[phase] = seconds


def profile_openvino(folder: Path, manifest: Manifest, clock: Clock) -> None:
    """OpenVINO's counters: for each operator the mean over all inferences of the request so far."""
    import openvino as ov

    compile_model = ov.Core.compile_model
    with patch.object(
        ov.Core,
        "compile_model",
        lambda core, model, device, given: compile_model(core, model, device, given | COUNTERS),
    ):
        backend = load_openvino(Artifact.open(folder))
    assert isinstance(backend, PagedBackend), "the default on CPUs"
    assert backend._pool is not None
    request, chunk, engine = backend._pool.request, backend.capabilities.prefill_chunk, backend.create_engine()
    inferences = 0

    def totals(more: int) -> Seconds:
        nonlocal inferences
        inferences += more
        seconds: Seconds = defaultdict(float)
        for counter in request.profiling_info:
            # The kernel's products are the only ones that OpenVINO runs by their own code.
            name = "int4 kernel" if counter.node_type == "Reference" else counter.node_type
            seconds[name] += counter.real_time.total_seconds() * inferences
        return seconds

    for length in WARM_UP_LENGTHS:
        engine.forward([TOKEN] * length)
    engine.reset()
    before = totals(LOADED_INFERENCES + len(WARM_UP_LENGTHS))
    steps = {PREFILL: -(-clock.prompt // chunk), DECODE: clock.decode}

    def add_counters(phase: str) -> None:
        nonlocal before
        after = totals(steps[phase])
        clock.operators_s[phase] = {name: seconds - before.get(name, 0.0) for name, seconds in after.items()}
        before = after

    clock.run(engine, chunk, add_counters)


def report(clock: Clock, manifest: Manifest) -> dict[str, object]:
    """Shares, as text on stdout and as a document."""
    document: dict[str, object] = {"normistral": normistral.__version__, "format": manifest.format}
    for phase, tokens in ((PREFILL, clock.prompt), (DECODE, clock.decode)):
        wall = clock.wall_s[phase]
        rows = sorted(clock.operators_s[phase].items(), key=lambda row: -row[1])
        rows.append(("between", wall - sum(seconds for _, seconds in rows)))
        print(f"{phase}: {tokens / wall:.1f} tokens/s, {1e3 * wall / tokens:.2f} ms a token")
        for name, seconds in rows:
            if abs(seconds) >= wall / 1000:
                print(f"  {name:<28} {1e3 * seconds / tokens:8.3f} ms  {seconds / wall:6.1%}")
        document[phase] = {"tokens": tokens, "wall_s": wall, "operators_s": dict(rows)}
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.artifact)
    clock = Clock(arguments.prompt, arguments.decode)
    profile = profile_openvino if manifest.format == "openvino" else profile_onnx
    profile(arguments.artifact, manifest, clock)
    document = report(clock, manifest)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
