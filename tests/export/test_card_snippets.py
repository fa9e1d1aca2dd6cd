"""The code on model cards runs, on artifacts of tiny random checkpoints: what a card shows works with its format."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fork_server import run_forked
from tiny_models import edit_json, make_mistral

import normistral
from normistral.artifact.card import render_card
from normistral.artifact.extra_files import CARD_NAME, is_sealed

BLOCK = re.compile(r"^### (?P<title>[^\n]*)\n\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def export(folder: Path, name: str, *, base: bool = False, **options: Any) -> Path:
    checkpoint = make_mistral(folder / "checkpoint", head_dim=16, positions=256)
    if base:
        edit_json(checkpoint / "tokenizer_config.json", chat_template=None)
        for template in checkpoint.glob("*.jinja"):
            template.unlink()
    manifest = normistral.export_model(str(checkpoint), folder / name, **options)
    assert (manifest.template is None) == base
    assert (folder / name / CARD_NAME).read_bytes() == render_card(manifest, name)
    assert is_sealed((folder / name / CARD_NAME).read_bytes())
    return folder / name


def snippets(artifact: Path) -> dict[str, str]:
    return {one["title"]: one["code"] for one in BLOCK.finditer((artifact / CARD_NAME).read_text())}


def run(codes: Sequence[str], folder: Path) -> None:
    """Run them one after the other, in one process that cannot reach a hub; each has to print something."""
    code = "import contextlib, io, sys\nfrom huggingface_hub import constants\nassert constants.HF_HUB_OFFLINE\n"
    code += "for code in sys.argv[1:]:\n    out = io.StringIO()\n"
    code += (
        "    with contextlib.redirect_stdout(out):\n        exec(code, {})\n    assert out.getvalue().strip(), code\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, *codes]
    done = run_forked(words, cwd=folder, env=environment, text=True, timeout=120, tools=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("base", [False, True])
def test_openvino(tmp_path: Path, base: bool) -> None:
    artifact = export(tmp_path, "openvino", base=base)
    found = snippets(artifact)
    assert found.keys() == {"normistral in Python", "optimum-intel", "openvino_genai"}
    run([*found.values()], tmp_path)


@pytest.mark.parametrize("options", [{}, {"weights": "fp32"}])
def test_onnx(tmp_path: Path, options: dict[str, Any]) -> None:
    artifact = export(tmp_path, "onnx", format="onnx", **options)
    found = snippets(artifact)
    expected = {"normistral in Python", "optimum-onnx"}
    assert found.keys() == (expected if options else expected | {"onnxruntime_genai"})
    if importlib.util.find_spec("onnxruntime_genai") is None:  # it is in none of the extras
        found.pop("onnxruntime_genai", None)
    run([*found.values()], tmp_path)
