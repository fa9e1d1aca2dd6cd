"""What run-time settings cost on top of rounding: artifacts under each setting, against the checkpoint in float32.

    python benchmarks/settings_quality.py MODEL --text en=FILE --text nb=FILE --artifact NAME=FOLDER ... \\
        --json OUT.json --report OUT.md [--cache FOLDER]

MODEL is the checkpoint that the artifacts were made from. The first 1,536 tokens of each text in three windows of 512,
fed as the runtime feeds a prompt, in chunks of 256: the second chunk reads keys and values back from the cache. The
second half of the first window is also fed token by token, which runs the kernels of decoding; its figure stands beside
that of the same tokens in one chunk. KL divergence from the checkpoint's own float32 logits in nats, as in
rounding_study.py, whose cache of them --cache may be.

"×" is the mean KL over that of the same artifact in exact mode. Settings are named by what differs from the plan of
`hardware.plan_openvino`; the last column is what OpenVINO's compiled model says is in force, and where that is the same
the figures are not measured again. A run that was stopped goes on with what OUT.json does not have yet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openvino_settings import load as load_openvino
from rounding_study import compare, load_reference, load_windows

import normistral
from normistral import hardware
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.progress import NoProgress
from normistral.runtime.engines.base import Backend, Engine
from normistral.runtime.engines.openvino_stateful import StatefulBackend

CHUNK = 256
EXACT, DEFAULT = "exact", "default"
IN_FORCE = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")

Settings = dict[str, str]
Row = dict[str, Any]


def openvino_variants(weights: str) -> dict[str, Settings]:
    """Name → settings of OpenVINO's CPU plugin for weights of this format."""
    machine = hardware.read_machine()
    plan = hardware.plan_openvino(machine, weights)
    threads = {key: plan[key] for key in ("PERFORMANCE_HINT", "INFERENCE_NUM_THREADS")}
    f32 = threads | {"INFERENCE_PRECISION_HINT": "f32"}
    variants = {EXACT: hardware.exact_openvino(machine), DEFAULT: plan, "OpenVINO's own": threads}
    variants["bf16"] = threads | {"INFERENCE_PRECISION_HINT": "bf16"}
    for group in ("0", "32", "64", "128"):
        variants[f"f32, dynamic quantisation {group}"] = f32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    for group in ("0", "64"):
        for cache in ("u8", "f16", "f32"):
            name = f"f32, dynamic quantisation {group}, KV {cache}"
            variants[name] = f32 | {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group, "KV_CACHE_PRECISION": cache}
    return variants


def settings_in_force(backend: Backend) -> Settings:
    """What OpenVINO's compiled model says; of onnxruntime, what the engine says that it set."""
    if not isinstance(backend, StatefulBackend):
        return {"accuracy level": backend.capabilities.settings.get("accuracy_level", "none")}
    assert backend._compiled is not None
    found = {name: str(backend._compiled.get_property(name)) for name in IN_FORCE}
    return {name: value.removeprefix("<Type: '").removesuffix("'>") for name, value in found.items()}


@contextmanager
def loaded(folder: Path, manifest: Manifest, name: str, settings: Settings) -> Iterator[Backend]:
    if manifest.format == "onnx":
        with normistral.load(folder, exact=name == EXACT) as model:
            yield model._backend
    else:
        backend, _ = load_openvino(folder, settings)
        yield backend
        backend.close()


def predict(engine: Engine, token_ids: list[int], pieces: list[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of a new sequence that is fed in pieces of these lengths."""
    engine.reset()
    logits, start = [], 0
    for length in pieces:
        logits.append(engine.forward(token_ids[start : start + length], last=length))
        start += length
    return torch.from_numpy(np.concatenate(logits)).log_softmax(-1)


def measure(backend: Backend, reference: torch.Tensor, windows: torch.Tensor) -> dict[str, float]:
    """Figures of one text; reference: [windows, tokens, vocabulary], windows: token ids [windows, tokens]."""
    engine = backend.create_engine()
    tokens = windows.shape[1]
    chunks = [CHUNK] * (tokens // CHUNK)
    figures = compare(reference, lambda window: predict(engine, window.tolist(), chunks), windows)
    for kind, pieces in (("chunk", chunks), ("decoded", [CHUNK] + [1] * (tokens - CHUNK))):
        found = predict(engine, windows[0].tolist(), pieces)[CHUNK:]
        expected = reference[0, CHUNK:]
        figures[f"kl_{kind}"] = (expected.exp() * (expected - found)).sum(-1).mean().item()
    engine.close()
    return figures


def write_report(document: dict[str, Any], path: Path) -> None:
    languages = document["languages"]
    head = ["artifact, settings", *(f"KL {language} (×)" for language in languages)]
    head += ["top-1", "perplexity", "256 tokens in one chunk", "the same one by one", "in force"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for artifact, rows in document["artifacts"].items():
        for name, row in rows.items():
            figures = [row[language] for language in languages]
            cells = [f"{artifact}, {name}"]
            for language in languages:
                exact = rows[EXACT][language]["kl_mean"]
                cells.append(f"{row[language]['kl_mean']:.5f} ({row[language]['kl_mean'] / exact:.2f})")
            for key, digits in (("top1", 3), ("perplexity", 2), ("kl_chunk", 5), ("kl_decoded", 5)):
                cells.append(" / ".join(f"{figure[key]:.{digits}f}" for figure in figures))
            cells.append(" / ".join(row["in_force"].values()))
            lines.append("| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("text", "artifact"):
        parser.add_argument(f"--{name}", action="append", default=[], type=lambda pair: pair.split("=", 1))
    parser.add_argument("--cache", type=Path, help="keeps the checkpoint's logits between runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    machine = hardware.read_machine()
    document: dict[str, Any] = {"artifacts": {}}
    if arguments.json.exists():
        document = json.loads(arguments.json.read_text(encoding="utf-8"))
    document |= {
        "cpu": machine.cpu,
        "instruction_sets": sorted(machine.instruction_sets),
        "languages": [language for language, _ in arguments.text],
        "versions": {name: version(name) for name in ("openvino", "onnxruntime", "torch", "transformers")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = locate(arguments.model, progress=NoProgress())
        checkpoint = open_checkpoint(source, Path(scratch), progress=NoProgress())
        windows = load_windows(checkpoint.folder, arguments.text)
        reference = load_reference(checkpoint.folder, windows, arguments.cache)
        for artifact, place in arguments.artifact:
            folder = Path(place)
            manifest = read_manifest(folder)
            rows: dict[str, Row] = document["artifacts"].setdefault(artifact, {})
            is_openvino = manifest.format == "openvino"
            variants = openvino_variants(manifest.recipe.weights) if is_openvino else {EXACT: {}, DEFAULT: {}}
            for name, settings in variants.items():
                if name in rows:
                    continue
                with loaded(folder, manifest, name, settings) as backend:
                    row: Row = {"settings": backend.capabilities.settings, "in_force": settings_in_force(backend)}
                    same = [other for other in rows.values() if other["in_force"] == row["in_force"]]
                    for language, ids in windows.items():
                        row[language] = same[0][language] if same else measure(backend, reference[language], ids)
                rows[name] = row
                print(artifact, name, row["in_force"], {la: row[la]["kl_mean"] for la in windows}, flush=True)
                arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_report(document, arguments.report)


if __name__ == "__main__":
    main()
