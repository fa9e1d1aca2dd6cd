from __future__ import annotations

import errno
import os
import signal
import sys

import pytest

from normistral.errors import ResourceError, UsageError
from normistral.export import staging
from normistral.export.staging import check_output, stage
from normistral.manifest import MANIFEST_NAME

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def make_artifact(folder, text):
    folder.mkdir()
    (folder / "model.bin").write_text(text)
    (folder / MANIFEST_NAME).write_text('{"files": {"model.bin": {}}}')


def fill(staged, text):
    (staged.artifact / "model.bin").write_text(text)
    (staged.artifact / MANIFEST_NAME).write_text('{"files": {"model.bin": {}}}')


def fail_while_staging(output, error, *, force):
    with stage(output, force=force) as staged:
        fill(staged, "broken")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_artifact_appears_when_it_is_whole(tmp_path):
    output = tmp_path / "deep" / "out"
    with stage(output, force=False) as staged:
        fill(staged, "new")
        (staged.workspace / "temporary").write_text("x")
        assert not output.exists()
    assert names(output) == ["model.bin", MANIFEST_NAME]
    assert names(output.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        fail_while_staging(tmp_path / "out", error(), force=False)
    assert names(tmp_path) == []


def test_an_existing_output_is_refused_without_force(tmp_path):
    make_artifact(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists already"), stage(tmp_path / "out", force=False):
        pass
    assert (tmp_path / "out" / "model.bin").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("atomic", [True, False])
def test_force_replaces_only_when_the_new_one_is_whole(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    output = tmp_path / "out"
    make_artifact(output, "old")
    with pytest.raises(RuntimeError):
        fail_while_staging(output, RuntimeError(), force=True)
    assert (output / "model.bin").read_text() == "old"
    with stage(output, force=True) as staged:
        fill(staged, "new")
        assert (output / "model.bin").read_text() == "old"
    assert (output / "model.bin").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_spares_what_no_export_wrote(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact of normistral"):
        check_output(home, force=True)
    (home / MANIFEST_NAME).write_text('{"files": {"model.bin": {}}}')
    with pytest.raises(UsageError, match=r"holds thesis\.tex, which no export wrote"):
        check_output(home, force=True)
    (tmp_path / "link").symlink_to(home)
    with pytest.raises(UsageError, match="is not a folder"):
        check_output(tmp_path / "link", force=True)
    with pytest.raises(UsageError, match="is not a folder"):
        check_output(home / "thesis.tex", force=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=True)


def test_an_output_without_a_usable_name_or_parent_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"), stage(tmp_path / "file" / "out", force=False):
        pass
    with pytest.raises(UsageError), stage(tmp_path / ("n" * 300), force=False):
        pass
    with pytest.raises(UsageError, match="exists already"), stage(tmp_path, force=False):
        pass
    assert names(tmp_path) == ["file"]


def test_a_second_export_to_the_same_output_is_refused(tmp_path):
    with stage(tmp_path / "out", force=False) as staged:
        with pytest.raises(UsageError, match="another export is writing"), stage(tmp_path / "out", force=False):
            pass
        with stage(tmp_path / "other", force=False) as other:
            fill(other, "other")
        fill(staged, "new")
    assert names(tmp_path) == ["other", "out"]


@POSIX
def test_a_killed_export_is_cleaned_up_by_the_next(tmp_path):
    child = os.fork()
    if child == 0:
        with stage(tmp_path / "out", force=False) as staged:
            fill(staged, "half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = names(tmp_path)
    assert all(name.startswith(".out.") for name in left)
    assert len(left) == 2  # the lock and the partial folder
    with stage(tmp_path / "out", force=False) as staged:
        fill(staged, "new")
    assert names(tmp_path) == ["out"]


@POSIX
def test_an_old_artifact_that_a_kill_left_moved_aside_is_put_back(tmp_path):
    """The way without an atomic exchange: killed between the two renames."""
    output = tmp_path / "out"
    make_artifact(output, "old")
    partial = tmp_path / ".out.partial-12345678"
    partial.mkdir()
    output.rename(partial / "replaced")
    with pytest.raises(UsageError, match="exists already"), stage(output, force=False):
        pass
    assert (output / "model.bin").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_said_with_numbers_and_leaves_nothing(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "model.bin")
    with pytest.raises(ResourceError) as error:
        fail_while_staging(tmp_path / "out", full, force=False)
    assert error.value.message.startswith("the disk is full: ")
    assert "MB were left while writing out; what was written has been removed" in error.value.message
    assert names(tmp_path) == []
