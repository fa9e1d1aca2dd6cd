"""The recipes that calibrate, exported for real: both formats hold one and the same weights, and close ones."""

from __future__ import annotations

import dequantise
import dequantise_ir
import numpy as np
import pytest
from tiny_bloom import make_bloom
from tiny_models import make_llama, make_mistral

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import UsageError
from normistral.export.quantize import plan

CASES = {
    "mistral-best": lambda folder: make_mistral(folder, head_dim=32, sliding_window=16, dtype="bfloat16"),
    "llama-best-asymmetric": lambda folder: make_llama(folder, head_dim=16, tied=True),
    "bloom-balanced": lambda folder: make_bloom(folder, seq_length=64),
}


def inner(state):
    return {name: matrix for name, matrix in state.items() if ".layers." in name or ".h." in name}


def export(checkpoint, folder, format, **options):
    normistral.export_model(str(checkpoint), folder, format=format, **options)
    return inner((dequantise if format == "onnx" else dequantise_ir).dequantised(folder))


@pytest.mark.parametrize("case", CASES)
def test_both_formats_hold_the_same_weights(tmp_path, case):
    checkpoint = CASES[case](tmp_path / "checkpoint")
    kind, recipe, *asymmetric = case.split("-")
    options = {"recipe": recipe, "symmetric": not asymmetric, "group_size": 32}
    onnx, ir = (export(checkpoint, tmp_path / format, format, **options) for format in ("onnx", "openvino"))
    assert onnx.keys() == ir.keys()
    assert len(onnx) == {"mistral": 14, "llama": 14, "bloom": 8}[kind]
    for name, matrix in onnx.items():
        np.testing.assert_array_equal(matrix, ir[name], err_msg=name)
        assert np.isfinite(matrix).all()
    record = read_manifest(tmp_path / "onnx").recipe
    assert (record.recipe, record.calibration_sha256) == (recipe, plan.calibration_sha256())
    assert record.calibration_tokens == 512


@pytest.mark.parametrize(("format", "symmetric"), [("onnx", False), ("openvino", True), ("openvino", False)])
def test_int8_is_calibrated_too(tiny_checkpoint, tmp_path, format, symmetric):
    from transformers import AutoModelForCausalLM

    found = export(tiny_checkpoint, tmp_path / "out", format, weights="int8", recipe="best", symmetric=symmetric)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
    assert len(found) == 14
    for name, matrix in found.items():
        exact = model.get_parameter(name).detach().numpy()
        assert 0 < np.abs(matrix - exact).max() < 4 * np.abs(exact).max() / 127


def test_the_recipe_fast_calibrates_nothing(tiny_onnx):
    record = read_manifest(tiny_onnx("onnx-int4")).recipe
    assert (record.recipe, record.calibration_sha256, record.calibration_tokens) == ("fast", None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "fp16", "recipe": "best"}, "recipe means nothing for fp16 weights in OpenVINO"),
        ({"recipe": "best", "weights": "int8", "ratio": 0.5}, "ratio means nothing for int8 weights in OpenVINO"),
        ({"recipe": "better"}, "recipe must be one of fast, balanced, best, not 'better'"),
    ],
)
def test_what_does_not_apply_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        normistral.export_model("demo", tmp_path / "out", **options)


def test_products_are_fast_only_while_a_calibration_runs():
    import torch

    from normistral.export.quantize.calibrate import fast_matmul

    with fast_matmul():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
