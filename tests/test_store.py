"""The local store: names, paths and what is said when there is nothing."""

from pathlib import Path

import pytest
from sample_artifacts import write_artifact

from normistral import store
from normistral.errors import ModelNotFoundError
from normistral.manifest import Manifest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and an empty working folder beside it."""
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home" / "artifacts"


def test_the_store_is_where_the_environment_says(home: Path) -> None:
    assert store.artifacts_dir() == home


def test_without_the_variable_it_is_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NORMISTRAL_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    folder = store.artifacts_dir()
    assert folder.parts[-2:] == ("normistral", "artifacts")
    assert folder.is_absolute()


def test_a_name_a_path_and_an_absolute_path_are_found(home: Path, tmp_path: Path) -> None:
    write_artifact(home / "norsk-int4")
    write_artifact(tmp_path / "work" / "sub" / "here")
    assert store.resolve_artifact("norsk-int4") == home / "norsk-int4"
    assert store.resolve_artifact("sub/here").samefile(tmp_path / "work" / "sub" / "here")
    assert store.resolve_artifact(str(home / "norsk-int4")) == home / "norsk-int4"


def test_an_artifact_here_wins_over_one_in_the_store(home: Path, tmp_path: Path) -> None:
    write_artifact(home / "both")
    (tmp_path / "work" / "both").mkdir()
    assert store.resolve_artifact("both") == home / "both"  # the folder here is no artifact
    write_artifact(tmp_path / "work2" / "both")
    (tmp_path / "work" / "both").rmdir()
    (tmp_path / "work2" / "both").rename(tmp_path / "work" / "both")
    assert store.resolve_artifact("both").samefile(tmp_path / "work" / "both")


def test_a_folder_without_a_manifest_is_still_the_folder(tmp_path: Path) -> None:
    (tmp_path / "work" / "plain").mkdir()
    assert store.resolve_artifact("plain").samefile(tmp_path / "work" / "plain")


def test_a_missing_artifact_says_what_there_is(home: Path) -> None:
    write_artifact(home / "norsk-int4")
    write_artifact(home / "norsk-int8")
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve_artifact("norks-int4")
    assert "'norks-int4'" in caught.value.message
    assert "norsk-int4, norsk-int8" in caught.value.message
    assert caught.value.hint == "make it with: normistral export demo"


def test_a_preset_that_was_not_exported_says_how() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve_artifact("norallm/normistral-7b-warm-instruct")
    assert caught.value.hint == "make it with: normistral export 7b-warm-instruct"
    assert "the local store has no artifacts" in caught.value.message


@pytest.mark.parametrize("name", ["", "../escape", "a/../../escape", ".hidden", "nul\x00", "x" * 300, "back\\slash"])
def test_names_do_not_lead_out_of_the_store(home: Path, name: str) -> None:
    write_artifact(home.parent / "escape")
    (home / ".hidden").mkdir(parents=True)
    with pytest.raises(ModelNotFoundError):
        store.resolve_artifact(name)


def test_a_file_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "work" / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"model\.gguf is a file"):
        store.resolve_artifact("model.gguf")


def test_listing(home: Path) -> None:
    assert store.list_artifacts() == []
    manifest = write_artifact(home / "b-good")
    write_artifact(home / ".a-good.tmp")
    (home / "a-broken").mkdir()
    (home / "a-file").write_text("")
    broken, good = store.list_artifacts()
    assert good == ("b-good", home / "b-good", manifest)
    assert broken.name == "a-broken"
    assert isinstance(broken.content, str)
    assert "not a whole artifact" in broken.content


def test_the_only_artifact_is_the_default(home: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        store.default_artifact()
    assert caught.value.hint == "make it with: normistral export demo"
    write_artifact(home / "one")
    (home / "broken").mkdir()
    assert store.default_artifact() == home / "one"
    write_artifact(home / "two")
    with pytest.raises(ModelNotFoundError) as caught:
        store.default_artifact()
    assert "one, two" in caught.value.message
    assert isinstance(store.list_artifacts()[1].content, Manifest)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo-openvino-int4"),
        ("7b-warm", "7b-warm-openvino-int4"),
        ("norallm/normistral-7b-warm", "7b-warm-openvino-int4"),
        ("somebody/their-model", "their-model-openvino-int4"),
        ("folders/blåbær/", "blåbær-openvino-int4"),
        ("folders/model.Q4_1.gguf", "model.Q4_1-openvino-int4"),
        (".", "work-openvino-int4"),
        (".hidden", "hidden-openvino-int4"),
        ("/", "model-openvino-int4"),
    ],
)
def test_default_output(home: Path, model: str, name: str) -> None:
    assert store.default_output(model, "int4", "openvino") == home / name
