"""Temporary folders that are known again after a kill: by their owner, and by a mark in them.

A folder of this name that has no mark, or is another user's, or a link, is not ours, and never touched.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from normistral.files import is_own

MARK = ".made-by-normistral"


def make_own_folder(path: Path) -> None:
    """Make and mark a folder with permissions 0700: nobody else can put anything into it. Raises OSError."""
    path.mkdir(0o700)
    (path / MARK).touch(0o600)


def is_own_folder(path: Path) -> bool:
    """Whether this is a folder that `make_own_folder` made for this user."""
    try:
        status, mark = path.lstat(), (path / MARK).lstat()
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
            for entry in sorted(entries, key=lambda entry: entry.name == MARK):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.name, dir_fd=descriptor)
                else:
                    os.unlink(entry.name, dir_fd=descriptor)
        if os.path.samestat(path.lstat(), os.fstat(descriptor)):
            path.rmdir()
    finally:
        os.close(descriptor)
