"""Files that appear whole or not at all, in the place of files only; what is read and locked are files, too."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from planted import AS_ROOT, KINDS, NOBODY, look, plant

from normistral import files
from normistral.commands.result_files import require_result_place, write_result
from normistral.errors import NormistralError, UsageError
from normistral.files import (
    FOLDER_MARK,
    atomic_save,
    atomic_write,
    is_own_folder,
    locked,
    make_own_folder,
    open_file,
    read_file,
    remove_own_folder,
    require_place,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("private", [True, False])
def test_only_a_file_is_replaced(tmp_path, kind, private):
    path = plant(tmp_path / "out", kind)
    before = look(tmp_path)
    with pytest.raises(OSError, match="it is a"), atomic_write(path, private=private) as file:
        file.write(b"new")
    with pytest.raises(NormistralError), atomic_save(path) as file:
        file.write(b"new")
    with pytest.raises(UsageError) as refused:
        require_place(path, "--session")
    assert refused.value.hint
    assert look(tmp_path) == before


def test_what_becomes_a_link_meanwhile_is_not_replaced(tmp_path):
    def write_and_plant():
        with atomic_write(tmp_path / "out") as file:
            file.write(b"new")
            (tmp_path / "out").symlink_to("elsewhere")

    with pytest.raises(OSError, match="symbolic link"):
        write_and_plant()
    assert list(look(tmp_path)) == ["out"]


def test_a_result_is_replaced_whole_and_others_may_read_it(tmp_path):
    path = tmp_path / "fart.md"
    write_result(path, "blåbær\n")
    assert path.read_bytes() == "blåbær\n".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    write_result(path, "bringebær\n")
    assert path.stat().st_mode & 0o777 == 0o640
    with atomic_save(path) as file:
        file.write(b"secret")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_result_may_hold_a_name_that_is_no_utf_8(tmp_path):
    write_result(tmp_path / "fart.json", '{"artifact": "sju\udcff"}')
    assert (tmp_path / "fart.json").read_bytes() == b'{"artifact": "sju?"}'


@AS_ROOT
def test_a_replaced_result_stays_its_owners(tmp_path):
    path = tmp_path / "fart.md"
    path.touch()
    os.chown(path, NOBODY, NOBODY)
    write_result(path, "ny")
    assert (path.stat().st_uid, path.stat().st_gid) == (NOBODY, NOBODY)
    with atomic_save(path) as file:
        file.write(b"secret")
    assert path.stat().st_uid == 0  # what is private is not given to somebody else


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fart.md"
    path.write_text("gammel")

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_result(path, "ny")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("fart.md", "gammel")]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("ø" * 127)
    write_result(path, "ny")
    assert path.read_text() == "ny"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b", "NUL"),
        ("\ud800", "cannot be encoded"),
        ("x" * 300, "too long"),
        ("x/" * 2500 + "x", "too long"),
        ("none/x", "there is no folder"),
        ("file/x", "there is no folder"),
        ("loop/x", "there is no folder"),
    ],
)
def test_names_that_no_file_can_have_are_refused_with_the_reason(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=reason) as refused:
        require_place(tmp_path / name)
    assert refused.value.hint
    with pytest.raises(OSError), atomic_write(tmp_path / name):  # noqa: PT011 - many kinds
        pass
    with pytest.raises(OSError):  # noqa: PT011
        read_file(tmp_path / name, 10)


def test_a_limit_of_file_sizes_is_named(tmp_path):
    """`ulimit -f`: not "the disk is full"."""
    code = (
        "import sys; from pathlib import Path; from normistral.files import atomic_save\n"
        "from normistral.errors import NormistralError\n"
        "try:\n with atomic_save(Path(sys.argv[1])) as file: file.write(b'x' * 100_000)\n"
        "except NormistralError as error: print(error.message, error.hint)"
    )
    limit = (4096, 4096)
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert "a file may have 4,096 bytes at most here" in done.stdout
    assert "ulimit -f" in done.stdout
    assert list(tmp_path.iterdir()) == []


@AS_ROOT
def test_a_sticky_folder_is_respected(tmp_path):
    """As /tmp is: who is neither the folder's nor the file's owner cannot replace it, and is told before the work."""
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (sticky / "out").write_text("root's")
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        try:
            require_place(sticky / "out")
        except UsageError as error:
            os._exit(0 if "belongs to another user" in error.message else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_mount_points_are_known(monkeypatch, tmp_path):
    place = tmp_path / "a b\n"
    place.touch()
    escaped = str(place).replace(" ", "\\040").replace("\n", "\\012")
    monkeypatch.setattr(files.Path, "read_text", lambda *a, **k: f"36 35 98:0 /m {escaped} rw - ext3 /dev/root rw\n")
    with pytest.raises(UsageError, match="mount point"):
        require_place(place)


# Results that go into what a shell gave


def test_results_go_to_a_descriptor_a_fifo_or_nowhere(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    code = (
        "import sys; from pathlib import Path\n"
        "from normistral.commands.result_files import require_result_place, write_result\n"
        "for name in sys.argv[1:]:\n"
        "    require_result_place(Path(name), '--json'); write_result(Path(name), 'bær')"
    )
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    out = tmp_path / "out"
    with out.open("wb") as stdout:
        subprocess.run([sys.executable, "-c", code, "/dev/stdout", "/dev/fd/1", fifo, "/dev/null"], stdout=stdout)
    reader.join(20)
    assert out.read_text() == "bærbær"
    assert got == ["bær".encode()]
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    with pytest.raises(NormistralError, match="nobody reads"):
        write_result(fifo, "ny")


def test_results_do_not_go_to_other_devices(tmp_path):
    for name in ("/dev/zero", "/dev/fd/x", tmp_path / "none" / "x", tmp_path):
        with pytest.raises(UsageError):
            require_result_place(Path(name), "--json")


# Reading and locking


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("link", "dangling link", "circle")])
def test_only_files_are_read(tmp_path, kind):
    """In particular nothing waits for a FIFO."""
    path = plant(tmp_path / "in", kind)
    with pytest.raises(OSError, match=r"not a file|No such"):
        read_file(path, 100)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    assert read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4"):
        read_file(path, 4)
    with pytest.raises(OSError, match="not a file"):
        read_file(Path("/dev/zero"), 100)
    with pytest.raises(OSError, match="symbolic link"):
        open_file(tmp_path / "link", follow=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_is_a_file(tmp_path, kind):
    plant(tmp_path / ".out.lock", kind)
    before = look(tmp_path)
    with pytest.raises(OSError, match=r"it is a"), locked(tmp_path / ".out.lock"):
        pass
    assert look(tmp_path) == before


@AS_ROOT
def test_a_lock_of_another_user_is_left_alone(tmp_path):
    path = tmp_path / ".out.lock"
    path.touch()
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(OSError, match="another user"), locked(path):
        pass
    assert path.exists()


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
            pass
        (tmp_path / "lock").rename(tmp_path / "moved")
        (tmp_path / "lock").write_text("of others")
    assert (tmp_path / "lock").read_text() == "of others"


# Folders of our own


def test_an_own_folder_is_known_and_deleted_with_what_it_holds(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis").touch()
    folder = tmp_path / "own"
    make_own_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "link").symlink_to(other)
    (folder / "deep").mkdir()
    (folder / "deep" / "link").symlink_to(other)
    os.mkfifo(folder / "fifo")
    assert is_own_folder(folder)
    remove_own_folder(folder)
    assert list(look(tmp_path)) == ["other", "other/thesis"]


def test_what_is_not_ours_is_no_own_folder(tmp_path):
    make_own_folder(tmp_path / "own")
    (tmp_path / "link").symlink_to("own")
    (tmp_path / "unmarked").mkdir()
    (tmp_path / "link marked").mkdir()
    (tmp_path / "link marked" / FOLDER_MARK).symlink_to(tmp_path / "own" / FOLDER_MARK)
    for name in ("link", "unmarked", "link marked", "nothing", "own/" + FOLDER_MARK):
        assert not is_own_folder(tmp_path / name)
    with pytest.raises(OSError):  # noqa: PT011 - ELOOP or ENOTDIR
        remove_own_folder(tmp_path / "link")
    assert is_own_folder(tmp_path / "own")


@AS_ROOT
def test_a_marked_folder_of_another_user_is_no_own_folder(tmp_path):
    for name in ("folder", "mark"):
        make_own_folder(tmp_path / name)
    os.chown(tmp_path / "folder", NOBODY, NOBODY)
    os.chown(tmp_path / "mark" / FOLDER_MARK, NOBODY, NOBODY)
    assert not is_own_folder(tmp_path / "folder")
    assert not is_own_folder(tmp_path / "mark")


def test_nothing_else_writes_files_whole():
    """One way to do it: others would not know what may be replaced. Renames in folders of ours are something else."""
    package = Path(files.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    assert {name for name, text in sources.items() if "mkstemp(" in text} == {
        "files.py",
        "batch/journal.py",
        "runtime/kernels/packed_store.py",  # in pieces of a huge page, and not forced to the disk
    }
    assert not [name for name, text in sources.items() if "os.replace(" in text or "os.rename(" in text]
    assert shutil.rmtree.avoids_symlink_attacks  # as `remove_own_folder` needs it
