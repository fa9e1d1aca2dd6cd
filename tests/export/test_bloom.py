"""BLOOM's variations, in every kind of artifact, against transformers; and its config's spellings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoint_headers import read_headers
from tiny_bloom import make_bloom
from tiny_family import TOKENS, reference_logits
from tiny_models import edit_json

import normistral
from normistral.artifact.artifact import Artifact
from normistral.errors import CheckpointError
from normistral.export.checkpoint.families import sanitise_config
from normistral.export.checkpoint.families.bloom import BLOOM
from normistral.export.checkpoint.files import read_json
from normistral.export.onnx.bloom import slopes
from normistral.export.openvino import convert
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

# Largest difference of a logit as a share of the logits' spread. Float32 sums in another order (3e-7 seen); weights
# rounded to float16 (3e-4), arithmetic in float16 too (6e-4).
EXPORTS = {
    "onnx-fp32-fused": ({"format": "onnx", "weights": "fp32", "graph": "fused"}, 5e-6),
    "onnx-fp32-plain": ({"format": "onnx", "weights": "fp32", "graph": "plain"}, 5e-6),
    "onnx-fp16-fused": ({"format": "onnx", "weights": "fp16", "graph": "fused"}, 3e-3),
    "onnx-fp16-plain": ({"format": "onnx", "weights": "fp16", "graph": "plain"}, 3e-3),
    "openvino-fp16": ({"format": "openvino", "weights": "fp16"}, 2e-3),
}
VARIATIONS = {
    "as published": {},
    "three heads": {"heads": 3, "hidden": 48},  # slopes for numbers that are no power of two
    "six heads of 24": {"heads": 6, "hidden": 144},
    "residual after the norm": {"after_norm": True},
    "tied, shards, whole names": {"tied": True, "shards": 3, "safetensors": True, "headless": False, "tie_key": True},
    "tied, config silent": {"tied": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bloom")
    return {name: make_bloom(folder / name.replace(" ", "-"), **options) for name, options in VARIATIONS.items()}


# Every variation in our own graph and in OpenVINO. Optimum's plain graph and float16 in ONNX read a checkpoint in no
# other way: they take the published form, a tied table in shards, and the form that is stored in 16 bits.
FOR_ALL_EXPORTS = ("as published", "tied, shards, whole names", "bfloat16")
CELLS = [
    (variation, export)
    for variation in VARIATIONS
    for export in EXPORTS
    if export in ("onnx-fp32-fused", "openvino-fp16") or variation in FOR_ALL_EXPORTS
]


@pytest.mark.parametrize(("variation", "export"), CELLS)
def test_every_variation_computes_what_transformers_does(checkpoints, variation, export, tmp_path):
    options, tolerance = EXPORTS[export]
    normistral.export_model(str(checkpoints[variation]), tmp_path / "out", **options)
    backend = load_backend(Artifact.open(tmp_path / "out", verify=False), EngineConfig(exact=True))
    engine = backend.create_engine()
    parts = [engine.forward(TOKENS[:20], last=20), *(engine.forward([token]) for token in TOKENS[20:])]
    expected = reference_logits(checkpoints[variation], {})
    assert np.abs(np.concatenate(parts) - expected).max() <= tolerance * np.ptp(expected)


@pytest.mark.parametrize("heads", range(1, 41))
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    # Of two tokens, the second has the position 1.
    expected = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1].numpy()
    np.testing.assert_allclose(slopes(heads), expected, rtol=1e-6)


def config_of(folder, **changes):
    edit_json(folder / "config.json", **changes)
    return sanitise_config(read_json(folder / "config.json"))


def test_sizes_under_their_other_names_are_the_same_model(tmp_path):
    folder = make_bloom(tmp_path / "model")
    expected = BLOOM.architecture(config_of(folder))
    renamed = {"n_embed": 64, "hidden_size": ..., "num_attention_heads": 4, "n_head": ...}
    assert BLOOM.architecture(config_of(folder, **renamed, num_hidden_layers=2, n_layer=...)) == expected
    with pytest.raises(CheckpointError, match="contradicts itself: n_head 4, num_attention_heads 8"):
        config_of(folder, n_head=4, num_attention_heads=8)
    with pytest.raises(CheckpointError, match="64 is not divisible by 5 heads"):
        config_of(folder, n_head=5, num_attention_heads=...)
    with pytest.raises(CheckpointError, match=r"config\.json has no n_head"):
        config_of(folder, n_head=...)


def test_a_stated_context_is_taken(tmp_path):
    folder = make_bloom(tmp_path / "model")
    assert BLOOM.context_length(config_of(folder)) is None
    assert BLOOM.context_length(config_of(folder, seq_length=512)) == 512


def test_converting_to_openvino_leaves_torch_as_it_was(tmp_path, monkeypatch):
    """OpenVINO replaces torch.bmm while a 16-bit model is traced; transformers' BLOOM needs it."""
    from normistral.errors import ExportError
    from normistral.export.reference.model import load_model

    before = torch.bmm
    checkpoint = make_bloom(tmp_path / "model", dtype="bfloat16")
    normistral.export_model(str(checkpoint), tmp_path / "out", weights="int8")
    assert torch.bmm is before

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    folder = make_bloom(tmp_path / "again", dtype="bfloat16", headless=False, tie_key=False)
    model = load_model(read_headers(folder), "bfloat16")
    monkeypatch.setattr("openvino.convert_model", fail)
    with pytest.raises(ExportError, match="on purpose"):
        convert(model)
    assert torch.bmm is before
    assert all(matrix.dtype == torch.bfloat16 for matrix in model.parameters() if matrix.ndim == 2)
