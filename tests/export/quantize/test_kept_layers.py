"""Calibrated exports that are interrupted at a layer in the middle, and go on there."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fork_server import run_forked
from tiny_models import make_mistral

import normistral
from normistral.errors import ResourceError
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.quantize import calibrate, plan
from normistral.export.quantize.kept_layers import KeptLayers, fingerprint
from normistral.export.quantize.plan import QuantPlan
from normistral.export.quantize.scheme import QuantParams, QuantScheme
from normistral.files import FOLDER_MARK, sha256_file
from normistral.progress import NoProgress

LAYERS = 5
CASES = {
    "openvino-best-mixed": {"format": "openvino", "recipe": "best", "ratio": 0.5},
    "onnx-balanced": {"format": "onnx", "recipe": "balanced"},
}
APART = """
import json, os, signal, sys
from normistral.export import pipeline
from normistral.export.quantize import calibrate, plan
checkpoint, output, options, kill_at, plan.CALIBRATION_TOKENS = map(json.loads, sys.argv[1:])
quantize, quantized = calibrate._quantize, set()
def watched(name, *arguments):
    layer = int(name.split(".layers.")[1].split(".")[0])
    if layer == kill_at and "down_proj" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    quantized.add(layer)
    quantize(name, *arguments)
calibrate._quantize = watched
pipeline.export_model(checkpoint, output, **options)
print(json.dumps(sorted(quantized)))
"""


def export_apart(checkpoint, output, options, kill_at=None):
    """Export in a process of its own, killed in the middle of a layer; the layers that it quantized, None if killed.

    OpenVINO numbers the operations of all graphs of a process, so only such exports have the same bytes.
    """
    arguments = [str(checkpoint), str(output), options, kill_at, plan.CALIBRATION_TOKENS]
    command = [sys.executable, "-c", APART, *map(json.dumps, arguments)]
    done = run_forked(command, cwd=output.parent, timeout=300, tools=True)
    assert done.returncode == (0 if kill_at is None else -signal.SIGKILL), done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1]) if kill_at is None else None


class Notes(NoProgress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    def has(self, pattern):
        return any(re.search(pattern, line) for line in self.lines)


class Exports:
    """Exports of one checkpoint to one place; which layers were quantized, and what was said."""

    def __init__(self, checkpoint, output, options, patch):
        self.checkpoint, self.output, self.options, self.patch = checkpoint, output, options, patch
        self.real = calibrate._quantize
        self.quantized, self.notes = set(), Notes()

    def run(self, *, at=None, do=None, **options):
        """Export; `do` is called in the middle of layer `at`."""
        self.quantized, self.notes = set(), Notes()

        def watched(name, *arguments):
            layer = int(name.split(".layers.")[1].split(".")[0])
            if layer == at and "down_proj" in name:
                do()
            self.quantized.add(layer)
            self.real(name, *arguments)

        self.patch.setattr(calibrate, "_quantize", watched)
        options = self.options | options
        return normistral.export_model(str(self.checkpoint), self.output, progress=self.notes, **options)

    def interrupt(self, at):
        with pytest.raises(KeyboardInterrupt):
            self.run(at=at, do=press_ctrl_c)

    @property
    def kept(self):
        (folder,) = self.output.parent.glob(f".{self.output.name}.kept-*")
        return folder


def press_ctrl_c():
    raise KeyboardInterrupt


def content(folder):
    """SHA-256 of every file but the card; the manifest without its date and the checksum of itself."""
    files = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("README.md", "normistral.json")
    }
    manifest = json.loads((folder / "normistral.json").read_text())
    del manifest["created"], manifest["checksum"]  # which is of the date too
    return files, manifest


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_mistral(tmp_path_factory.mktemp("kept") / "checkpoint", head_dim=32, layers=LAYERS)


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    """`content` of an export that nothing interrupted."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp("unbroken") / "out"
            export_apart(checkpoint, folder, CASES[case])
            made[case] = content(folder)
        return made[case]

    return make


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and limits of files")
@pytest.mark.parametrize("case", CASES)
def test_interrupted_three_times_it_makes_the_same_bytes(checkpoint, unbroken, tmp_path, monkeypatch, case):
    import resource

    exports = Exports(checkpoint, tmp_path / "out", CASES[case], monkeypatch)
    exports.interrupt(at=1)
    assert exports.notes.has(rf"kept 1 of {LAYERS} layers, .* in {re.escape(str(exports.kept))}: the same command")
    assert [path.name for path in exports.kept.glob("states-*")] == ["states-1"]
    assert {path.stat().st_mode & 0o777 for path in exports.kept.rglob("*") if path.is_file()} == {0o600}

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # states take 128 kB
        with pytest.raises(ResourceError, match="at most here"):
            exports.run(at=2, do=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert exports.quantized == {1, 2}
    assert exports.notes.has(f"kept 2 of {LAYERS} layers")

    export_apart(checkpoint, exports.output, CASES[case], kill_at=3)
    assert export_apart(checkpoint, exports.output, CASES[case]) == [3, 4]
    assert content(exports.output) == unbroken(case)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("damaged", "again"), [("rounded/*.layers.1.*.codes.npy", {1, 2, 3, 4}), ("states-3", {3, 4}), ("kept.json", None)]
)
def test_what_is_damaged_is_made_again(checkpoint, unbroken, tmp_path, monkeypatch, damaged, again):
    exports = Exports(checkpoint, tmp_path / "out", CASES["onnx-balanced"], monkeypatch)
    exports.interrupt(at=3)
    file = min(exports.kept.glob(damaged))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    exports.run()
    assert exports.quantized == (again or set(range(LAYERS)))
    assert exports.notes.has("kept layer 2 is damaged") == (min(exports.quantized) == 1)
    assert content(exports.output) == unbroken("onnx-balanced")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"restart": True}, "--restart"), ({"symmetric": False}, "other options"), ({"recipe": "fast"}, "needs none")],
)
def test_what_cannot_be_gone_on_with_is_thrown_away(checkpoint, tmp_path, monkeypatch, options, reason):
    exports = Exports(checkpoint, tmp_path / "out", CASES["onnx-balanced"], monkeypatch)
    exports.interrupt(at=1)
    exports.run(**options)
    assert exports.notes.has(rf"starts anew, without the layers that were kept \(1\): .*{reason}")
    assert exports.quantized == (set() if "recipe" in options else set(range(LAYERS)))
    assert names(tmp_path) == ["out"]


def test_an_export_that_fails_its_verification_keeps_nothing(checkpoint, tmp_path, monkeypatch):
    from normistral.errors import ExportError
    from normistral.export.verify import artifact as verification

    def fail(*arguments):
        raise ExportError("not the same model")

    monkeypatch.setattr(verification, "verify_artifact", fail)
    exports = Exports(checkpoint, tmp_path / "out", CASES["onnx-balanced"], monkeypatch)
    with pytest.raises(ExportError, match="not the same model"):
        exports.run()
    assert exports.notes.has(rf"layers that were kept \({LAYERS}\): what was made of them failed its verification")
    assert names(tmp_path) == []


def test_a_calibration_draws_nothing_at_random(checkpoint, tmp_path, monkeypatch):
    """There is no random state that would have to be kept."""
    real, same = calibrate.quantize_layers, []

    def quantize_layers(*arguments):
        torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
        real(*arguments)
        same.append(torch.equal(torch_before, torch.get_rng_state()))
        same.append(np.array_equal(numpy_before, np.random.get_state()[1]))

    monkeypatch.setattr(calibrate, "quantize_layers", quantize_layers)
    normistral.export_model(str(checkpoint), tmp_path / "out", **CASES["openvino-best-mixed"])
    assert same == [True, True]


# The folder by itself


SCHEME = QuantScheme(4, 2, symmetric=True)
MADE_OF = {name: name for name in ("checkpoint", "options", "tokens", "versions", "arithmetic")}


def keep(folder, made_of=MADE_OF, *, restart=False):
    notes = Notes()
    return KeptLayers.open(folder, made_of, 3, restart=restart, progress=notes), notes


def save_layer(kept, states):
    name = f"{kept.done}.weight"
    params = QuantParams(np.ones((1, 1), np.float32), np.full((1, 1), 8, np.float32))
    kept.tensors.write(name, np.array([[kept.done, 9]], np.uint8), params, SCHEME)
    kept.save([name], states)


def test_states_come_back_to_the_last_bit_in_any_type(tmp_path):
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        states = torch.randn(2, 3, 5).to(dtype)
        kept, _ = keep(tmp_path / str(number))
        save_layer(kept, states)
        save_layer(kept, states * 2)
        again, notes = keep(tmp_path / str(number))
        assert again.done == 2
        loaded = again.load_states()
        assert loaded.dtype == dtype
        assert torch.equal(loaded.view(torch.uint8), (states * 2).view(torch.uint8))
        assert again.tensors.read("1.weight").qweight.tolist() == [[0x91]]
        assert notes.lines == ["2 of 3 layers were kept by an interrupted export, which goes on here"]


@pytest.mark.parametrize("changed", MADE_OF)
def test_layers_of_something_else_are_not_taken(tmp_path, changed):
    kept, _ = keep(tmp_path / "kept")
    save_layer(kept, torch.ones(1, 1, 2))
    other, notes = keep(tmp_path / "kept", MADE_OF | {changed: "other"})
    assert other.done == 0
    assert notes.has(r"starts anew, without the layers that were kept \(1\): they ")
    assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == [FOLDER_MARK]


def test_other_numbers_of_threads_are_said(tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        kept, _ = keep(tmp_path / "kept")
        save_layer(kept, torch.ones(1, 1, 2))
        torch.set_num_threads(2)
        kept, notes = keep(tmp_path / "kept")
        assert notes.has("made with 3 threads, and there are 2 now: bytes may differ")
        save_layer(kept, torch.ones(1, 1, 2))
        torch.set_num_threads(3)
        _, notes = keep(tmp_path / "kept")  # the second layer is of other threads still
        assert notes.has("made with 2, 3 threads, and there are 3 now")
    finally:
        torch.set_num_threads(threads)


def test_a_fingerprint_tells_checkpoints_and_options_apart(checkpoint, tmp_path):
    opened = open_checkpoint(locate(str(checkpoint), progress=NoProgress()), tmp_path, progress=NoProgress())
    scheme = QuantPlan("gptq", 4, 32, symmetric=True)
    first = fingerprint(opened, scheme, [[1, 2]], {"torch": "2"}, "float32")
    assert fingerprint(opened, scheme, [[1, 2]], {"torch": "2"}, "float32") == first
    others = [
        ("options", (opened, replace(scheme, bits=8), [[1, 2]], {"torch": "2"}, "float32")),
        ("tokens", (opened, scheme, [[1, 3]], {"torch": "2"}, "float32")),
        ("versions", (opened, scheme, [[1, 2]], {"torch": "3"}, "float32")),
        ("arithmetic", (opened, scheme, [[1, 2]], {"torch": "2"}, "bfloat16")),
        (
            "checkpoint",
            (replace(opened, config=opened.config | {"rope_theta": 7.0}), scheme, [[1, 2]], {"torch": "2"}, "float32"),
        ),
    ]
    for name, arguments in others:
        found = fingerprint(*arguments)
        assert {key for key in first if found[key] != first[key]} == {name}
    (_, weights) = opened.unhashed[0]
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    try:
        assert fingerprint(opened, scheme, [[1, 2]], {"torch": "2"}, "float32")["checkpoint"] != first["checkpoint"]
    finally:
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
