"""The plain ONNX graph of tiny random checkpoints, run by onnxruntime, against transformers in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from checkpoint_headers import read_headers
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from tiny_models import QUIRKS, edit_json, make_llama, make_mistral
from transformers import AutoConfig, AutoModelForCausalLM

from normistral.export.onnx.plain import write_plain
from normistral.export.onnx.signature import DATA_NAME, GRAPH_NAME, read_signature
from normistral.progress import Uncounted

# Of the logits' spread (about 15). The same float32 weights and arithmetic: what is left is the order of sums, 3e-7 as
# measured. A window that is dropped or off by one costs more than 0.01 (test_the_window_matters).
TOLERANCE = 2e-5
# Float16 has 11 bits, 5e-4 per rounding; 4e-4 of the spread measured over two layers.
TOLERANCE_FLOAT16 = 2e-3

HELPERS = Path(__file__).parents[2] / "helpers"
IDS = np.array([1, *np.random.default_rng(7).integers(5, 261, size=47)])
LLAMA = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


class Counter(Uncounted):
    """A stage that adds up."""

    def __init__(self):
        self.total = 0

    def advance(self, amount):
        self.total += amount


def write(checkpoint, output, dtype="float32", stage=None):
    output.mkdir()
    write_plain(read_headers(checkpoint), output, dtype, stage or Uncounted())
    return output


class Artifact:
    """A plain artifact with a KV cache, in plain onnxruntime."""

    def __init__(self, folder, batch=1, head_dim=None):
        import onnxruntime  # only once normistral, imported above, has turned its telemetry off

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(folder / GRAPH_NAME, options, providers=["CPUExecutionProvider"])
        self.past = {}
        for port in self.session.get_inputs():
            if port.name.startswith("past_key_values."):
                width = port.shape[3] if head_dim is None else head_dim
                dtype = np.float16 if port.type == "tensor(float16)" else np.float32
                self.past[port.name] = np.zeros((batch, port.shape[1], 0, width), dtype)
        self.mask = np.ones((batch, 0), np.int64)

    def feed(self, ids, mask=None):
        ids = np.atleast_2d(ids)
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        logits, *present = self.session.run(None, inputs | self.past)
        self.past = dict(zip(self.past, present, strict=True))
        return logits if len(logits) > 1 else logits[0]


def reference(checkpoint, ids=IDS, **changes):
    """transformers' logits in float32."""
    config = AutoConfig.for_model(**(read_headers(checkpoint).config | changes))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    with torch.inference_mode():
        return model(torch.tensor(ids[None])).logits[0].numpy()


def error(logits, expected):
    """Largest difference as a share of the logits' spread."""
    assert logits.shape == expected.shape
    return np.abs(logits.astype(np.float32) - expected).max() / np.ptp(expected)


@pytest.fixture(scope="module")
def quirky(tmp_path_factory):
    """QUIRKS: grouped heads, head_dim 32 of hidden 64 and 4 heads, window 16 of 64 positions, untied."""
    folder = tmp_path_factory.mktemp("quirky")
    checkpoint = make_mistral(folder / "checkpoint", **QUIRKS)
    return checkpoint, write(checkpoint, folder / "float32")


@pytest.fixture(scope="module")
def quirky_float16(quirky, tmp_path_factory):
    return write(quirky[0], tmp_path_factory.mktemp("float16") / "artifact", "float16")


# ORTModelForCausalLM begins with an empty past as wide as hidden/heads (16), others with head_dim (32).
@pytest.mark.parametrize("head_dim", [16, 32])
def test_logits_equal_transformers_at_once_and_step_by_step(quirky, head_dim):
    checkpoint, folder = quirky
    expected = reference(checkpoint)
    at_once = Artifact(folder, head_dim=head_dim).feed(IDS)
    stepwise = Artifact(folder, head_dim=head_dim)
    steps = np.concatenate([stepwise.feed([token]) for token in IDS])
    turns = Artifact(folder, head_dim=head_dim)  # a turn of 20 tokens that crosses the window, an answer, a second turn
    parts = [turns.feed(IDS[:20]), *(turns.feed([token]) for token in IDS[20:25]), turns.feed(IDS[25:])]
    for logits in (at_once, steps, np.concatenate(parts)):
        assert error(logits, expected) <= TOLERANCE


def test_the_window_matters(quirky):
    """The comparison above would notice a window that is dropped, or off by one."""
    checkpoint, folder = quirky
    logits = Artifact(folder, head_dim=32).feed(IDS)
    for window in (None, 15, 17):
        assert error(logits, reference(checkpoint, sliding_window=window)) > 0.01


def test_float16_is_near_transformers(quirky, quirky_float16):
    expected = reference(quirky[0])
    stepwise = Artifact(quirky_float16, head_dim=32)
    steps = np.concatenate([stepwise.feed(IDS[:20]), *(stepwise.feed([token]) for token in IDS[20:])])
    for logits in (Artifact(quirky_float16, head_dim=32).feed(IDS), steps):
        assert logits.dtype == np.float16
        assert error(logits, expected) <= TOLERANCE_FLOAT16


@pytest.mark.parametrize(("fixture", "tolerance"), [("float32", TOLERANCE), ("float16", TOLERANCE_FLOAT16)])
def test_padding_on_the_left_changes_nothing(quirky, quirky_float16, fixture, tolerance):
    """A batch of a long and a short prompt, then two tokens each; the padding is longer than the window."""
    checkpoint, folder = quirky
    artifact = Artifact(folder if fixture == "float32" else quirky_float16, batch=2, head_dim=32)
    padding = 20
    short = IDS[5 : 45 - padding]
    prompts = np.stack([IDS[:40], np.concatenate([np.full(padding, 2), short])])
    mask = np.ones_like(prompts)
    mask[1, :padding] = 0
    following = np.array([[100, 101], [200, 201]])
    logits = np.concatenate(
        [artifact.feed(prompts, mask), artifact.feed(following[:, :1]), artifact.feed(following[:, 1:])], axis=1
    )
    assert error(logits[0], reference(checkpoint, np.concatenate([IDS[:40], following[0]]))) <= tolerance
    assert error(logits[1, padding:], reference(checkpoint, np.concatenate([short, following[1]]))) <= tolerance


def add_biases(checkpoint):
    """Random biases for every linear layer of a Llama."""
    noise = torch.Generator().manual_seed(1)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in list(tensors):
        if "proj" in name:
            tensors[name.replace(".weight", ".bias")] = torch.randn(len(tensors[name]), generator=noise)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    edit_json(checkpoint / "config.json", attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(
    ("make", "options", "changes"),
    [
        (make_mistral, {**QUIRKS, "tied": True}, {}),
        (make_mistral, {**QUIRKS, "head_dim": 24, "safetensors": False}, {}),
        (make_mistral, {**QUIRKS, "shards": 3, "dtype": "bfloat16"}, {}),
        (make_mistral, {**LLAMA, "kv_heads": 4, "dtype": "float16"}, {"hidden_act": "gelu_pytorch_tanh"}),
        (make_llama, {**LLAMA, "tied": True, "safetensors": False, "shards": 2}, {"rope_scaling": LLAMA3}),
        (make_llama, LLAMA, {"rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True}),
    ],
    ids=["tied", "bin", "shards", "gelu", "llama3-tied-bin-shards", "linear-biases"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("float16", TOLERANCE_FLOAT16)])
def test_checkpoints_of_all_kinds(tmp_path, make, options, changes, dtype, tolerance):
    checkpoint = make(tmp_path / "checkpoint", **options)
    edit_json(checkpoint / "config.json", **changes)
    if "attention_bias" in changes:
        add_biases(checkpoint)
    stage = Counter()
    folder = write(checkpoint, tmp_path / "artifact", dtype, stage)
    expected = reference(checkpoint)
    artifact = Artifact(folder, head_dim=options["head_dim"])
    parts = [artifact.feed(IDS[:20]), *(artifact.feed([token]) for token in IDS[20:])]
    assert error(np.concatenate(parts), expected) <= tolerance
    parameters = read_headers(checkpoint).architecture.parameters
    stored = 2 if options.get("dtype", "float32") != "float32" else 4
    assert stage.total == parameters * stored  # every tensor was read, and read once


def test_a_tied_table_is_in_the_file_once(tmp_path):
    tied, untied = (
        write(make_mistral(tmp_path / f"{tied}", **QUIRKS, tied=tied), tmp_path / f"{tied}-artifact")
        for tied in (True, False)
    )
    table_bytes = 261 * 64 * 4
    assert (untied / DATA_NAME).stat().st_size - (tied / DATA_NAME).stat().st_size >= table_bytes
    names = [tensor.name for tensor in onnx.load(tied / GRAPH_NAME, load_external_data=False).graph.initializer]
    assert "lm_head.weight" not in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("head_dim", [32, 16])
@pytest.mark.parametrize(("dtype", "float_type"), [("float32", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16)])
def test_the_signature_is_optimums(tmp_path, head_dim, dtype, float_type):
    """Names, types and axes; what is inferred from the graph agrees with what is declared (full_check)."""
    checkpoint = make_mistral(tmp_path / "checkpoint", **{**QUIRKS, "head_dim": head_dim})
    folder = write(checkpoint, tmp_path / "artifact", dtype)
    model = onnx.load(folder / GRAPH_NAME, load_external_data=False)
    headers = read_headers(checkpoint)
    signature = read_signature(AutoConfig.for_model(**headers.config), headers.architecture, float_type)
    assert list(model.graph.input) == list(signature.inputs)
    assert list(model.graph.output) == list(signature.outputs)
    onnx.checker.check_model(folder / GRAPH_NAME, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}


def test_the_same_checkpoint_gives_the_same_bytes(quirky, quirky_float16, tmp_path):
    """Also in a process of its own, which says nothing and leaves nothing in its working directory."""
    checkpoint, float32 = quirky
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HELPERS)!r})
from checkpoint_headers import read_headers
from normistral.export.onnx.plain import write_plain
from normistral.export.tools import quiet_tools
from normistral.progress import Uncounted
checkpoint = Path({str(checkpoint)!r})
headers = read_headers(checkpoint)
for dtype in ("float32", "float16"):
    output = Path({str(tmp_path)!r}) / dtype
    output.mkdir()
    with quiet_tools("onnx"):
        write_plain(headers, output, dtype, Uncounted())
"""
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "7", "FORCE_ONNX_EXTERNAL_DATA": "1"}  # the second is Optimum's
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(work.iterdir())
    for here, there in ((float32, tmp_path / "float32"), (quirky_float16, tmp_path / "float16")):
        files = {GRAPH_NAME, DATA_NAME}
        assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()} == files
        for name in files:
            assert (here / name).read_bytes() == (there / name).read_bytes()
