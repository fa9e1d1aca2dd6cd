"""Artifacts that are not their checkpoint any more: each is refused before it gets its name, and the cause is named."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from itertools import pairwise

import numpy as np
import onnx
import pytest
from checkpoint_headers import read_headers
from sabotage import constants, export, places_of, read_at, tensors, write_at
from tiny_bloom import make_bloom
from tiny_models import edit_json, make_mistral, write_json

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.errors import EngineError, ExportError, UsageError
from normistral.export.checkpoint.files import read_json
from normistral.export.recipe import Recipe
from normistral.export.reference import model as reference
from normistral.export.verify import artifact as verification
from normistral.export.verify.layered_onnx import cut_at_attention, run_layered
from normistral.export.verify.weights import compare_groups

FORMATS = ("openvino", "onnx")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Two layers with a window, and a tokenizer with a merge."""
    folder = make_mistral(
        tmp_path_factory.mktemp("proofs") / "model", head_dim=16, sliding_window=16, vocab=263, dtype="bfloat16"
    )
    path = folder / "tokenizer.json"
    document = read_json(path)
    vocabulary = {word: i for word, i in document["model"]["vocab"].items() if i < 261}
    document["model"]["vocab"] = vocabulary | {"en": 261, "er": 262}
    document["model"]["merges"] = [["e", "n"], ["e", "r"]]
    write_json(path, document)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Another checkpoint of the same shape."""
    return make_mistral(
        tmp_path_factory.mktemp("stranger") / "model",
        head_dim=16,
        sliding_window=16,
        vocab=263,
        dtype="bfloat16",
        seed=1,
    )


def swap_scales(folder, manifest):
    """Of one matrix in two layers."""
    first, second = (places_of(folder, f"model.layers.{layer}.mlp.down_proj", "scales") for layer in (0, 1))
    one, other = read_at(folder, first), read_at(folder, second)
    write_at(folder, first, other)
    write_at(folder, second, one)


def other_angles(folder, manifest):
    if (folder / "model.onnx").exists():
        (cosines, sines) = tensors(folder, "rotary.cos", "rotary.sin")
        positions = np.arange(cosines[1] // 4 // 8, dtype=np.float32)[:, None]
        angles = positions * (1.0 / 1e6 ** (np.arange(0, 16, 2) / 16)).astype(np.float32)
        write_at(folder, cosines, np.cos(angles).astype(np.float32).tobytes())
        write_at(folder, sines, np.sin(angles).astype(np.float32).tobytes())
    else:
        (place,) = (place for place in constants(folder, r".*rotary_emb.*") if place[1] == 8 * 4)
        write_at(folder, place, (1.0 / 1e6 ** (np.arange(0, 16, 2) / 16)).astype(np.float32).tobytes())


def config_of_another_theta(folder, manifest):
    edit_json(folder / "config.json", rope_theta=1e6)


def template_without_its_blank(folder, manifest):
    text = manifest.template.text.replace("<|im_start|> ", "<|im_start|>")
    return dataclasses.replace(manifest, template=dataclasses.replace(manifest.template, text=text))


def merge_removed(folder, manifest):
    document = read_json(folder / "tokenizer.json")
    document["model"]["merges"].pop()
    write_json(folder / "tokenizer.json", document)


def token_renamed(folder, manifest):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"er": 262', '"eg": 262'), encoding="utf-8")


def special_token_made_plain(folder, manifest):
    document = read_json(folder / "tokenizer.json")
    document["added_tokens"] = document["added_tokens"][:-1]
    write_json(folder / "tokenizer.json", document)


SABOTAGES = {
    "scales": (swap_scales, r"the scales of model\.layers\.[01]\.mlp\.down_proj\.weight are not those of its weights"),
    "angles": (other_angles, r"the artifact turns positions by other angles than config\.json says: frequency \d is"),
    "theta": (
        config_of_another_theta,
        r"config\.json: the artifact's rope_theta is 1000000\.0, the checkpoint's 10000",
    ),
    "template": (
        template_without_its_blank,
        r"artifact's chat template is not the checkpoint's: .* instead of .*im_start",
    ),
    "merge": (merge_removed, r"tokenizer\.json: the artifact's merges lacks \('e', 'r'\) \(1 entries, .* has 2\)"),
    "vocabulary": (token_renamed, r"tokenizer\.json: the artifact's vocab lacks 'er'"),
    "added token": (special_token_made_plain, r"tokenizer\.json: the artifact's added_tokens is "),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_sabotaged_artifact_is_refused_and_the_cause_is_named(checkpoint, tmp_path, monkeypatch, format, sabotage):
    change, message = SABOTAGES[sabotage]
    with pytest.raises(ExportError, match=message) as caught:
        export(checkpoint, tmp_path / "out", format, change, monkeypatch)
    assert caught.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_the_output_layer_of_another_checkpoint_is_named(checkpoint, stranger, tmp_path, monkeypatch, format):
    export(stranger, tmp_path / "stranger", format)
    parts = {
        part: read_at(tmp_path / "stranger", places_of(tmp_path / "stranger", "lm_head", part))
        for part in ("codes", "scales")
    }

    def replace_output_layer(folder, manifest):
        for part, content in parts.items():
            write_at(folder, places_of(folder, "lm_head", part), content)

    with pytest.raises(
        ExportError, match=r"lm_head\.weight is not the checkpoint's: its rows are 1\.\d of their norm away, and point"
    ):
        export(checkpoint, tmp_path / "out", format, replace_output_layer, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["stranger"]


@pytest.mark.parametrize("options", [{"weights": "fp32", "graph": "fused", "group_size": None}, {"weights": "int4"}])
def test_wrong_logits_over_right_files_are_refused_with_the_figures(checkpoint, tmp_path, monkeypatch, options):
    """A scale of the scores that the graph does not have is in no file that could be compared."""

    def flatten_scores(folder, manifest):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for entry in node.attribute:
                if node.op_type == "GroupQueryAttention" and entry.name == "scale":
                    entry.f = 0.01
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(
        ExportError, match=r"with the same weights: logits differ by 0\.\d+ of their spread, at most 0\.005"
    ):
        export(
            checkpoint,
            tmp_path / "out",
            "onnx",
            flatten_scores,
            monkeypatch,
            **options,
        )


def test_another_window_is_refused(checkpoint, tmp_path, monkeypatch):
    def drop_window(folder, manifest):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            for entry in node.attribute:
                if entry.name == "local_window_size":
                    entry.i = -1
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ExportError, match=r"attention reaches None tokens back, config\.json says 16"):
        export(checkpoint, tmp_path / "out", "onnx", drop_window, monkeypatch)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weights", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("make", [partial(make_mistral, head_dim=16), make_bloom], ids=["mistral", "bloom"])
def test_a_healthy_artifact_carries_its_certificate(tmp_path, format, weights, make):
    layers = 2
    made = normistral.export_model(str(make(tmp_path / "model")), tmp_path / "out", format=format, weights=weights)
    assert made.verified == "run"
    assert made.quality["matrices"] >= 4 * layers + 2
    assert made.quality["tokenizer_tokens"] > 10_000
    assert made.quality["template_conversations"] == (4 if made.template else 0)
    assert 0 <= made.quality["probe_kl_nats"] < 1
    assert read_manifest(tmp_path / "out") == made


def test_the_gate_can_be_left_out_and_the_manifest_says_so(checkpoint, tmp_path, monkeypatch):
    made = export(checkpoint, tmp_path / "out", "onnx", swap_scales, monkeypatch, verify=False)
    assert made.verified == "no"
    assert made.quality is None
    assert "not verified, as asked" in made.notes


def test_what_fails_can_be_kept_under_another_name(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="the scales of") as caught:
        export(checkpoint, tmp_path / "out", "onnx", swap_scales, monkeypatch, keep_failed=True)
    kept = tmp_path / "out.failed"
    assert str(kept) in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    manifest = read_manifest(kept)
    assert manifest.verified == "failed"
    assert any("failed its verification: the scales of" in note for note in manifest.notes)
    with pytest.raises(UsageError, match="exists already"):
        export(checkpoint, tmp_path / "out", "onnx", keep_failed=True)
    with pytest.raises(UsageError, match="without verification nothing fails"):
        export(checkpoint, tmp_path / "again", "onnx", keep_failed=True, verify=False)


def test_a_large_model_is_compared_layer_by_layer(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("normistral.export.verify.artifact.fits_for_running", lambda architecture: False)
    small = export(checkpoint, tmp_path / "small", "onnx")
    assert small.verified == "run"
    monkeypatch.undo()
    assert export(checkpoint, tmp_path / "large", "onnx").quality == pytest.approx(small.quality, rel=1e-3)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp16", "fp32"])
@pytest.mark.parametrize("make", [partial(make_mistral, head_dim=16), make_bloom], ids=["mistral", "bloom"])
def test_an_onnx_graph_computes_layer_by_layer_what_the_engine_does(tmp_path, weights, make):
    options = {"graph": "fused"} if weights.startswith("fp") else {"recipe": "fast"} if weights == "int4" else {}
    normistral.export_model(str(make(tmp_path / "model")), tmp_path / "out", "onnx", weights, verify=False, **options)
    manifest = read_manifest(tmp_path / "out")
    token_ids = list(range(3, 43))
    parts = verification.split_in_turns(token_ids, 8)
    engine = verification.run_engine(verification.load_exact(tmp_path / "out", manifest), token_ids, parts)
    layered = run_layered(tmp_path / "out", manifest, [[token_ids], parts])
    for expected, found in zip(engine, layered, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_pieces_hold_every_node_and_a_layer_each(tmp_path):
    model = make_mistral(tmp_path / "model", head_dim=16)
    normistral.export_model(str(model), tmp_path / "out", "onnx", verify=False, recipe="fast")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    pieces = cut_at_attention(graph)
    assert [node for piece in pieces for node in piece.nodes] == list(graph.node)
    assert len(pieces) == read_manifest(tmp_path / "out").architecture.layers + 1
    assert pieces[-1].outputs == ["logits"]
    for earlier, later in pairwise(pieces):
        assert not {name for name in later.inputs if name in earlier.finished}


def test_a_wrong_layer_of_a_large_model_is_refused(checkpoint, tmp_path, monkeypatch):
    def flatten_scores(folder, manifest):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
        next(entry for entry in attention[-1].attribute if entry.name == "scale").f = 0.01
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    monkeypatch.setattr("normistral.export.verify.artifact.fits_for_running", lambda architecture: False)
    monkeypatch.setattr("normistral.export.verify.artifact.load_exact", lambda *_: pytest.fail("the whole was loaded"))
    with pytest.raises(ExportError, match=r"with the same weights: logits differ by"):
        export(checkpoint, tmp_path / "out", "onnx", flatten_scores, monkeypatch)
    monkeypatch.setattr("normistral.export.verify.layered_onnx.open_session", _refuse)
    with pytest.raises(ExportError, match="the written model cannot be run: no room"):
        export(checkpoint, tmp_path / "again", "onnx")


def test_how_a_model_is_run_is_decided_once(checkpoint, tmp_path, monkeypatch):
    """Memory that others free while the checkpoint is run must not load a large artifact as a whole."""
    answers = [False]
    monkeypatch.setattr(
        "normistral.export.verify.artifact.fits_for_running", lambda architecture: answers.pop() if answers else True
    )
    monkeypatch.setattr("normistral.export.verify.artifact.load_exact", lambda *_: pytest.fail("the whole was loaded"))
    assert export(checkpoint, tmp_path / "out", "onnx").verified == "run"


def _refuse(*_arguments):
    raise EngineError("no room", "make some")


def test_a_model_that_does_not_fit_is_not_run_at_once(checkpoint, monkeypatch):
    architecture = read_headers(checkpoint).architecture
    assert reference.fits_for_running(architecture)
    monkeypatch.setattr(reference, "available_memory_bytes", lambda: 1000)
    assert not reference.fits_for_running(architecture)


def test_an_artifact_that_does_not_fit_is_only_read(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("normistral.export.verify.artifact.available_memory_bytes", lambda: 1000)
    made = export(checkpoint, tmp_path / "out", "onnx")
    assert made.verified == "read"
    assert "probe_kl_nats" not in made.quality
    assert any("too large to run here" in note for note in made.notes)


@pytest.mark.parametrize(
    ("recipe", "advice"),
    [
        (Recipe(), "think of --weights int8"),
        (Recipe(recipe="fast"), "think of --weights int8, or --recipe best"),
        (Recipe(weights="int8"), "think of --weights fp16, or --recipe best"),
        (Recipe(weights="int8", recipe="best"), "think of --weights fp16"),
    ],
)
def test_a_warning_advises_what_the_recipe_leaves_to_try(recipe, advice):
    assert verification.quantization_warning(recipe).endswith(advice)


def test_groups_are_compared_by_factor_and_direction():
    rows = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    for found, factor, cosine in ((rows, 1, 1), (rows * 2, 0.5, 1), (-rows, -1, -1), (np.zeros_like(rows), 0, 0)):
        factors, cosines = compare_groups(rows, found, 16)
        assert factors.shape == cosines.shape == (4, 4)
        np.testing.assert_allclose(factors, factor, atol=1e-6)
        np.testing.assert_allclose(cosines, cosine, atol=1e-6)
    factors, cosines = compare_groups(np.zeros_like(rows), np.zeros_like(rows), 16)
    assert (factors == 1).all()
    assert (cosines == 1).all()


def test_json_of_the_manifest_has_the_certificate(checkpoint, tmp_path):
    export(checkpoint, tmp_path / "out", "onnx")
    document = json.loads((tmp_path / "out" / "normistral.json").read_text(encoding="utf-8"))
    assert document["verified"] == "run"
    assert document["quality"]["probe_tokens"] > 10
