from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from planted import AS_ROOT, KINDS, NOBODY, look, plant

from normistral.artifact.manifest import MANIFEST_NAME
from normistral.errors import ResourceError, UsageError
from normistral.export import staging
from normistral.export.staging import check_output, discard_unfinished, find_unfinished, stage
from normistral.files import FOLDER_MARK, make_own_folder

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
    for name in ("n" * 300, "n/" * 2500 + "n", "a\0b", "\ud800"):
        with pytest.raises(UsageError) as refused, stage(tmp_path / name, force=False):
            pass
        assert refused.value.hint
    with pytest.raises(UsageError, match="exists already"), stage(tmp_path, force=False):
        pass
    assert names(tmp_path) == ["file"]


def test_a_second_export_to_the_same_output_is_refused(tmp_path):
    with stage(tmp_path / "out", force=False) as staged:
        with pytest.raises(UsageError, match="another process is writing"), stage(tmp_path / "out", force=False):
            pass
        with pytest.raises(UsageError, match="another process is writing"):  # before an hour of downloading
            check_output(tmp_path / "out", force=False)
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


def test_folders_with_names_almost_as_ours_stay(tmp_path):
    for name in (".out.partial", ".out.kept", ".out.download-12345678"):
        make_own_folder(tmp_path / name)
    assert find_unfinished(tmp_path) == {}
    discard_unfinished(tmp_path / "out")
    with stage(tmp_path / "out", force=False) as staged:
        fill(staged, "new")
    assert names(tmp_path) == [".out.download-12345678", ".out.kept", ".out.partial", "out"]


@POSIX
def test_an_old_artifact_that_a_kill_left_moved_aside_is_put_back(tmp_path):
    """The way without an atomic exchange: killed between the two renames."""
    output = tmp_path / "out"
    make_artifact(output, "old")
    partial = tmp_path / ".out.partial-12345678"
    make_own_folder(partial)
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
    assert "MB were left while writing out; the unfinished artifact has been removed" in error.value.message
    assert names(tmp_path) == []


# What others planted beside OUTPUT


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_are_not_ours_are_not_touched(tmp_path, kind):
    """Whatever has the name of a partial folder; nor is an artifact in it taken for an old OUTPUT."""
    plant(tmp_path / ".out.partial-0123abcd", kind)
    (tmp_path / ".out.kept-deadbeef").symlink_to(tmp_path / "outside")
    (tmp_path / ".out.kept-22222222").mkdir()  # no mark in it
    outside = tmp_path / "outside"
    outside.mkdir()
    make_artifact(outside / "replaced", "of others")
    (tmp_path / ".out.partial-deadbeef").symlink_to(outside)
    for name in (".out.partial-x", ".out.partial-11111111"):  # no mark in them
        (tmp_path / name).mkdir()
        make_artifact(tmp_path / name / "replaced", "of others")
    before = look(tmp_path)
    with stage(tmp_path / "out", force=False) as staged:
        fill(staged, "new")
    after = look(tmp_path)
    assert (tmp_path / "out" / "model.bin").read_text() == "new"
    assert {name: after[name] for name in before} == before
    assert {name for name in after if not name.startswith("out/")} - {"out"} == set(before)


@AS_ROOT
def test_a_marked_neighbour_of_another_user_is_not_adopted(tmp_path):
    partial = tmp_path / ".out.partial-12345678"
    make_own_folder(partial)
    make_artifact(partial / "replaced", "of others")
    for path in (partial / FOLDER_MARK, partial):
        os.chown(path, NOBODY, NOBODY)
    before = look(tmp_path)
    with stage(tmp_path / "out", force=False) as staged:
        fill(staged, "new")
    assert (tmp_path / "out" / "model.bin").read_text() == "new"
    assert {name: found for name, found in look(tmp_path).items() if name in before} == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_where_the_lock_would_be_is_refused_and_kept(tmp_path, kind):
    plant(tmp_path / ".out.lock", kind)
    before = look(tmp_path)
    with pytest.raises(UsageError, match="it is a"), stage(tmp_path / "out", force=False):
        pass
    assert look(tmp_path) == before


def test_nobody_else_can_look_into_what_is_being_made(tmp_path):
    with stage(tmp_path / "out", force=False) as staged:
        assert staged.artifact.parent.stat().st_mode & 0o777 == 0o700
        fill(staged, "new")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert names(tmp_path / "out") == ["model.bin", MANIFEST_NAME]


def leave_kept(output):
    """What an interrupted export leaves."""
    with suppress(KeyboardInterrupt), stage(output, force=False) as staged:
        make_own_folder(staged.kept)
        (staged.kept / "work").write_text("of hours")
        raise KeyboardInterrupt
    return staged.kept


def test_what_a_stage_keeps_stays_until_output_is_there(tmp_path):
    kept = leave_kept(tmp_path / "out")
    assert names(tmp_path) == [kept.name]
    with pytest.raises(RuntimeError), stage(tmp_path / "out", force=False) as staged:
        raise RuntimeError
    assert staged.kept == kept
    with stage(tmp_path / "other", force=False) as other:
        assert other.kept != kept
        fill(other, "other")
    with stage(tmp_path / "out", force=False) as staged:
        assert (staged.kept / "work").read_text() == "of hours"
        fill(staged, "new")
    assert names(tmp_path) == ["other", "out"]


@POSIX
def test_what_others_could_have_changed_is_not_gone_on_with(tmp_path):
    kept = leave_kept(tmp_path / "out")
    kept.chmod(0o770)
    with stage(tmp_path / "out", force=False) as staged:
        assert staged.kept != kept
        fill(staged, "new")


@AS_ROOT
def test_what_another_user_keeps_is_not_gone_on_with(tmp_path):
    kept = leave_kept(tmp_path / "out")
    for path in (kept / FOLDER_MARK, kept):
        os.chown(path, NOBODY, NOBODY)
    with stage(tmp_path / "out", force=False) as staged:
        assert staged.kept != kept
        fill(staged, "new")
    assert (kept / "work").read_text() == "of hours"


# What --force cannot replace is said before the work


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    make_artifact(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out")
    (tmp_path / "via").symlink_to(tmp_path)
    for output in (tmp_path / "out", tmp_path / "via" / "out", Path("../out")):
        with pytest.raises(UsageError, match="current folder") as refused:
            check_output(output, force=True)
        assert refused.value.hint
    make_artifact(tmp_path / "out" / "deep", "x")
    monkeypatch.chdir(tmp_path / "out" / "deep")
    with pytest.raises(UsageError, match="current folder"):
        check_output(tmp_path / "out", force=True)


MOUNT = """
import os, subprocess, sys
from pathlib import Path
from normistral.errors import UsageError
from normistral.export.staging import stage
out = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", out / sys.argv[2]], check=True)
try:
    with stage(out, force=True):
        print("started")
except UsageError as error:
    print(error.message)
print(sorted(os.listdir(out.parent)))
"""


@AS_ROOT
@pytest.mark.parametrize("place", [".", "below"])
def test_a_mount_point_is_not_replaced(tmp_path, place):
    (tmp_path / "out" / place).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", MOUNT, tmp_path / "out", place],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "is a mount point" in done.stdout
    assert "started" not in done.stdout
    assert done.stdout.endswith("['out']\n")


@AS_ROOT
def test_an_output_that_its_user_may_not_move_is_refused_first(tmp_path):
    """In a sticky folder, and where the parent cannot be written to."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)
    for name, mode in (("sticky", 0o1777), ("closed", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        make_artifact(tmp_path / name / "out", "root's")
        (tmp_path / name / "out").chmod(0o777)
        child = os.fork()
        if child == 0:
            os.setuid(NOBODY)
            try:
                check_output(tmp_path / name / "out", force=True)
            except UsageError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.EDQUOT, "quota"), (errno.EFBIG, "no file may become that large"), (errno.ENOSPC, "disk is full: ")],
)
def test_what_stops_the_writing_is_named(tmp_path, number, reason):
    with pytest.raises(ResourceError, match=reason) as error:
        fail_while_staging(tmp_path / "out", OSError(number, os.strerror(number)), force=False)
    assert error.value.hint
    assert names(tmp_path) == []
