"""Mixed precision: what is sensitive is found, the budget is kept, and artifacts hold what was chosen."""

from __future__ import annotations

from functools import partial

import dequantise
import dequantise_ir
import numpy as np
import onnx
import openvino
import pytest
import torch
from checkpoint_headers import read_headers
from sabotage import export as export_sabotaged
from sabotage import places_of, read_at, write_at
from safetensors.numpy import load_file, save_file
from sample_artifacts import make_manifest
from tiny_bloom import make_bloom
from tiny_family import stored_tensors
from tiny_models import make_llama, make_mistral

import normistral
from normistral.artifact.manifest import RecipeRecord, parse_manifest, serialise_manifest
from normistral.commands.info import describe_weights
from normistral.errors import ArtifactError, ExportError
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.quantize import plan
from normistral.export.quantize.plan import QuantPlan, list_by_kind
from normistral.export.quantize.rtn import quantize
from normistral.export.quantize.scale_search import search_params
from normistral.export.quantize.scheme import dequantize
from normistral.export.quantize.sensitivity import Sensitivity, measure_sensitivity, select_int8
from normistral.export.reference.model import load_model
from normistral.progress import NoProgress, Uncounted

WINDOWS = [np.random.default_rng(seed).integers(5, 200, 48).tolist() for seed in range(4)]
PLAN = QuantPlan("gptq", 4, 16, symmetric=False, ratio=0.5)
MODELS = {
    "mistral": partial(make_mistral, sliding_window=16),
    "llama": partial(make_llama, dtype="bfloat16", tied=True),
    "bloom": make_bloom,
}


def opened(folder, scratch):
    scratch.mkdir()
    return open_checkpoint(locate(str(folder), progress=NoProgress()), scratch, progress=NoProgress())


def measure(folder, scratch):
    return measure_sensitivity(opened(folder, scratch), PLAN, WINDOWS, Uncounted())


# The choice


def test_the_most_is_gained_by_weight_and_the_budget_is_kept():
    matrices = {
        "small": Sensitivity(10, 5.0),
        "large": Sensitivity(60, 12.0),
        "useless": Sensitivity(20, 0.1),
        "tiny": Sensitivity(10, 1.0),
    }
    assert select_int8(matrices, 1.0) == set()
    assert select_int8(matrices, 0.9) == {"small"}
    assert select_int8(matrices, 0.8) == {"small", "tiny"}  # the large one does not fit
    assert select_int8(matrices, 0.3) == {"small", "large"}
    assert select_int8(matrices, 0.2) == {"small", "large", "tiny"}


@pytest.mark.parametrize("kind", MODELS)
def test_the_streamed_figure_is_that_of_the_whole_model(kind, tmp_path):
    """The same sums from transformers' model in one piece, all matrices of all layers in one backward pass."""
    checkpoint = opened(MODELS[kind](tmp_path / "model"), tmp_path / "scratch")
    found = measure_sensitivity(checkpoint, PLAN, WINDOWS, Uncounted())
    model = load_model(checkpoint, "float32")
    prefix = "transformer.h." if kind == "bloom" else "model.layers."
    names = [name for name, values in model.named_parameters() if name.startswith(prefix) and values.ndim == 2]
    assert found.keys() == set(names)
    inputs, outputs = {name: [] for name in names}, {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda module, given, name=name: inputs[name].append(given[0][0].detach()))
        module.register_forward_hook(lambda module, given, out, name=name: outputs[name].append(out))
    draw, likelihood = torch.Generator().manual_seed(0), 0.0
    for window in WINDOWS:
        embedded = model.get_input_embeddings()(torch.tensor([window])).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)
        likelihood = likelihood + logits.log_softmax(-1).gather(1, drawn).sum()
    gradients = iter(torch.autograd.grad(likelihood, [out for name in names for out in outputs[name]]))
    for name in names:
        rows = model.get_parameter(name).detach().numpy()
        moment = torch.cat(inputs[name]).square().mean(dim=0).numpy()
        grid = PLAN.scheme(rows.shape[1])
        steps = search_params(rows, grid, moment)
        error = torch.from_numpy(dequantize(quantize(rows, steps, grid), steps, grid) - rows)
        changes = [(next(gradients)[0] * (x @ error.T)).sum(-1) for x in inputs[name]]
        expected = torch.cat(changes).double().square().mean().item() / 2
        assert found[name].loss == pytest.approx(expected, rel=0.02), name
        assert found[name].weights == rows.size
    assert sum(matrix.loss for matrix in found.values()) > 0


def with_coarse_groups(folder, name):
    """One weight in every group of 16 becomes so large that 4 bits have little left for the others."""
    tensors = load_file(folder / "model.safetensors")
    matrix = tensors[name].copy()
    matrix[:, ::16] = 12 * np.abs(matrix).max()
    save_file(tensors | {name: matrix}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_mistral, "model.layers.1.mlp.up_proj.weight"),
        (make_mistral, "model.layers.0.self_attn.o_proj.weight"),
        (partial(make_bloom, safetensors=True, headless=False), "transformer.h.1.mlp.dense_h_to_4h.weight"),
    ],
)
def test_a_matrix_that_4_bits_cannot_hold_takes_8(tmp_path, make, name):
    found = measure(with_coarse_groups(make(tmp_path / "model"), name), tmp_path / "scratch")
    total = sum(matrix.weights for matrix in found.values())
    assert select_int8(found, 1 - found[name].weights / total - 1e-9) == {name}


def test_a_matrix_that_4_bits_hold_exactly_costs_nothing(tmp_path):
    folder, name = make_mistral(tmp_path / "model"), "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    codes = np.random.default_rng(0).integers(-7, 9, tensors[name].shape)
    codes[:, ::16], codes[:, 1::16] = -7, 8
    save_file(
        tensors | {name: (codes * 2.0**-6).astype(np.float32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    found = measure(folder, tmp_path / "scratch")
    assert found[name].loss < 1e-9 * max(matrix.loss for matrix in found.values())


def test_a_model_that_computes_no_numbers_is_refused(tmp_path):
    folder = make_mistral(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="computes values that are not numbers"):
        measure(folder, tmp_path / "scratch")


# The artifacts


CASES = {
    "mistral": lambda folder: make_mistral(folder, head_dim=32, sliding_window=16, dtype="bfloat16"),
    "bloom": lambda folder: make_bloom(folder, seq_length=64),
}
DEQUANTISERS = {"onnx": dequantise, "openvino": dequantise_ir}


@pytest.mark.parametrize("kind", CASES)
def test_both_formats_hold_the_same_mixed_weights(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(plan, "CORRECTION", 0.0)  # which moves weights further than 8 bits do
    checkpoint, states, manifests = CASES[kind](tmp_path / "checkpoint"), {}, {}
    for format, reader in DEQUANTISERS.items():
        manifests[format] = normistral.export_model(
            str(checkpoint), tmp_path / format, format=format, recipe="best", ratio=0.6, group_size=32
        )
        state = reader.dequantised(tmp_path / format)
        states[format] = {name: matrix for name, matrix in state.items() if ".layers." in name or ".h." in name}
    assert states["onnx"].keys() == states["openvino"].keys()
    for name, matrix in states["onnx"].items():
        np.testing.assert_array_equal(matrix, states["openvino"][name], err_msg=name)
    record = manifests["onnx"].recipe
    assert record.eight_bits == manifests["openvino"].recipe.eight_bits
    eight, exact = in_eight_bits(record, states["onnx"]), load_model(read_headers(checkpoint), "float32")
    share = sum(states["onnx"][name].size for name in eight) / sum(matrix.size for matrix in states["onnx"].values())
    assert 0.25 < share <= 0.4
    for name, matrix in states["onnx"].items():
        weights = exact.get_parameter(name).detach().numpy()
        fine = np.abs(matrix - weights).max() < np.abs(weights).max() / 64
        assert fine == (name in eight), name
    assert manifests["onnx"].verified == manifests["openvino"].verified == "run"
    assert "asymmetric, groups of 32, recipe best, 40% of the weights in int8" in describe_weights(record)


def in_eight_bits(record, names):
    """Names of the matrices that the manifest says have 8 bits."""
    listed = set()
    for kind, ranges in record.eight_bits.items():
        for run in ranges.split(","):
            first, _, last = run.partition("-")
            listed |= {(kind, layer) for layer in range(int(first), int(last or first) + 1)}
    found = {name for name in names if any(name.endswith(f".{layer}.{kind}.weight") for kind, layer in listed)}
    assert len(found) == len(listed)
    return found


def test_projections_on_two_grids_are_two_products(tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"
    checkpoint = with_coarse_groups(make_mistral(tmp_path / "checkpoint", head_dim=16), name)
    manifest = normistral.export_model(
        str(checkpoint), tmp_path / "out", format="onnx", recipe="balanced", ratio=0.97, group_size=16
    )
    assert manifest.recipe.eight_bits == {"self_attn.v_proj": "1"}
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    products = {node.output[0]: node for node in nodes if node.op_type == "MatMulNBits"}
    bits = {
        output.removeprefix("model.layers.").removesuffix("_proj.out"): attribute.i
        for output, node in products.items()
        for attribute in node.attribute
        if attribute.name == "bits" and "self_attn" in output and ".o_proj" not in output
    }
    assert bits == {"0.self_attn.qkv": 4, "1.self_attn.qk": 4, "1.self_attn.v": 8}


def roll_scales(folder, manifest):
    """Of a matrix that has 8 bits: each group gets its neighbour's."""
    kind, layers = next(iter(manifest.recipe.eight_bits.items()))
    place = places_of(folder, f"model.layers.{layers[0]}.{kind}", "scales")
    scales = read_at(folder, place)
    step = 4 if manifest.format == "onnx" else 2
    write_at(folder, place, scales[step:] + scales[:step])


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_other_scales_of_an_8_bit_matrix_are_noticed(tmp_path, monkeypatch, format):
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = with_coarse_groups(make_mistral(tmp_path / "model", head_dim=16), name)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name] *= np.random.default_rng(0).uniform(0.5, 1, (len(tensors[name]), 1)).astype(np.float32)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"the scales of model\.layers\.1\.mlp\.up_proj"):
        export_sabotaged(
            checkpoint, tmp_path / "out", format, roll_scales, monkeypatch, recipe="best", ratio=0.8, group_size=16
        )


def test_the_manifest_lists_layers_as_ranges_and_nothing_else():
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1, 2, 3, 7, 9, 10)]
    names.append("model.layers.5.self_attn.v_proj.weight")
    assert list_by_kind(names, "model.layers.") == {"mlp.down_proj": "0-3,7,9-10", "self_attn.v_proj": "5"}
    assert list_by_kind([], "model.layers.") == {}
    for ranges in ("0-3,7", "0-", "", "all"):
        recipe = RecipeRecord("int4", True, 64, 0.9, recipe="best", eight_bits={"mlp.down_proj": ranges})
        raw = serialise_manifest(make_manifest(recipe=recipe))
        if ranges == "0-3,7":
            assert parse_manifest(raw).recipe == recipe
        else:
            with pytest.raises(ArtifactError, match="eight_bits"):
                parse_manifest(raw)


# 8 bits in groups


@pytest.mark.parametrize(("kind", "recipe", "symmetric"), [("llama", "balanced", True), ("bloom", "fast", False)])
def test_openvinos_int8_has_groups_where_they_are_asked_for(tmp_path, kind, recipe, symmetric):
    checkpoint = MODELS[kind](tmp_path / "checkpoint")
    manifest = normistral.export_model(
        str(checkpoint), tmp_path / "out", weights="int8", group_size=32, recipe=recipe, symmetric=symmetric
    )
    assert (manifest.recipe.group_size, manifest.verified) == (32, "run")
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    shapes = {
        node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.get_output_shape(0)))
        for node in graph.get_ops()
        if node.get_type_name() == "Constant" and node.get_friendly_name().endswith("weight")
    }
    matrices = {name: (type_name, shape) for name, (type_name, shape) in shapes.items() if len(shape) > 1}
    assert len(matrices) == manifest.quality["matrices"]
    assert {type_name for type_name, _ in matrices.values()} == {"i8" if symmetric else "u8"}
    assert all(len(shape) == 3 and shape[2] == 32 for _, shape in matrices.values())
    exact = stored_tensors(checkpoint)
    for name, matrix in dequantise_ir.dequantised(tmp_path / "out").items():
        weights = exact[name].numpy()
        assert 0 < np.abs(matrix - weights).max() < np.abs(weights).max() / 100
