"""What only the onnxruntime engine has: caches in its own hands, a graph that it changes, float16, damage.

What engines share is in test_engines.py.
"""

import dataclasses
import shutil

import numpy as np
import onnx
import pytest
from dequantise import dequantised
from test_engines import TOKENS, TOLERANCES
from tiny_models import make_llama

import normistral
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import hash_files, read_manifest
from normistral.errors import ArtifactError, EngineError, NormistralError, UsageError
from normistral.hardware import Machine, plan_onnxruntime, plan_threads, read_machine
from normistral.runtime.engines import onnx_cache
from normistral.runtime.engines import onnxruntime as onnx_engine
from normistral.runtime.engines.onnx_graph import OnnxGraph
from normistral.runtime.engines.onnx_session import session_options
from normistral.runtime.engines.onnxruntime import load_onnx
from normistral.runtime.engines.settings import EngineConfig

TOLERANCE = TOLERANCES["onnx"]
# Float16 has 11 bits, 5e-4 per rounding; over two layers 4e-4 of the spread was seen.
TOLERANCE_FLOAT16 = 2e-3


@pytest.fixture(scope="module", params=["onnx-fp32-fused", "onnx-int4"])
def fused(request, tiny_onnx):
    return tiny_onnx(request.param)


def load(folder, **options):
    return load_onnx(Artifact.open(folder, verify=False), EngineConfig(exact=True, **options))


def distance(found, expected):
    """The largest difference as a share of the spread."""
    return np.abs(found - expected).max() / (expected.max() - expected.min())


@pytest.fixture(scope="module")
def expected(fused):
    """Logits at once; that they are right is tested in test_engines.py."""
    return load(fused).create_engine().forward(TOKENS, last=48)


# Caches


def test_a_shared_cache_grows_in_steps_and_is_written_in_place(fused, expected, monkeypatch):
    monkeypatch.setattr(onnx_cache, "CAPACITY_STEP", 10)
    engine = load(fused).create_engine()
    places = []
    for length, token in enumerate(TOKENS, 1):
        logits = engine.forward([token])
        assert distance(logits, expected[length - 1 : length]) <= TOLERANCE
        values = engine._sequence.cache._values
        capacities = {value.shape()[2] for value in values.values()}
        assert capacities == {-(-length // 10) * 10}
        for value in values.values():
            written = np.abs(value.numpy()).max(axis=(0, 1, 3)) > 0
            assert written.tolist() == [True] * length + [False] * (capacities.copy().pop() - length)
        places.append(tuple(value.data_ptr() for value in values.values()))
    assert [len(set(places[start : start + 10])) for start in range(0, 48, 10)] == [1] * 5  # no copy within a step


def test_a_cache_grows_to_the_context_and_no_further(fused):
    engine = load(fused).create_engine()
    engine.forward(TOKENS)
    assert {value.shape()[2] for value in engine._sequence.cache._values.values()} == {64}
    engine.forward([5] * 16)
    with pytest.raises(EngineError, match="65 tokens do not fit into the model's context of 64"):
        engine.forward([5])


def test_what_lies_behind_the_length_is_never_read(fused, expected):
    engine = load(fused).create_engine()
    engine.forward(TOKENS[:20])
    for value in engine._sequence.cache._values.values():
        value.numpy()[:, :, 20:] = np.nan
    assert distance(engine.forward(TOKENS[20:], last=28), expected[20:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["onnx-fp32-plain", "onnx-fp32-fused"])
def test_a_saved_cache_is_a_copy_of_what_is_in_use(tiny_onnx, name):
    engine = load(tiny_onnx(name)).create_engine()
    engine.forward(TOKENS[:20])
    saved = list(engine.save(20))
    before = [tensor.array.copy() for tensor in saved]
    assert {tensor.shape for tensor in before} == {(1, 2, 20, 32)}
    assert len(before) == 4
    engine.trim(3)
    engine.forward(TOKENS[20:])
    engine.restore(20, saved)
    engine.forward(TOKENS[20:])
    assert all(np.array_equal(tensor.array, array) for tensor, array in zip(saved, before, strict=True))


@pytest.mark.parametrize("name", ["onnx-fp32-plain", "onnx-fp32-fused"])
def test_a_reset_mends_a_failed_step(tiny_onnx, name):
    engine = load(tiny_onnx(name)).create_engine()
    logits = engine.forward(TOKENS[:20])
    with pytest.raises(EngineError, match="onnxruntime failed at token 22"):
        engine.forward([5, 10**6])
    engine.reset()
    assert distance(engine.forward(TOKENS[:20]), logits) <= TOLERANCE


@pytest.mark.parametrize("name", ["onnx-fp16-plain", "onnx-fp16-fused"])
def test_float16_caches_and_logits(tiny_onnx, name):
    expected = load(tiny_onnx("onnx-fp32-fused")).create_engine().forward(TOKENS, last=48)
    engine = load(tiny_onnx(name)).create_engine()
    logits = np.concatenate([engine.forward(TOKENS[:30], last=30), *(engine.forward([t]) for t in TOKENS[30:])])
    assert logits.dtype == np.float32
    assert distance(logits, expected) <= TOLERANCE_FLOAT16
    assert {tensor.array.dtype for tensor in engine.save(48)} == {np.dtype(np.float16)}
    engine.trim(17)
    assert distance(engine.forward(TOKENS[17:], last=31), expected[17:]) <= TOLERANCE_FLOAT16


# The graph in use


def test_exact_is_accuracy_level_1(tiny_onnx, expected):
    folder = tiny_onnx("onnx-int4")
    fast, exact = load_onnx(Artifact.open(folder, verify=False)), load(folder)
    assert fast.capabilities.settings["accuracy_level"] == "4"
    assert exact.capabilities.settings["accuracy_level"] == "1"
    assert exact.capabilities.settings["provider"] == "CPUExecutionProvider"
    logits = exact.create_engine().forward(TOKENS, last=48)
    assert distance(fast.create_engine().forward(TOKENS, last=48), logits) > 10 * TOLERANCE


def change_window(node, size):
    next(entry for entry in node.attribute if entry.name == "local_window_size").i = size


def change_scale(node, head_dim):
    next(entry for entry in node.attribute if entry.name == "scale").f = head_dim**-0.5


@pytest.mark.parametrize(
    ("change", "value"),
    [(change_window, 15), (change_window, 17), (change_window, -1), (change_scale, 16)],
    ids=["window 15", "window 17", "no window", "head size 16"],
)
def test_the_comparisons_would_find_a_wrong_window_and_head_size(fused, expected, monkeypatch, change, value):
    model = onnx.load(fused / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            change(node, value)
    monkeypatch.setattr(onnx_engine, "read_graph", lambda folder, manifest: OnnxGraph(model.SerializeToString()))
    assert distance(load(fused).create_engine().forward(TOKENS, last=48), expected) > 1e-3


def test_threads_spin_only_where_waiting_costs_nobody():
    machine = Machine("x", 4, 8, None, frozenset(), 2**34, 2**34)
    assert plan_onnxruntime(machine)["intra_op_num_threads"] == "4"
    assert plan_onnxruntime(machine)["session.intra_op.allow_spinning"] == "1"
    limited = plan_onnxruntime(dataclasses.replace(machine, cpu_quota=2.0))
    assert limited["intra_op_num_threads"] == "2"
    assert limited["session.intra_op.allow_spinning"] == "0"


def test_settings_reach_onnxruntime_and_the_report(tiny_onnx):
    folder = tiny_onnx("onnx-int4")
    settings = plan_onnxruntime(read_machine())
    options = session_options(settings, folder)
    assert options.intra_op_num_threads == plan_threads(read_machine())
    for key in settings:
        if key.startswith("session."):
            assert options.get_session_config_entry(key) == settings[key]
    assert settings.items() <= load(folder).capabilities.settings.items()


def test_given_settings_go_over_the_plan_and_reach_the_report(tiny_onnx):
    chosen = {
        "intra_op_num_threads": "1",
        "enable_mem_pattern": "0",
        "graph_optimization_level": "1",
        "session.intra_op.spin_duration_us": "50",
        "accuracy_level": "1",
        "prefill_chunk": "7",
    }
    folder = tiny_onnx("onnx-int4")
    backend = load_onnx(Artifact.open(folder, verify=False), EngineConfig(settings=chosen))
    assert chosen.items() <= backend.capabilities.settings.items()
    assert backend.capabilities.prefill_chunk == 7
    assert backend.capabilities.overrides == tuple(sorted(chosen))
    logits = load(folder).create_engine().forward(TOKENS, last=48)  # exact: level 1 as well
    assert distance(backend.create_engine().forward(TOKENS, last=48), logits) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"session.intra_op.allow_spining": "1"}, "no setting 'session.intra_op.allow_spining'", "allow_spinning"),
        ({"optimized_model_filepath": "x"}, "no setting 'optimized_model_filepath'", "enable_mem_pattern"),
        ({"intra_op_num_threads": "-1"}, "cannot be '-1'", "1 to 9999"),
        ({"session.intra_op.allow_spinning": "yes"}, "cannot be 'yes'", "0 or 1"),
        ({"accuracy_level": "2"}, "accuracy_level cannot be '2'", "1 (products in float32) or 4"),
    ],
)
def test_what_onnxruntime_would_ignore_is_refused(tiny_onnx, settings, message, hint):
    folder = tiny_onnx("onnx-int4")
    with pytest.raises(UsageError) as caught:
        load_onnx(Artifact.open(folder, verify=False), EngineConfig(settings=settings))
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_accuracy_level_means_nothing_without_rounded_products(tiny_onnx):
    fused = tiny_onnx("onnx-fp32-fused")
    with pytest.raises(UsageError, match="no setting 'accuracy_level'"):
        load_onnx(Artifact.open(fused, verify=False), EngineConfig(settings={"accuracy_level": "4"}))


def test_exact_keeps_its_arithmetic(tiny_onnx):
    with pytest.raises(UsageError, match="would change the reference arithmetic"):
        load(tiny_onnx("onnx-int4"), settings={"accuracy_level": "4"})
    assert (
        load(tiny_onnx("onnx-int4"), settings={"intra_op_num_threads": "1"}).capabilities.settings["accuracy_level"]
        == "1"
    )


def test_loading_says_nothing(fused, capfd):
    load(fused)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


# Damage


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_load_refuses_a_damaged_artifact(tiny_onnx, tmp_path, name, damage):
    folder = shutil.copytree(tiny_onnx("onnx-int4"), tmp_path / "artifact")
    content = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    elif damage == "truncated":
        (folder / name).write_bytes(content[: len(content) // 2])
    else:
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(NormistralError, match=name) as caught:
        normistral.load(folder)
    assert caught.value.hint


@pytest.mark.parametrize("length", [None, 0, 5000])
def test_data_that_vanishes_after_the_check_is_an_engine_error(tiny_onnx, tmp_path, capfd, length):
    folder = shutil.copytree(tiny_onnx("onnx-int4"), tmp_path / "artifact")
    manifest = read_manifest(folder)
    if length is None:
        (folder / "model.onnx.data").unlink()
    else:
        with (folder / "model.onnx.data").open("r+b") as file:
            file.truncate(length)
    with pytest.raises(EngineError, match="could not load artifact on CPU") as caught:
        load_onnx(Artifact(folder, manifest))
    assert "info ARTIFACT --check" in caught.value.hint
    assert "ONNXRuntimeError" not in caught.value.message
    assert capfd.readouterr().err == ""  # the error is told once, by us


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "other.data"])
def test_weights_outside_the_artifact_are_refused(tiny_onnx, tmp_path, location):
    folder = shutil.copytree(tiny_onnx("onnx-int4"), tmp_path / "artifact")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    next(entry for entry in entries if entry.key == "location").value = location
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = dataclasses.replace(read_manifest(folder), files=hash_files(folder))
    with pytest.raises(ArtifactError, match=location):
        load_onnx(Artifact(folder, manifest))


@pytest.mark.parametrize("missing", ["nothing", "past_key_values.0.key", "present.1.value"])
def test_a_graph_with_other_inputs_or_outputs_is_refused(tiny_onnx, tmp_path, missing):
    folder = shutil.copytree(tiny_onnx("onnx-fp32-plain"), tmp_path / "artifact")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    if missing == "nothing":
        model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", 7, [1, "n"]))
    else:
        for ports in (model.graph.input, model.graph.output):
            for port in [port for port in ports if port.name == missing]:
                ports.remove(port)
        for node in model.graph.node:
            node.input[:] = ["past_key_values.0.value" if name == missing else name for name in node.input]
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest = dataclasses.replace(read_manifest(folder), files=hash_files(folder))
    with pytest.raises(ArtifactError, match="no decoder with a KV cache"):
        load_onnx(Artifact(folder, manifest))


# Tied output layers


@pytest.mark.parametrize(
    "recipe",
    [
        {"weights": "fp32"},
        {"weights": "fp32", "graph": "fused"},
        {"weights": "int8"},
        {"weights": "int4", "recipe": "fast"},
        {"weights": "int4", "output_layer_bits": 4, "symmetric": False, "recipe": "fast"},
    ],
    ids=lambda recipe: "-".join(str(value) for value in recipe.values()),
)
def test_a_tied_output_layer_multiplies_by_the_embedding(tmp_path, recipe):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = make_llama(tmp_path / "tied", tied=True, head_dim=32)
    normistral.export_model(str(checkpoint), tmp_path / "artifact", format="onnx", **recipe)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rounded = dequantised(tmp_path / "artifact")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(rounded.get(name, parameter.numpy())))
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    engine = load(tmp_path / "artifact").create_engine()
    assert distance(engine.forward(TOKENS[:40], last=3), expected[37:40]) <= TOLERANCE
    assert distance(engine.forward(TOKENS[40:], last=8), expected[40:]) <= TOLERANCE
    shape = model.config.vocab_size * model.config.hidden_size
    assert (tmp_path / "artifact/model.onnx.data").stat().st_size < 4 * (model.num_parameters() + shape)
