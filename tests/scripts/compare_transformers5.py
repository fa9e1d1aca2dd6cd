"""Checkpoints that the newest transformers 5 saves, exported in both formats and compared with it.

Run by make test-transformers5:

    python tests/scripts/compare_transformers5.py ENVIRONMENT [--store]

ENVIRONMENT is a virtual environment with transformers 5 and the same torch; it is made if it is not there (1 GB). With
--store what it wrote replaces data/transformers5/, which the suite uses. Exits with 1 if a logit is further away than
1e-3 of the logits' spread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from tiny_models import VOCABULARY, write_tokenizer
from tiny_transformers5 import CASES, STORED, TOKENS, random_state

from normistral.artifact.artifact import Artifact
from normistral.runtime.engines.settings import EngineConfig

if TYPE_CHECKING:
    from normistral.artifact.manifest import Manifest

BOUND = 1e-3
RECIPES = (("openvino", "fp16", "plain"), ("onnx", "fp32", "plain"), ("onnx", "fp32", "fused"))
PACKAGES = ("torch==2.13.0", "transformers>=5,<6", "safetensors")


def save_all(folder: Path) -> None:
    """Runs in the environment: what transformers 5 writes and computes for every case, and the names of its fields."""
    import torch
    import transformers

    fields = {}
    for name, (kind, options) in CASES.items():
        config = getattr(transformers, f"{kind}Config")(**options)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        model.load_state_dict({key: torch.from_numpy(values) for key, values in random_state(name).items()})
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name, VOCABULARY, chat=False, adds_bos=False)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        with torch.inference_mode():
            np.save(folder / f"{name}.npy", loaded(torch.tensor([TOKENS])).logits[0].numpy())
        named = {field.name for field in dataclasses.fields(config)} | config.to_dict().keys()
        fields[kind.lower()] = sorted(named)
    fields["generation"] = sorted(vars(transformers.GenerationConfig()))
    (folder / "fields.json").write_text(json.dumps({"version": transformers.__version__, **fields}, indent=1) + "\n")


def run_exact(artifact: Path, manifest: Manifest) -> np.ndarray:
    """Logits [tokens, vocabulary] of an artifact for TOKENS, with reference arithmetic."""
    from normistral.runtime.loading import load_backend

    backend = load_backend(Artifact(artifact, manifest), EngineConfig(exact=True))
    try:
        return backend.create_engine().forward(TOKENS, last=len(TOKENS))
    finally:
        backend.close()


def compare_all(folder: Path) -> float:
    """Export every case and print its largest difference; returns the largest of all."""
    from normistral import export_model

    worst = 0.0
    for name in CASES:
        expected = np.load(folder / f"{name}.npy")
        for format, weights, graph in RECIPES:
            options = {"graph": graph} if format == "onnx" else {}
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "artifact"
                manifest = export_model(str(folder / name), output, format, weights, **options)
                assert manifest.verified == "run"
                found = run_exact(output, manifest)
            difference = float(np.abs(found - expected).max() / np.ptp(expected))
            worst = max(worst, difference)
            print(f"{name:16} {format:9} {weights} {graph:6} {difference:.1e} of the spread", flush=True)
    return worst


def store(folder: Path) -> None:
    """Keep what the suite uses."""
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    for name in CASES:
        shutil.copyfile(folder / name / "config.json", STORED / f"{name}.json")
        np.save(STORED / f"{name}.npy", np.load(folder / f"{name}.npy")[-16:])
    shutil.copyfile(folder / "fields.json", STORED / "fields.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.save is not None:
        save_all(given.save)
        return
    python = given.environment / "bin" / "python"
    if not python.exists():
        venv.create(given.environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([python, __file__, str(given.environment), "--save", scratch], check=True)
        print("transformers", json.loads((Path(scratch) / "fields.json").read_text())["version"])
        if given.store:
            store(Path(scratch))
        worst = compare_all(Path(scratch))
    if not worst <= BOUND:
        sys.exit(f"up to {worst:.1e} of the logits' spread, at most {BOUND:g} allowed")


if __name__ == "__main__":
    main()
