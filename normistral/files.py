"""Files: atomic writes, reads of regular files only, locks, hashes, folders of ours.

One rule for every name that something is written to: only a regular file, or nothing, is replaced. A symbolic link is
refused and not followed, because in a folder that others may write it leads where they want; so are devices, FIFOs,
sockets, folders and mount points. Nothing here waits for a FIFO.

Errors are OSErrors, also for names that no file can have. `explain` says what one means and what to do about it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from normistral.errors import NormistralError, UsageError
from normistral.progress import OnBytes, ignore_bytes

FOLDER_MARK = ".made-by-normistral"  # in folders of ours
_ELSEWHERE = "choose another place"
_DESCRIPTOR = re.compile(r"/dev/(stdin|stdout|stderr)|(?:/dev/fd|/proc/self/fd)/([0-9]{1,9})")
_READ_BYTES = 4 * 2**20
_STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose a place on another disk"),
    errno.EDQUOT: ("the disk quota of this user is used up", "delete something, or choose a place on another disk"),
    errno.EFBIG: ("no file may become that large here", "raise the limit (ulimit -f), or choose another file system"),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("its links lead in a circle, or it is a link itself", "name the file itself"),
    errno.EACCES: ("permission denied", "choose a place that you may use, or ask its owner"),
    errno.EPERM: ("the system does not permit it", "choose a place that you may use, or ask its owner"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system has too many files open", "close other programs"),
    errno.EBUSY: ("it is in use by the system, such as a mount point", _ELSEWHERE),
    errno.EIO: ("the disk reports an error", "look at the system's log, and choose another disk"),
    errno.ENOMEM: ("the memory is used up", "close other programs, or raise the limit (ulimit -v)"),
}


class RefusedFileError(OSError):
    """A name that is not written to or read from here; `strerror` says why."""

    def __init__(self, path: Path, reason: str, hint: str = _ELSEWHERE) -> None:
        super().__init__(errno.EINVAL, reason, str(path))
        self.hint = hint


def explain(exc: OSError) -> tuple[str, str]:
    """Reason and hint for an error of the system."""
    if isinstance(exc, RefusedFileError):
        return exc.strerror or "", exc.hint
    reason, hint = _REASONS.get(exc.errno or 0, (exc.strerror or str(exc), "see that it is there and you may use it"))
    if exc.errno == errno.EFBIG and sys.platform != "win32":
        import resource

        most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if most != resource.RLIM_INFINITY:
            reason = f"a file may have {most:,} bytes at most here"
    return reason, hint


# Writing


@contextmanager
def atomic_write(path: Path, *, private: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the context ends without an error.

    Until then it is a neighbour, and `path` is as it was.

    Args:
        private: with permissions 0600; otherwise with owner and permissions of the file that it replaces, or those of
            any new file.

    Raises:
        OSError: it cannot be written, or `path` is no file that may be replaced; nothing is left of it.
    """
    path = checked(path).absolute()
    require_replaceable(path)
    prefix = os.fsdecode(os.fsencode(f".{path.name}")[:200])  # a name may be as long as the system allows
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{prefix}.")  # permissions 0600
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if not private:
                _take_over(path, temporary, stream.fileno())
        require_replaceable(path)  # it may have become something else
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_save(path: Path) -> Iterator[BinaryIO]:
    """`atomic_write` for a user's text at a place the user named: readable by its owner only.

    Raises:
        NormistralError: it cannot be written.
    """
    try:
        with atomic_write(path) as stream:
            yield stream
    except OSError as exc:
        reason, hint = explain(exc)
        raise NormistralError(f"cannot write {path}: {reason}", hint) from exc


def require_place(path: Path, what: str = "") -> None:
    """Find out before long work whether `atomic_write` can write a file.

    Args:
        what: the option that names it, for the message.

    Raises:
        UsageError: it cannot.
    """
    name = f"{what} {path}" if what else str(path)
    try:
        path = checked(path).absolute()
        if not _is_folder(path.parent):
            raise UsageError(
                f"cannot write {name}: there is no folder {path.parent}", "make it, or name a file elsewhere"
            )
        require_replaceable(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as exc:
        reason, hint = explain(exc)
        raise UsageError(f"cannot write {name}: {reason}", hint) from exc


def _is_folder(path: Path) -> bool:
    """`Path.is_dir`, which from Python 3.14 on hides why it could not look: a name too long, no permission."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def require_replaceable(path: Path) -> None:
    """Refuse a name that stands for anything but a regular file or nothing.

    Raises:
        OSError: it does, or the system would not let the file be replaced.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise RefusedFileError(path, "it is a symbolic link, which is not replaced", "name the file that it leads to")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise RefusedFileError(path, f"it is {kind}, and only a file is replaced", "name a file")
    if Path(os.path.realpath(path)) in mount_points():
        raise RefusedFileError(path, "it is a mount point, which cannot be replaced", "name a file elsewhere")
    require_movable(path)


def require_movable(path: Path) -> None:
    """Refuse what a sticky folder such as /tmp lets only its owner move.

    Raises:
        RefusedFileError: it belongs to another user.
    """
    parent = path.parent.stat()
    if os.name != "posix" or not parent.st_mode & stat.S_ISVTX:
        return
    if os.geteuid() not in (0, parent.st_uid, path.lstat().st_uid):
        raise RefusedFileError(path, "it belongs to another user, who alone may replace it in this folder")


def mount_points() -> frozenset[Path]:
    """Where file systems are mounted, bind mounts of single files included; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return frozenset()
    fields = (line.split(" ")[4] for line in lines if line.count(" ") > 4)  # proc_pid_mountinfo(5)
    return frozenset(Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)) for field in fields)


def checked(path: Path) -> Path:
    """`path`, if a file can have this name.

    Raises:
        RefusedFileError: it holds a NUL, or characters that no name can be encoded from.
    """
    try:
        encoded = os.fsencode(path)
    except UnicodeError as exc:
        raise RefusedFileError(path, "no file can have this name: it cannot be encoded", "name another") from exc
    if b"\0" in encoded:
        raise RefusedFileError(path, "no file can have a name with a NUL in it", "name another")
    return path


def _take_over(path: Path, temporary: str, descriptor: int) -> None:
    """Give the new file permissions and owner of the old one."""
    try:
        old = path.lstat()
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        return
    if hasattr(os, "fchown"):
        with suppress(OSError):  # a folder may hold files of others; the new one is then the writer's
            os.fchown(descriptor, old.st_uid, old.st_gid)
    Path(temporary).chmod(old.st_mode & 0o777)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, should the power fail. Raises OSError."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading


def open_file(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600, *, follow: bool = True) -> int:
    """The descriptor of a regular file; a FIFO or device is not waited for, nor left open.

    Args:
        flags: of os.open.
        mode: of a file that `flags` create.
        follow: whether a symbolic link is followed; not for names that something is written to.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY", *(() if follow else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    descriptor = -1
    try:
        checked(path)
        with suppress(FileNotFoundError):  # a device may do something when it is opened: look first
            _require_regular(path, path.stat() if follow else path.lstat())
        descriptor = os.open(path, flags, mode)
        _require_regular(path, os.fstat(descriptor))
        return descriptor
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with os.fdopen(open_file(checked(path)), "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise RefusedFileError(path, f"it is larger than {most:,} bytes", "name another file")
    return raw


def read_input(path: Path, most: int) -> bytes:
    """`read_file` for what a user names to be read once, which may also be a pipe: /dev/stdin, or `<(…)` of a shell.

    Raises:
        OSError: as `read_file`.
    """
    number = descriptor_number(path)
    if number is None or stat.S_ISREG(os.fstat(number).st_mode):
        return read_file(path, most)
    if not stat.S_ISFIFO(os.fstat(number).st_mode):
        raise RefusedFileError(path, "it is neither a file nor a pipe", "name a file")
    with os.fdopen(os.dup(number), "rb") as pipe:
        raw = pipe.read(most + 1)
    if len(raw) > most:
        raise RefusedFileError(path, f"it has more than {most:,} bytes", "name another file")
    return raw


def replace_undecodable(text: str) -> str:
    """A text of the system, such as a file's name: bytes of it that are no UTF-8 become replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def descriptor_number(path: Path) -> int | None:
    """Of this process's descriptor that a name such as /dev/stdout or /dev/fd/63 stands for; None for other names."""
    found = _DESCRIPTOR.fullmatch(str(path))
    if found is None or os.name != "posix":
        return None
    return _STANDARD[found[1]] if found[1] else int(found[2])


def is_own(status: os.stat_result) -> bool:
    """Whether a file belongs to whom this process acts for."""
    return os.name != "posix" or status.st_uid == os.geteuid()


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise RefusedFileError(path, f"it is {kind}, not a file", "name a file")


def sha256_file(path: Path, on_bytes: OnBytes = ignore_bytes) -> str:
    """SHA-256 of a file in lower-case hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


# Locking


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this name; its file is there while the context is open.

    Raises:
        BlockingIOError: another process or thread holds it.
        OSError: the file cannot be made; or what is there is no file, or another user's.
    """
    descriptor = _take(path)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                path.unlink()
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this name. For the moment of the look nobody else can take it."""
    try:
        if path.exists():
            with locked(path):
                pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _take(path: Path) -> int:
    while True:
        descriptor = open_file(path, os.O_RDWR | os.O_CREAT, follow=False)
        try:
            if not is_own(os.fstat(descriptor)):
                raise RefusedFileError(path, f"{path.name} belongs to another user", f"remove it, or {_ELSEWHERE}")
            _lock(descriptor)
            # The holder before may have removed the name between open and lock: then the lock is of no name.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as exc:
            raise BlockingIOError(exc.errno, exc.strerror) from exc
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Temporary folders that are recognised after a kill: by their owner, and by a mark in them. A folder of this name
# without a mark, of another user, or behind a link is never touched.


def make_own_folder(path: Path) -> None:
    """Make and mark a folder with permissions 0700: no other user can write into it. Raises OSError."""
    path.mkdir(0o700)
    (path / FOLDER_MARK).touch(0o600)


def is_own_folder(path: Path) -> bool:
    """Whether this is a folder that `make_own_folder` made for this user."""
    try:
        status, mark = path.lstat(), (path / FOLDER_MARK).lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and stat.S_ISREG(mark.st_mode) and is_own(status) and is_own(mark)


def remove_own_folder(path: Path, first: Sequence[str] = ()) -> None:
    """Delete such a folder with all that it holds. What takes its name meanwhile is left alone.

    Args:
        first: files that are deleted before anything else, as paths in it. The mark is deleted last.

    Raises:
        OSError: it cannot be deleted.
    """
    if not shutil.rmtree.avoids_symlink_attacks:  # Windows, where nothing can be deleted through a descriptor
        shutil.rmtree(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in first:
            with suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(name, dir_fd=descriptor)
        with os.scandir(descriptor) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name == FOLDER_MARK):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.name, dir_fd=descriptor)
                else:
                    os.unlink(entry.name, dir_fd=descriptor)
        if os.path.samestat(path.lstat(), os.fstat(descriptor)):
            path.rmdir()
    finally:
        os.close(descriptor)
