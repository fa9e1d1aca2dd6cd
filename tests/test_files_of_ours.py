"""Names that the package chooses itself (history, results of tuning, journals, predictions), planted by somebody."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from planted import AS_ROOT, KINDS, NOBODY, look, plant

from normistral.artifact import store
from normistral.batch.journal import begin_run, open_journal, parts_folder, remove_journal
from normistral.commands.line_editor import _open_history
from normistral.commands.saved_chats import load_conversation, save_conversation
from normistral.errors import NormistralError, UsageError
from normistral.runtime.sessions import open_session

JOB = {"a": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_saving_replaces_files_only(tmp_path, kind):
    """Conversations; sessions and others go the same way (test_files)."""
    path = plant(tmp_path / "out", kind)
    before = look(tmp_path)
    with pytest.raises(NormistralError) as refused:
        save_conversation(str(path), [], artifact="a", settings={}, overwrite=True)
    assert refused.value.hint
    assert look(tmp_path) == before


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "circle", pytest.param("device", marks=AS_ROOT)])
def test_reading_does_not_wait_or_break(tmp_path, kind):
    path = plant(tmp_path / "in", kind)
    for read in (
        lambda: load_conversation(str(path)),
        lambda: open_session(path).__enter__(),
    ):
        with pytest.raises(NormistralError) as refused:
            read()
        assert refused.value.hint


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nosuchuser/x", "\udc80\ud800"])
def test_names_in_the_conversation_are_refused_with_a_reason(name):
    for call in (
        lambda: load_conversation(name),
        lambda: save_conversation(name, [], artifact="a", settings={}, overwrite=True),
    ):
        with pytest.raises(NormistralError) as refused:
            call()
        assert refused.value.hint


@pytest.mark.parametrize("kind", KINDS)
def test_the_history_is_a_file(tmp_path, kind, capsys):
    path = plant(tmp_path / "history", kind)
    before = look(tmp_path)
    history = _open_history(path, on_error=pytest.fail)
    history.append_string("secret")
    assert look(tmp_path) == before
    assert "messages are not remembered" in capsys.readouterr().err


# Journals of batch jobs


@pytest.mark.parametrize("kind", KINDS)
def test_a_journal_is_a_folder_that_a_job_made(tmp_path, kind):
    output = tmp_path / "out.jsonl"
    path = plant(parts_folder(output), kind)
    if kind == "folder":
        (path / "thesis.jsonl").write_text("years of work")
    before = look(tmp_path)
    with pytest.raises(UsageError) as refused:
        open_journal(output, JOB).__enter__()
    assert refused.value.hint
    assert look(tmp_path) == before


def test_a_journal_is_not_found_through_a_link(tmp_path):
    output, elsewhere = tmp_path / "out.jsonl", tmp_path / "elsewhere"
    elsewhere.mkdir()
    parts_folder(output).symlink_to(elsewhere)
    with pytest.raises(UsageError, match="no job of yours"):
        open_journal(output, JOB).__enter__()
    assert not list(elsewhere.iterdir())


@AS_ROOT
@pytest.mark.parametrize("change", ["owner", "mode"])
def test_a_journal_of_another_user_is_not_taken_up(tmp_path, change):
    output = tmp_path / "out.jsonl"
    with open_journal(output, JOB) as folder:
        begin_run(folder)
    if change == "owner":
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o777)
    before = look(tmp_path)
    with pytest.raises(UsageError, match="no job of yours"):
        open_journal(output, JOB).__enter__()
    assert look(tmp_path) == before


def test_what_somebody_put_into_a_journal_is_kept(tmp_path):
    with open_journal(tmp_path / "out.jsonl", JOB) as folder:
        begin_run(folder)
        (folder / "notes.jsonl").write_text('{"row": 0}\n')
        (folder / "00000000-000000-x.jsonl").symlink_to("notes.jsonl")
        remove_journal(folder)
    assert sorted(look(tmp_path)) == [
        "out.jsonl.parts",
        "out.jsonl.parts/00000000-000000-x.jsonl",
        "out.jsonl.parts/notes.jsonl",
    ]


# NORMISTRAL_HOME


@pytest.mark.parametrize("value", ["~nosuchuser", "~nosuchuser/x"])
def test_a_home_that_cannot_be_is_refused(value, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", value)
    for ask in (
        store.artifacts_dir,
        store.cache_dir,
        store.tuned_dir,
        store.kernels_dir,
        store.packed_dir,
        store.history_file,
    ):
        with pytest.raises(UsageError, match="no such user") as refused:
            ask()
        assert "NORMISTRAL_HOME" in refused.value.hint


def test_an_empty_home_counts_as_none_and_a_relative_one_is_from_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", "")
    assert store.artifacts_dir().is_absolute()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NORMISTRAL_HOME", "relative")
    assert store.artifacts_dir() == tmp_path / "relative" / "artifacts"


@pytest.mark.skipif(sys.platform == "win32", reason="users without a home folder are a matter of POSIX")
def test_without_a_home_folder_nothing_is_put_into_one_called_tilde(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_DATA_HOME", "NORMISTRAL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for a user id that has no name
    with pytest.raises(UsageError, match="no home folder"):
        store.artifacts_dir()
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    assert store.artifacts_dir() == Path(tmp_path, "artifacts")
