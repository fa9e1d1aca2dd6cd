"""Artifacts that an earlier version made of a checkpoint of transformers 5: load, serve and info say so."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from tiny_models import edit_json, make_mistral
from typer.testing import CliRunner

import normistral
from normistral.artifact.artifact import find_advice
from normistral.artifact.manifest import Source, read_manifest, write_manifest
from normistral.cli import build_app
from normistral.files import sha256_file

FIVE = {"rope_theta": ..., "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
FOUND = "it is not the model of its checkpoint: positions are turned by theta 10000 instead of 1e+06. Export it again"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint of transformers 5, and the artifact that schema 5 made of it: verified, with theta 10000."""
    folder = tmp_path_factory.mktemp("old")
    model = make_mistral(folder / "model", head_dim=16, sliding_window=16)
    normistral.export_model(str(model), folder / "artifact", format="onnx", weights="fp32", graph="fused")
    edit_json(model / "config.json", **FIVE)
    hashes = {"config.json": sha256_file(model / "config.json")}
    make_old(folder / "artifact", Source("folder", "model", None, hashes))
    return folder


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path / "place")


def make_old(artifact, source=None, schema=5):
    manifest = read_manifest(artifact)
    old = replace(manifest, schema_version=schema, source=source or manifest.source)
    write_manifest(artifact, old)
    return old


def advice(artifact):
    return find_advice(artifact, read_manifest(artifact))


def test_a_checkpoint_beside_the_artifact_decides(place):
    artifact, model = place / "artifact", place / "model"
    assert read_manifest(artifact).verified == "run"
    assert advice(artifact) == FOUND
    for changes, wrong in (
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}},
            "positions are not scaled, config.json asks for yarn",
        ),
        (
            {"rope_parameters": ..., "rope_theta": 1e4, "logits_scaling": 8.0},
            "logits_scaling of config.json was dropped",
        ),
        ({"logits_scaling": ...}, None),
    ):
        edit_json(model / "config.json", **changes)
        make_old(artifact, Source("folder", "model", None, {"config.json": sha256_file(model / "config.json")}))
        found = advice(artifact)
        assert found is None if wrong is None else wrong in found


def test_without_the_checkpoint_it_says_what_is_not_known(place):
    shutil.rmtree(place / "model")
    assert "Its checkpoint was not found here: if that one's config.json has rope_parameters" in advice(
        place / "artifact"
    )


def test_another_file_of_the_same_name_decides_nothing(place):
    edit_json(place / "model" / "config.json", hidden_size=1)
    assert "Its checkpoint was not found here" in advice(place / "artifact")


def test_a_download_in_the_cache_decides(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    (place / "model").rename(snapshot := _parents(place / "hub/models--a--b/snapshots/abc"))
    hashes = {"config.json": sha256_file(snapshot / "config.json")}
    make_old(place / "artifact", Source("hub", "a/b", "abc", hashes))
    assert advice(place / "artifact") == FOUND


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("norallm/normistral-7b-warm", None),
        ("norallm/normistral-11b-warm", "norallm/normistral-11b-warm is published with 1e+06. Export it again"),
    ],
)
def test_a_preset_s_published_theta_decides(place, repository, expected):
    make_old(place / "artifact", Source("hub", repository, None, {"config.json": "0" * 64}))
    found = advice(place / "artifact")
    assert found is None if expected is None else expected in found


def test_what_was_understood_then_and_what_is_made_now_is_left_alone(place):
    artifact = place / "artifact"
    make_old(artifact, schema=6)
    assert advice(artifact) is None
    make_old(artifact, Source("gguf", "model.gguf", None, {"model.gguf": "0" * 64}))
    assert advice(artifact) is None
    shutil.rmtree(place / "model")
    make_old(artifact, Source("folder", "model", None, {"config.json": "0" * 64}))
    edit_json(artifact / "config.json", rope_theta=5e5)
    assert advice(artifact) is None


def test_load_serve_and_info_say_it(place, caplog):
    from normistral.server.options import ServerLimits
    from normistral.server.startup import EngineOptions, open_artifacts

    artifact = place / "artifact"
    with caplog.at_level(logging.WARNING), normistral.load(artifact):
        pass
    assert f"artifact: {FOUND}" in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_artifacts([str(artifact)], EngineOptions(), ServerLimits())
    assert f"artifact: {FOUND}" in caplog.messages
    assert FOUND in " ".join(CliRunner().invoke(build_app(), ["info", str(artifact)]).output.split())
    assert json.loads(CliRunner().invoke(build_app(), ["info", "--json", str(artifact)]).output)["advice"] == FOUND


def _parents(path):
    path.parent.mkdir(parents=True)
    return path
