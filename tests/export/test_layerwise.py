"""A checkpoint run layer by layer computes what transformers computes at once, for every family."""

import numpy as np
import pytest
import torch
from tiny_bloom import make_bloom
from tiny_models import make_llama, make_mistral
from transformers import AutoModelForCausalLM

from normistral.evaluation.windows import choose_windows, cut
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.reference import layerwise as opening
from normistral.export.reference import model as reference
from normistral.export.reference.layerwise import LayeredModel, WholeModel, checkpoint_reference
from normistral.export.reference.model import load_model
from normistral.progress import NoProgress

TOKENS = np.random.default_rng(0).integers(5, 261, 150).tolist()
WINDOWS = cut(TOKENS, choose_windows("sliding", 48, 20, context_length=64, bos_id=1))  # three attention windows long
TOLERANCE = 1e-5  # share of the logits' spread; seen: 0 to 5e-7

CHECKPOINTS = {
    "mistral, window 16": lambda folder: make_mistral(folder, sliding_window=16, shards=2, layers=3),
    "llama, tied": lambda folder: make_llama(folder, tied=True),
    "llama, bfloat16": lambda folder: make_llama(folder, dtype="bfloat16", safetensors=False),
    "bloom": lambda folder: make_bloom(folder, heads=4),
    "bloom, tied": lambda folder: make_bloom(folder, tied=True, after_norm=True, layers=3),
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path):
    folder = CHECKPOINTS[request.param](tmp_path / "model")
    return open_checkpoint(locate(str(folder), progress=NoProgress()), tmp_path, progress=NoProgress())


def layered(checkpoint, **options):
    return LayeredModel(checkpoint, NoProgress(), **options)


@pytest.mark.parametrize("group_tokens", [1, 100, 8192])
def test_it_computes_what_transformers_computes_at_once(checkpoint, group_tokens):
    found = list(layered(checkpoint, group_tokens=group_tokens).predict(WINDOWS))
    model = load_model(checkpoint, "float32")
    assert len(found) == len(WINDOWS)
    for window, logits in zip(WINDOWS, found, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([window.token_ids])).logits[0, -window.scored - 1 : -1].numpy()
        assert logits.dtype == np.float32
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= TOLERANCE * (expected.max() - expected.min())


def test_the_whole_model_predicts_the_same_places(checkpoint):
    whole = WholeModel(load_model(checkpoint, "float32")).predict(WINDOWS)
    for logits, expected in zip(layered(checkpoint).predict(WINDOWS), whole, strict=True):
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE * (expected.max() - expected.min()))


def test_between_two_groups_only_the_norms_are_in_memory(checkpoint):
    model = layered(checkpoint, group_tokens=1)
    names = {name for name, parameter in model._model.named_parameters() if not parameter.is_meta}
    assert names == set(checkpoint.family.outer_tensors(checkpoint.config)) - {checkpoint.family.embedding}
    list(model.predict(WINDOWS))
    assert {name for name, parameter in model._model.named_parameters() if not parameter.is_meta} == names
    assert all(parameter.is_meta for parameter in model._layers.parameters())


def test_the_attention_window_counts(tmp_path):
    """What the comparison above would not see if both sides dropped it."""
    folder = make_mistral(tmp_path / "model", sliding_window=16)
    checkpoint = open_checkpoint(locate(str(folder), progress=NoProgress()), tmp_path, progress=NoProgress())
    (logits,) = layered(checkpoint).predict(WINDOWS[:1])
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, sliding_window=None)
    with torch.inference_mode():
        expected = wide(torch.tensor([WINDOWS[0].fed_ids])).logits[0].numpy()
    assert np.abs(logits - expected).max() > 100 * TOLERANCE * (expected.max() - expected.min())


@pytest.mark.parametrize(("limit", "kind"), [(0, LayeredModel), (2 * 10**9, WholeModel)])
def test_what_does_not_fit_goes_layer_by_layer(tmp_path, monkeypatch, limit, kind):
    folder = make_mistral(tmp_path / "model")
    monkeypatch.setattr(reference, "_RUN_LIMIT_BYTES", limit)
    with checkpoint_reference(str(folder), tmp_path / "scratch", NoProgress()) as opened, opened.open() as predictor:
        assert isinstance(predictor, kind)
        assert (opened.vocabulary, opened.context_length) == (261, 64)
        assert (opened.folder / "tokenizer.json").exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_source_is_known_by_every_file(tmp_path):
    def source(folder):
        with checkpoint_reference(str(folder), tmp_path / "scratch", NoProgress()) as opened:
            return opened.source

    first = source(make_mistral(tmp_path / "one"))
    assert source(make_mistral(tmp_path / "two")) == first
    assert source(make_mistral(tmp_path / "three", seed=1)) != first
    assert source(make_mistral(tmp_path / "four", adds_bos=True)) != first


def test_without_the_extra_the_error_says_what_to_install(tmp_path, monkeypatch):
    from normistral.errors import MissingExtraError

    monkeypatch.setattr(opening, "_PACKAGES", ("torch", "package_that_is_not_there"))
    with (
        pytest.raises(MissingExtraError, match="a checkpoint as reference needs the package package_that_is_not_there"),
        checkpoint_reference("demo", tmp_path, NoProgress()),
    ):
        pass
