"""Real exports of tiny random checkpoints, offline; logits against transformers in float32."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import threading

import numpy as np
import openvino
import pytest
import torch
from tiny_models import make_llama, make_mistral

import normistral
from normistral.artifact.manifest import check_files, read_manifest
from normistral.errors import ExportError, MissingExtraError, ResourceError, UsageError
from normistral.export import staging
from normistral.export.openvino import cast_to_float16
from normistral.hardware import exact_openvino, read_machine

# Reference and artifact hold the same float16 weights and compute in float32; what is left is the order of sums:
# 1e-6 of the largest logit (about 5) per operation, over two layers. Dropping the sliding window costs 0.1 and more
# (test_the_window_matters).
TOLERANCE = 2e-5


class Recorder:
    """A Progress that remembers."""

    def __init__(self):
        self.stages = []
        self.notes = []
        self.done = {}

    @contextlib.contextmanager
    def stage(self, title, total=None, unit=""):
        self.stages.append(title)
        recorder = self

        class Stage:
            def advance(self, amount):
                recorder.done[title] = recorder.done.get(title, 0) + amount

            def set_total(self, total):
                recorder.done[f"{title} total"] = total

        yield Stage()

    def note(self, text):
        self.notes.append(text)


class Artifact:
    """An IR run by plain openvino in float32, keys and values included."""

    def __init__(self, folder):
        compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", exact_openvino(read_machine()))
        self.request = compiled.create_infer_request()
        self.length = 0

    def feed(self, ids):
        count = len(ids)
        self.request.infer(
            {
                "input_ids": np.array([ids], dtype=np.int64),
                "attention_mask": np.ones((1, self.length + count), dtype=np.int64),
                "position_ids": np.arange(self.length, self.length + count, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        self.length += count
        return np.array(self.request.get_tensor("logits").data[0])


def reference_logits(folder, ids, scratch, **changes):
    """transformers in float32, with the matrices rounded to float16 as the artifact has them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
    cast_to_float16(model, scratch)
    with torch.inference_mode():
        return model.float()(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def quirky(tmp_path_factory):
    """GQA, head_dim 24 of hidden 64 and 4 heads, window 16 of 64 positions, untied; and its fp16 artifact."""
    folder = tmp_path_factory.mktemp("quirky")
    checkpoint = make_mistral(folder / "checkpoint", sliding_window=16)
    progress = Recorder()
    manifest = normistral.export_model(str(checkpoint), folder / "fp16", weights="fp16", progress=progress)
    return checkpoint, folder / "fp16", manifest, progress


IDS = [1, *np.random.default_rng(7).integers(5, 261, size=47).tolist()]


def test_logits_equal_transformers_at_once_and_step_by_step(quirky, tmp_path):
    checkpoint, folder, _, _ = quirky
    expected = reference_logits(checkpoint, IDS, tmp_path / "f16")
    at_once = Artifact(folder).feed(IDS)
    stepwise = Artifact(folder)
    steps = np.concatenate([stepwise.feed([token]) for token in IDS])
    turns = Artifact(folder)  # a first turn of 20 tokens that crosses the window, an answer, a second turn
    parts = [turns.feed(IDS[:20]), *(turns.feed([token]) for token in IDS[20:25]), turns.feed(IDS[25:])]
    scale = np.abs(expected).max()
    for logits in (at_once, steps, np.concatenate(parts)):
        assert logits.shape == (48, 261)
        assert np.abs(logits - expected).max() <= TOLERANCE * scale


def test_the_window_matters(quirky, tmp_path):
    """The comparison above would notice a window that is dropped, or off by one."""
    checkpoint, folder, _, _ = quirky
    logits = Artifact(folder).feed(IDS)
    for window in (None, 15, 17):
        wrong = reference_logits(checkpoint, IDS, tmp_path / "f16", sliding_window=window)
        assert np.abs(logits - wrong).max() > 0.01 * np.abs(wrong).max()


def test_the_artifact_is_complete(quirky):
    checkpoint, folder, manifest, progress = quirky
    assert read_manifest(folder) == manifest
    check_files(folder, manifest, thorough=True)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "normistral.json", "README.md"}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
        assert not (folder / name).is_symlink()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 4]  # trap 1: config.json alone says 2
    assert (generation["do_sample"], generation["temperature"], generation["top_k"]) == (True, 0.3, 64)
    assert manifest.stop_token_ids == (2, 4)
    assert manifest.recipe.weights == "fp16"
    assert set(manifest.source.files) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest.quality is not None
    assert manifest.quality["probe_kl_nats"] < 1e-4
    assert {"verifying the files", "verifying by running it"} <= set(progress.stages)
    assert progress.done["hashing"] == manifest.total_bytes
    assert "peak memory" in progress.notes[-1]


def test_optimum_opens_it_and_generates_the_same_tokens(quirky, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, folder, _, _ = quirky
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=settings, local_files_only=True)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    inputs = AutoTokenizer.from_pretrained(folder)("Hei på deg, æøå!", return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": [2, 4], "pad_token_id": 2}
    assert model.generate(**inputs, **options).tolist() == reference.generate(**inputs, **options).tolist()


def test_openvino_tokenizer_carries_the_template_and_gives_the_same_ids(quirky):
    import openvino_tokenizers  # noqa: F401
    from transformers import AutoTokenizer

    checkpoint, folder, manifest, _ = quirky
    core = openvino.Core()
    encode = core.compile_model(folder / "openvino_tokenizer.xml", "CPU")
    decode = core.compile_model(folder / "openvino_detokenizer.xml", "CPU")
    text = "Blåbærsyltetøy 🫐"
    ids = encode([text])["input_ids"]
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(checkpoint)(text)["input_ids"]
    assert decode(ids)["string_output"][0] == text
    rt_info = core.read_model(folder / "openvino_tokenizer.xml").get_rt_info("chat_template")
    assert rt_info.value == manifest.template.text


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"weights": "int8"}, {"i8"}),
        ({"weights": "int8", "symmetric": False}, {"u8"}),
        ({"weights": "int4"}, {"i4", "u8"}),
        ({"weights": "int4", "symmetric": False, "group_size": -1}, {"u4", "u8"}),
        ({"weights": "int4", "ratio": 0.5, "backup": "int8_sym"}, {"i4", "i8"}),
        ({"weights": "int4", "output_layer_bits": 4}, {"i4", "u8"}),
        ({"weights": "int4", "output_layer_bits": 4, "backup": "fp"}, {"i4", "bf16"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_every_recipe_stores_what_it_says(tmp_path, options, kinds):
    checkpoint = make_mistral(tmp_path / "checkpoint", dtype="bfloat16", shards=2)
    if options["weights"] == "int4":
        options = {"recipe": "fast"} | options
    manifest = normistral.export_model(str(checkpoint), tmp_path / "out", **options)
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    matrices = [node for node in graph.get_ops() if node.get_type_name() == "Constant" and is_matrix(node)]
    stored = {node.get_element_type().get_type_name() for node in matrices}
    assert stored == kinds
    output = stored_type_of(graph, "lm_head")
    embedding = stored_type_of(graph, "embed_tokens")
    four_bits = options.get("output_layer_bits") == 4
    assert (output in ("i4", "u4")) == four_bits
    assert embedding not in ("i4", "u4")
    assert manifest.recipe.weights == options["weights"]
    assert manifest.quality["probe_kl_nats"] > 0


def test_weights_of_a_finer_type_than_most_are_not_rounded_to_it(tmp_path):
    """As QLoRA leaves embeddings and norms in float32 beside matrices in bfloat16."""
    from safetensors.torch import load_file, save_file

    checkpoint = make_mistral(tmp_path / "checkpoint", dtype="bfloat16", layers=1, head_dim=16)
    path = checkpoint / "model.safetensors"
    fine = ("norm.weight", "down_proj.weight", "embed_tokens.weight")
    tensors = {
        name: values.float() * 1.003 if name.endswith(fine) else values for name, values in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    normistral.export_model(str(checkpoint), tmp_path / "out", weights="fp16")
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    found = {node.get_friendly_name(): node for node in graph.get_ops() if node.get_type_name() == "Constant"}
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        (values,) = [node.data for key, node in found.items() if key.startswith(f"self.{name.rpartition('.')[0]}.")]
        assert np.array_equal(values, tensors[name].half().numpy()), name
    expected = reference_logits(checkpoint, IDS, tmp_path / "f16")
    assert np.abs(Artifact(tmp_path / "out").feed(IDS) - expected).max() <= TOLERANCE * np.abs(expected).max()


def is_matrix(node):
    return (
        node.get_element_type().size * np.prod(node.get_output_shape(0)) >= 0
        and sum(1 for size in node.get_output_shape(0) if size > 1) >= 2
        and np.prod(node.get_output_shape(0)) >= 48 * 64
    )


def stored_type_of(graph, name):
    (found,) = {
        node.get_element_type().get_type_name()
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and name in node.get_friendly_name() and is_matrix(node)
    }
    return found


@pytest.mark.parametrize(("weights", "recipe"), [("fp16", None), ("int4", "fast")])
def test_tied_embeddings_are_stored_once(tmp_path, weights, recipe):
    sizes = {}
    for tied in (True, False):
        checkpoint = make_llama(tmp_path / f"checkpoint-{tied}", tied=tied, vocab=1024, dtype="bfloat16")
        normistral.export_model(str(checkpoint), tmp_path / f"out-{tied}", weights=weights, recipe=recipe)
        sizes[tied] = (tmp_path / f"out-{tied}" / "openvino_model.bin").stat().st_size
    table = 1024 * 64 * (2 if weights == "fp16" else 1)
    assert table <= sizes[False] - sizes[True] <= 1.1 * table


def test_stdout_and_stderr_stay_silent_and_no_thread_is_left(tmp_path, capfd):
    checkpoint = make_mistral(tmp_path / "checkpoint", safetensors=False)
    normistral.export_model(str(checkpoint), tmp_path / "out", weights="int4")
    assert capfd.readouterr() == ("", "")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("memory meter", "export"))]


def test_nothing_asks_the_network(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    checkpoint = make_llama(tmp_path / "checkpoint")
    normistral.export_model(str(checkpoint), tmp_path / "out", weights="fp16")


def test_weights_beyond_float16_are_refused_and_leave_nothing(tmp_path):
    from tiny_models import random_tensors, write_weights

    checkpoint = make_mistral(tmp_path / "checkpoint")
    tensors = random_tensors(json.loads((checkpoint / "config.json").read_text()), seed=0)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70_000.0
    write_weights(checkpoint, tensors, shards=1, safetensors=True)
    with pytest.raises(ExportError) as error:
        normistral.export_model(str(checkpoint), tmp_path / "out", weights="fp16")
    assert error.value.message.startswith(
        "model.layers.1.mlp.up_proj.weight has values up to 70000, beyond the range of float16"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_disk_that_fills_up_while_openvino_writes_leaves_nothing(tmp_path, monkeypatch):
    """OpenVINO may write less than it should without a word: what is short does not become an artifact."""
    real = openvino.save_model

    def save_short(graph, path, *args, **kwargs):
        real(graph, path, *args, **kwargs)
        if path.name == "openvino_model.xml":
            weights = path.with_suffix(".bin")
            with weights.open("r+b") as file:
                file.truncate(weights.stat().st_size // 2)

    monkeypatch.setattr(openvino, "save_model", save_short)
    checkpoint = make_mistral(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="its weights are not whole"):
        normistral.export_model(str(checkpoint), tmp_path / "out", recipe="fast")
    monkeypatch.setattr(staging, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="the disk is full"):
        normistral.export_model(str(checkpoint), tmp_path / "out", recipe="fast")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs resource limits")
@pytest.mark.parametrize("limit", [2_000, 50_000, 150_000])
def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path, limit):
    """A limit on the size of files stands in for a full disk: the writes fail inside OpenVINO and Python alike."""
    import resource

    checkpoint = make_mistral(tmp_path / "checkpoint")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ResourceError, match="while writing"):
            normistral.export_model(str(checkpoint), tmp_path / "out", recipe="fast")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    from normistral.export import openvino as conversion

    real = conversion.convert

    def convert_damaged(model):
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.zero_()
        return real(model)

    monkeypatch.setattr(conversion, "convert", convert_damaged)
    checkpoint = make_mistral(tmp_path / "checkpoint")
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.down_proj\.weight is not the checkpoint's"):
        normistral.export_model(str(checkpoint), tmp_path / "out", weights="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "gguf"}, "format must be one of openvino, onnx, not 'gguf'"),
        ({"context_length": 65}, "the context of 65 tokens is beyond the checkpoint's 64"),
        ({"weights": "int2"}, "weights must be one of"),
        ({"colour": "blue"}, "unknown option colour"),
        ({"group_size": 128}, "group size 128 does not divide all of the model's widths 64, 96, 128"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, options, words):
    checkpoint = make_mistral(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=words):
        normistral.export_model(str(checkpoint), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_missing_package_is_named_before_any_work(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nncf" else find(name))
    with pytest.raises(MissingExtraError, match="needs the package nncf") as caught:
        normistral.export_model("nosuchmodel", tmp_path / "out")
    assert 'pip install "normistral[export]"' in caught.value.hint
    assert not list(tmp_path.iterdir())
