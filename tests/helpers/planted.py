"""What others may have planted where a file is to be written, and a look at everything in a folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others; CI runs as root")


def plant(path: Path, kind: str) -> Path:
    """Something that is no file, under this name."""
    if kind == "link":
        target = path.with_name("target")
        target.write_text("of others")
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # as /dev/zero
    return path


def look(folder: Path) -> dict[str, tuple[int, int, int, bytes | str]]:
    """Kind, owner, inode and content of everything in a folder."""
    found: dict[str, tuple[int, int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = b""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = (status.st_mode, status.st_uid, status.st_ino, content)
    return found


KINDS = ["link", "dangling link", "circle", "fifo", "folder", "socket", pytest.param("device", marks=AS_ROOT)]
