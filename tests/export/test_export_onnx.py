"""Real exports of tiny random checkpoints to ONNX, offline: what is in the folder, and what is refused.

What the graphs compute is compared with transformers in test_engines.py and test_onnx_plain.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from tiny_models import edit_json, make_llama, make_mistral, random_tensors, write_weights

import normistral
from normistral.artifact.manifest import RecipeRecord, check_files, read_manifest
from normistral.errors import ExportError, MissingExtraError, ResourceError, UsageError
from normistral.export import staging
from normistral.export.onnx import artifact as writing
from normistral.export.onnx.signature import check_structure

FILES = {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "genai_config.json"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_mistral(tmp_path_factory.mktemp("onnx") / "checkpoint", head_dim=16, sliding_window=16, shards=2)


def export(checkpoint, folder, **options):
    if options.get("weights", "int4") == "int4":
        options = {"recipe": "fast"} | options
    return normistral.export_model(str(checkpoint), folder, format="onnx", **options)


def load_graph(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def read_tensor(folder, name):
    (tensor,) = (tensor for tensor in load_graph(folder).initializer if tensor.name == name)
    return onnx.numpy_helper.to_array(tensor, str(folder))


def test_the_artifact_is_complete(checkpoint, tmp_path):
    manifest = export(checkpoint, tmp_path / "out")
    folder = tmp_path / "out"
    assert read_manifest(folder) == manifest
    check_files(folder, manifest, thorough=True)
    assert {path.name for path in folder.iterdir()} == {*FILES, *TOKENIZER, "normistral.json", "README.md"}
    for name in TOKENIZER:
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert manifest.format == "onnx"
    assert manifest.recipe.graph == "fused"
    assert manifest.quality["probe_kl_nats"] > 0
    assert {"optimum-onnx", "onnx", "onnxruntime"} <= manifest.tools.keys()
    assert not {"nncf", "openvino"} & manifest.tools.keys()


@pytest.mark.parametrize(
    ("options", "recorded", "bits"),
    [
        (
            {},
            RecipeRecord("int4", True, 64, 1.0, "int8_asym", 8, "fused", "fast"),
            {"inner": 4, "lm_head": 8, "embedded": 8},
        ),
        (
            {"symmetric": False, "group_size": 32, "output_layer_bits": 4, "backup": "int8_sym"},
            RecipeRecord("int4", False, 32, 1.0, "int8_sym", 4, "fused", "fast"),
            {"inner": 4, "lm_head": 4, "embedded": 8},
        ),
        (
            {"output_layer_bits": 4, "backup": "fp"},
            RecipeRecord("int4", True, 64, 1.0, "fp", 4, "fused", "fast"),
            {"inner": 4, "lm_head": 4, "embedded": None},
        ),
        (
            {"weights": "int8"},
            RecipeRecord("int8", True, 64, graph="fused", recipe="fast"),
            dict.fromkeys(("inner", "lm_head"), 8),
        ),
        (
            {"weights": "int8", "symmetric": False, "group_size": 16},
            RecipeRecord("int8", False, 16, graph="fused", recipe="fast"),
            {"inner": 8, "lm_head": 8, "embedded": 8},
        ),
        ({"weights": "fp16"}, RecipeRecord("fp16", graph="plain"), {}),
        ({"weights": "fp32", "graph": "fused"}, RecipeRecord("fp32", graph="fused"), {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else "",
)
def test_every_recipe_stores_what_it_says(checkpoint, tmp_path, options, recorded, bits):
    manifest = export(checkpoint, tmp_path / "out", **options)
    assert manifest.recipe == recorded
    graph = load_graph(tmp_path / "out")
    rounded = {node.output[0]: node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")}
    assert bool(rounded) == (recorded.group_size is not None)
    for output, node in rounded.items():
        values = {attribute.name: attribute.i for attribute in node.attribute}
        part = {"logits": "lm_head", "embedded": "embedded"}.get(output, "inner")
        assert values["bits"] == bits.get(part, 8)
        assert values["block_size"] == recorded.group_size
    if bits.get("embedded", 8) is None:
        assert "embedded" not in rounded
    stored = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    halves = onnx.TensorProto.FLOAT16 in stored
    assert halves == (recorded.weights == "fp16")
    has_attention = any(node.op_type == "GroupQueryAttention" for node in graph.node)
    assert has_attention == (recorded.graph == "fused")


@pytest.mark.parametrize("options", [{}, {"weights": "int8", "symmetric": False}, {"weights": "fp16"}])
def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path, options):
    for name in ("first", "second"):
        export(checkpoint, tmp_path / name, **options)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize("options", [{}, {"output_layer_bits": 4}, {"weights": "fp32"}])
def test_tied_embeddings_are_stored_once(tmp_path, options):
    sizes = {}
    for tied in (True, False):
        model = make_llama(tmp_path / f"checkpoint-{tied}", head_dim=16, tied=tied, vocab=1024)
        export(model, tmp_path / f"out-{tied}", **options)
        sizes[tied] = (tmp_path / f"out-{tied}" / "model.onnx.data").stat().st_size
    # The other table is 8 bits with zero points, or float32; each tensor begins on a page.
    table = 1024 * 64 * (4 if options.get("weights") == "fp32" else 1)
    assert table <= sizes[False] - sizes[True] <= 1.1 * table + 3 * 4096


def test_the_progress_is_in_bytes_of_the_checkpoint(checkpoint, tmp_path):
    done = {}

    class Recorder:
        @contextlib.contextmanager
        def stage(self, title, total=None, unit=""):
            class Stage:
                def advance(self, amount):
                    done[title] = done.get(title, 0) + amount

                def set_total(self, total):
                    raise AssertionError

            done[f"{title} of"] = total
            yield Stage()

        def note(self, text):
            pass

    for kind in ("fused", "plain"):
        export(checkpoint, tmp_path / kind, weights="fp32", graph=kind, progress=Recorder())
        title = f"writing the {kind} graph"
        assert done[title] == done[f"{title} of"] > 0


def test_the_context_can_be_shortened(checkpoint, tmp_path):
    manifest = export(checkpoint, tmp_path / "out", context_length=32)
    assert manifest.context_length == 32
    assert read_tensor(tmp_path / "out", "rotary.cos").shape == (32, 8)
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert (genai["model"]["context_length"], genai["search"]["max_length"]) == (32, 32)
    with pytest.raises(UsageError, match="beyond the checkpoint's 64"):
        export(checkpoint, tmp_path / "longer", context_length=65)


def test_a_long_context_is_capped_and_said_to_be(tmp_path):
    model = make_mistral(tmp_path / "checkpoint", head_dim=16, positions=40_000)
    manifest = export(model, tmp_path / "out")
    assert manifest.context_length == 32768
    assert any("32768 of the checkpoint's 40000 tokens" in note for note in manifest.notes)


def test_genai_config_says_what_the_model_is(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "fused")
    export(checkpoint, tmp_path / "plain", weights="fp32")
    genai = {kind: json.loads((tmp_path / kind / "genai_config.json").read_text()) for kind in ("fused", "plain")}
    model, search = genai["fused"]["model"], genai["fused"]["search"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([2, 4], 1, 2)
    assert (model["vocab_size"], model["context_length"]) == (261, 64)
    decoder = model["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 16)
    names = {port.name for port in load_graph(tmp_path / "fused").input}
    named = {decoder["inputs"][name] for name in ("input_ids", "attention_mask", "position_ids")}
    named |= {decoder["inputs"][f"past_{kind}_names"] % layer for kind in ("key", "value") for layer in (0, 1)}
    assert named == names
    assert (search["do_sample"], search["temperature"], search["top_k"], search["top_p"]) == (True, 0.3, 64, 0.9)
    assert search["past_present_share_buffer"]
    assert not genai["plain"]["search"]["past_present_share_buffer"]


def test_an_export_imports_neither_openvino_nor_nncf(checkpoint, tmp_path):
    code = f"""
import sys, normistral
from normistral.export.quantize import plan
plan.CALIBRATION_TOKENS = 512
for weights in ("int4", "fp32"):
    normistral.export_model({str(checkpoint)!r}, {str(tmp_path)!r} + "/" + weights, format="onnx", weights=weights)
print(*sorted({{"openvino", "nncf", "openvino_tokenizers"}} & {{n for n, m in sys.modules.items() if m is not None}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("options", [{}, {"weights": "fp16"}])
def test_stdout_and_stderr_stay_silent_and_no_thread_is_left(checkpoint, tmp_path, capfd, options):
    export(checkpoint, tmp_path / "out", **options)
    assert capfd.readouterr() == ("", "")
    ours = ("memory meter", "export", "round")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]


def test_nothing_asks_the_network(checkpoint, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "plain", weights="fp32")


@pytest.mark.parametrize("graph", ["fused", "plain"])
def test_weights_beyond_float16_are_refused_and_leave_nothing(tmp_path, graph):
    model = make_mistral(tmp_path / "checkpoint", head_dim=16)
    tensors = random_tensors(json.loads((model / "config.json").read_text()), seed=0)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000.0
    write_weights(model, tensors, shards=1, safetensors=True)
    with pytest.raises(ExportError, match=r"up_proj\.weight has values up to 70000, beyond the range of float16"):
        export(model, tmp_path / "out", weights="fp16", graph=graph)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_heads_that_the_fused_graph_cannot_turn_are_refused(tmp_path):
    model = make_mistral(tmp_path / "checkpoint", head_dim=24)
    with pytest.raises(ExportError, match="attention heads of a width that 16 divides, not 24"):
        export(model, tmp_path / "out", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert export(model, tmp_path / "out", weights="fp32").recipe.graph == "plain"


def test_a_model_that_computes_something_else_is_refused(checkpoint, tmp_path, monkeypatch):
    real = writing._WRITERS["mistral"]

    def write_damaged(graph, architecture, config, *args):
        real(graph, architecture, config | {"rms_norm_eps": 10.0}, *args)

    monkeypatch.setitem(writing._WRITERS, "mistral", write_damaged)
    with pytest.raises(ExportError, match="does not compute what transformers does with the same weights"):
        export(checkpoint, tmp_path / "out", weights="fp32", graph="fused")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def written(tiny_onnx, tmp_path):
    """A copy of an artifact whose files may be damaged, and its manifest."""
    folder = shutil.copytree(tiny_onnx("onnx-int4"), tmp_path / "artifact")
    return folder, read_manifest(folder)


@pytest.mark.parametrize("keep", [0, 4096, -1])
def test_weights_that_are_not_whole_are_found_without_running(written, keep):
    folder, manifest = written
    data = folder / "model.onnx.data"
    os.truncate(data, keep if keep >= 0 else data.stat().st_size + keep)
    with pytest.raises(ExportError, match="are not whole: bytes"):
        check_structure(folder, manifest)


def test_a_graph_that_is_not_whole_is_found(written, monkeypatch):
    folder, manifest = written
    os.truncate(folder / "model.onnx", 5000)
    with pytest.raises(ExportError, match=r"the written model\.onnx cannot be read again"):
        check_structure(folder, manifest)
    monkeypatch.setattr(staging, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="the disk is full"):
        check_structure(folder, manifest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda graph: graph.input.pop(), "inputs instead of"),
        (lambda graph: graph.output.pop(), "outputs instead of"),
        (lambda graph: setattr(graph.input[0], "name", "ids"), "input ids is not %input_ids"),
        (lambda graph: graph.output[0].type.tensor_type.shape.dim.pop(), "output logits is not"),
    ],
)
def test_another_signature_is_found(written, change, words):
    folder, manifest = written
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=words):
        check_structure(folder, manifest)


def test_a_place_that_does_not_fit_type_and_shape_is_found(written):
    folder, manifest = written
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    tensor.dims[0] *= 2
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="are not whole"):
        check_structure(folder, manifest)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_write_that_the_system_refuses_leaves_nothing(checkpoint, tmp_path, limit):
    """A limit on the size of files stands in for a full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((ExportError, ResourceError)):
            export(checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"ratio": 0.5, "recipe": "fast"},
            "the recipe fast rounds all layers alike in ONNX, so a ratio of 0.5 is not possible",
        ),
        ({"graph": "plain"}, "a plain graph has no int4 weights"),
        ({"group_size": 128}, "group size 128 does not divide all of the model's widths 64, 128"),
        ({"weights": "int2"}, "weights must be one of int4, int8, fp16, fp32, not 'int2'"),
    ],
)
def test_impossible_requests_are_refused(checkpoint, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        export(checkpoint, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_a_missing_package_is_named_before_any_work(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(MissingExtraError, match="needs the package onnxruntime") as caught:
        normistral.export_model("nosuchmodel", tmp_path / "out", format="onnx")
    assert 'pip install "normistral[export,onnx]"' in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_rope_scaling_reaches_the_graph(tmp_path):
    """Verified against transformers at the export itself: angles without the scaling would be another model's."""
    model = make_llama(tmp_path / "checkpoint", head_dim=16)
    scaling = {"rope_type": "linear", "factor": 4.0}
    plain = export(model, tmp_path / "plain", weights="fp32", graph="fused")
    edit_json(model / "config.json", rope_scaling=scaling)
    scaled = export(model, tmp_path / "scaled", weights="fp32", graph="fused")
    assert max(plain.quality["probe_kl_nats"], scaled.quality["probe_kl_nats"]) < 1e-6
    tables = [read_tensor(tmp_path / name, "rotary.cos") for name in ("plain", "scaled")]
    assert np.abs(tables[0] - tables[1]).max() > 0.1
