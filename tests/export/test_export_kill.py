"""SIGKILL at random moments of a tiny export; `kill_export.py` alone does the same to any model, as often as wanted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from fork_server import run_forked
from tiny_models import make_mistral

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLS = int(os.environ.get("NORMISTRAL_TEST_KILLS", "6"))


@pytest.mark.parametrize(("format", "recipe"), [("openvino", "fast"), ("onnx", "best")])
def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path, format, recipe):
    """With and without a calibration, which writes files of its own into the folder that is renamed at the end."""
    checkpoint = make_mistral(tmp_path / "checkpoint", head_dim=32)
    script = Path(__file__).parents[1] / "scripts" / "kill_export.py"
    options = ["--format", format, "--recipe", recipe, "--calibration-tokens", "512"]
    options += ["--kills", str(KILLS), "--recover-every", "3"]
    words = [sys.executable, "-c", script.read_text(encoding="utf-8"), str(checkpoint), *options]
    done = run_forked(words, cwd=tmp_path, text=True, timeout=60 + 60 * KILLS, tools=True)
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert tally["killed"] + tally["finished"] == KILLS
    assert tally["killed"] >= KILLS // 2
    assert tally["partial_left"] >= 1
