"""benchmarks/quantization_methods.py: GPTQ and `best` are the package's, and changes do what they are called for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_llama

from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.quantize import calibrate
from normistral.export.quantize.calibrate import quantize_layers
from normistral.export.quantize.plan import CORRECTION, QuantPlan
from normistral.export.quantize.scheme import QuantParams, QuantScheme, dequantize, unpack
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.progress import NoProgress, Uncounted

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import quantization_methods as lab

WINDOWS = [np.random.default_rng(seed).integers(5, 200, 48).tolist() for seed in range(6)]
SCHEME = QuantScheme(4, 64, symmetric=False, float16_scales=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    make_llama(folder / "model", head_dim=16, tied=True)
    (folder / "opened").mkdir()
    return open_checkpoint(
        locate(str(folder / "model"), progress=NoProgress()), folder / "opened", progress=NoProgress()
    )


@pytest.fixture(scope="module")
def case():
    """Weights [96, 192], inputs as they come, and the checkpoint's own, which follow from them."""
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(192, 192, generator=draw)
    inputs = torch.randn(2000, 192, generator=draw) @ mixed + torch.randn(192, generator=draw)
    own = inputs + 0.02 * inputs @ torch.randn(192, 192, generator=draw)
    return torch.randn(96, 192, generator=draw), inputs, own


def loss(case, method, against="inputs"):
    """Squared error of the outputs, beside that of the exact weights on `against`."""
    weights, inputs, own = case
    restored = torch.from_numpy(lab.round_matrix(weights.clone(), lab.make_inputs(inputs, own, method), SCHEME))
    exact = weights @ (own if against == "own" else inputs).T
    return float((restored @ inputs.T - exact).square().sum())


@pytest.mark.parametrize(("method", "correction"), [(lab.GPTQ, 0.0), (lab.BEST, CORRECTION)])
def test_gptq_and_best_are_the_packages_to_the_last_bit(checkpoint, method, correction, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "_FAST_BFLOAT16", set())
    store = QuantizedTensorStore(tmp_path)
    plan = QuantPlan("gptq", 4, 16, False, float16_scales=True, correction=correction)
    quantize_layers(checkpoint, plan, WINDOWS, store, Uncounted())
    found = lab.quantize_model(checkpoint, method, 16, WINDOWS, {})
    assert found.keys() == store.schemes.keys()
    for name, matrix in found.items():
        stored, scheme = store.read(name), store.schemes[name]
        groups = stored.scales.shape[1]
        zeros = unpack(stored.zero_points, 4)[:, :groups].astype(np.float32)
        exact = dequantize(unpack(stored.qweight, 4)[:, : matrix.shape[1]], QuantParams(stored.scales, zeros), scheme)
        np.testing.assert_array_equal(matrix.numpy(), exact, err_msg=name)


@pytest.mark.parametrize("name", ["refit", "refit-requantize", "descent", "conditional"])
def test_a_change_to_the_rounding_lessens_the_error_that_gptq_minimises(case, name):
    assert loss(case, lab.METHODS[name]) < 0.99 * loss(case, lab.GPTQ)


@pytest.mark.parametrize("name", ["gptaq-0.25", "gptaq-1", "qep-0.25", "qep-0.5"])
def test_a_correction_lessens_the_error_towards_the_checkpoints_own_outputs(case, name):
    assert loss(case, lab.METHODS[name], "own") < 0.99 * loss(case, lab.GPTQ, "own")


def test_variances_are_those_of_the_factorized_hessian(case):
    found = lab.make_inputs(case[1], None, lab.GPTQ)
    order, triangle = found.factor.order, found.triangle()
    again = (triangle * found.variances()) @ triangle.T
    torch.testing.assert_close(again, found.hessian()[order][:, order], atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", ["awq", "layer-weights", "layer-weights-heads", "state-weights", "skip1"])
def test_every_matrix_is_quantized_by_every_method(checkpoint, name):
    method = lab.METHODS[name]
    found = lab.quantize_model(checkpoint, method, 16, WINDOWS, {})
    best = lab.quantize_model(checkpoint, lab.GPTQ, 16, WINDOWS, {})
    assert found.keys() == best.keys()
    assert all(torch.isfinite(matrix).all() for matrix in found.values())
    assert any(not torch.equal(found[matrix], best[matrix]) for matrix in best)


def test_gradients_give_each_token_of_each_matrix_a_weight(checkpoint):
    weights = lab.answer_weights(checkpoint, WINDOWS, 16)
    queries = weights["model.layers.0.self_attn.q_proj.weight"]
    assert queries.shape[:2] == (6, 48)
    assert queries.dim() == 3
    assert weights["model.layers.1.mlp.down_proj.weight"].shape == (6, 48)
    for tensor in weights.values():
        torch.testing.assert_close(tensor.mean(dim=(0, 1)), torch.ones(tensor.shape[2:]))
    heads = replace(lab.METHODS["answer-weights"], heads=True)
    assert len(lab.quantize_model(checkpoint, heads, 16, WINDOWS, weights)) == 14


def test_the_report_compares_runs_of_the_same_seed():
    lines = [
        {"method": method, "seed": seed, "group_size": 64, "seconds": 10, "kl": {"nb": kl}}
        for method, seed, kl in [("gptq", 0, 0.2), ("gptq", 1, 0.1), ("descent", 0, 0.1), ("descent", 1, 0.09)]
    ]
    table = lab.report([json.loads(json.dumps(line)) for line in lines], "gptq")
    assert "| 64 | descent | 2 | 0.0950: 0.700 (0.500-0.900) | 10 |" in table
