"""Folders that are made once for all processes of a test run; every process gets a copy of its own."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A copy of the folder that `make(path)` writes, in the first process of pytest-xdist that asks for `name`.

    Others wait for it. What `make` raises is raised in each of them, which tries again.
    """
    own = factory.mktemp(name) / "artifacts" / name
    if "PYTEST_XDIST_WORKER" not in os.environ:
        make(own)
        return own
    common = factory.getbasetemp().parent / "shared"
    common.mkdir(exist_ok=True)
    with (common / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made, partial = common / name, common / f"{name}.partial"
        if not made.exists():
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(made)
    shutil.copytree(made, own)
    return own
