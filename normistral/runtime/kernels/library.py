"""The compiled int4 kernel: support by this machine, location, and checks before it is loaded.

The package may bring it (`compiled` beside this file: its wheels for Linux, and an installation from source where there
was a compiler); else `normistral build-kernel` puts it beside the local store. One of the package is trusted as the
package's Python is. One of the store is code that any program may have put there: it has to belong to this user or to
root, in a folder that no other user may write to. What was checked is what is loaded, because both go by a descriptor.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from normistral.artifact import store
from normistral.errors import EngineError, ResourceError
from normistral.hardware import Machine, read_machine
from normistral.runtime.engines.settings import ENGINES_KERNEL, INT4_KERNEL
from normistral.runtime.kernels.compiler import (
    DIGEST_BYTES,
    VARIANTS,
    CompileError,
    Variant,
    compile_kernels,
    file_name,
    find_compiler,
    is_supported_platform,
)

PACKAGED = Path(__file__).with_name("compiled")
BUILD = "normistral build-kernel"


@dataclass(frozen=True, slots=True)
class Library:
    """A compiled kernel that may be loaded.

    Attributes:
        path: where it was found.
        loadable: the same bytes by the descriptor that they were checked through; it stays open with this process.
    """

    path: Path
    loadable: str


class UntrustedKernelError(EngineError):
    """Another user could have written the kernel."""


def find_obstacle(machine: Machine) -> str | None:
    """Reason why the kernel cannot run on this machine; None where it can."""
    if not is_supported_platform():
        return "it is written for Linux on x86-64"
    missing = sorted(VARIANTS[-1].needed - machine.instruction_sets)
    return f"the processor lacks {', '.join(missing)}" if missing else None


def library_path(machine: Machine) -> Path:
    """Where `build-kernel` puts the kernel for this machine and the installed OpenVINO; it need not be there."""
    return store.kernels_dir() / _file_name(machine)


def find_library(machine: Machine) -> Path | None:
    """The compiled kernel, if it is there and can run here: the package's, or else the store's."""
    if find_obstacle(machine) is not None:
        return None
    paths = (PACKAGED / _file_name(machine), library_path(machine))
    return next((path for path in paths if path.is_file()), None)


def is_packaged(path: Path) -> bool:
    """Whether a kernel came with the package."""
    return path.parent == PACKAGED


def packaged_for() -> str | None:
    """The version of OpenVINO that the package's kernels are for, if it is another than the installed one."""
    found = {path.name.split("-")[2] for path in PACKAGED.glob("int4-openvino-*.so")}
    return None if not found or version("openvino") in found else max(found)


def describe_absence() -> str:
    """Reason why a machine that could run the kernel has none."""
    if others := packaged_for():
        return f"the package's int4 kernel is for OpenVINO {others}, and {version('openvino')} is installed"
    return "there is no compiled int4 kernel"


def open_library(path: Path) -> Library:
    """Check a kernel file and keep the checked descriptor open.

    Raises:
        UntrustedKernelError: another user may have written it.
        EngineError: it is damaged, or cannot be read.
    """
    return _open_library(path, _identity(path))


_loadable: dict[bytes, str] = {}  # by the SHA-256 of its content, as loaded into this process


@cache
def _open_library(path: Path, identity: tuple[int, ...]) -> Library:
    """Once for each file: its descriptor stays open, so that its number means no other file to the loader.

    Copies are loaded once: openvino_genai has one core for the process, which would take the operator of the one and
    the weights of the other.
    """
    with _translated(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not is_packaged(path):
            _require_ours(path, descriptor)
        with _translated(path), os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read()
        if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
            raise EngineError(f"{path} is damaged", f"make it again: {BUILD}")
    except EngineError:
        os.close(descriptor)
        raise
    content = hashlib.sha256(data).digest()
    if content in _loadable:
        os.close(descriptor)
        return Library(path, _loadable[content])
    by_descriptor = f"/proc/self/fd/{descriptor}"
    if not Path(by_descriptor).exists():  # no /proc: only what is trusted by its place can be loaded by its name
        os.close(descriptor)
        if not is_packaged(path):
            raise UntrustedKernelError(f"{path} cannot be loaded as it was checked", "mount /proc")
        by_descriptor = str(path)
    return Library(path, _loadable.setdefault(content, by_descriptor))


def build_library(machine: Machine) -> Path:
    """Compile the kernel into the store; one that is there already is replaced once the new one is whole.

    Raises:
        EngineError: it cannot run here, there is no compiler, or the compiler fails.
        ResourceError: the store cannot be written to.
    """
    if obstacle := find_obstacle(machine):
        raise EngineError(f"the int4 kernel is of no use here: {obstacle}", "OpenVINO's own products serve")
    path = library_path(machine)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            (made,) = _compile([variant_of(machine)], Path(scratch))
            made.chmod(0o755)  # whatever the umask: others' writing would make it untrusted
            made.replace(path)
        _require_ours(path, None)
    except OSError as exc:
        raise ResourceError(f"cannot write {path}: {exc.strerror}", "set NORMISTRAL_HOME to another folder") from exc
    return path


def collect_for_others(folder: Path) -> list[Path]:
    """The kernel for every processor that there is one for: the package's own, or compiled into a folder.

    Raises:
        EngineError: there is no compiler, or it fails.
    """
    packaged = [PACKAGED / file_name(variant) for variant in VARIANTS]
    return packaged if all(path.is_file() for path in packaged) else _compile(VARIANTS, folder)


def _compile(variants: Sequence[Variant], folder: Path) -> list[Path]:
    try:
        return compile_kernels(variants, folder)
    except CompileError as exc:
        raise EngineError(exc.message, exc.hint) from exc


def variant_of(machine: Machine) -> Variant:
    """The fastest that the processor can run; it has to run one."""
    return next(variant for variant in VARIANTS if machine.instruction_sets >= variant.needed)


def _file_name(machine: Machine) -> str:
    return file_name(variant_of(machine))


def require_ours(places: Iterable[tuple[Path, os.stat_result]], hint: str) -> None:
    """Raise UntrustedKernelError unless only this user and root may write to a file and its folder."""
    for place, status in places:
        if status.st_uid not in (os.geteuid(), 0):
            raise UntrustedKernelError(f"{place} belongs to another user", f"remove it, {hint}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UntrustedKernelError(f"others may write to {place}", f"chmod go-w {place}, {hint}")


def _require_ours(path: Path, descriptor: int | None) -> None:
    with _translated(path):
        found = path.parent.stat(), path.stat() if descriptor is None else os.fstat(descriptor)
    require_ours(zip((path.parent, path), found, strict=True), f"then: {BUILD}")


def _identity(path: Path) -> tuple[int, ...]:
    with _translated(path):
        status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise EngineError(f"cannot read {path}: {exc.strerror}", "check its permissions") from exc


def name_faster_way(settings: Mapping[str, str], overrides: Mapping[str, str] | None = None) -> str | None:
    """One line on how to get the faster int4 kernel; None where it serves, cannot, or was refused by the user.

    Args:
        settings: those in force.
        overrides: names of those that the user chose.
    """
    if settings.get(INT4_KERNEL) != ENGINES_KERNEL or INT4_KERNEL in (overrides or {}):
        return None
    machine = read_machine()
    if find_obstacle(machine) is not None or find_library(machine) is not None:  # one that was refused was told
        return None
    if others := packaged_for():
        return (
            f"OpenVINO {version('openvino')} is installed, and the faster int4 kernel here is for {others}: "
            f"pip install openvino=={others}"
        )
    return f"a faster int4 kernel can be had: {how_to_build()}"


def how_to_build() -> str:
    """The command that builds the kernel, and what has to be installed for it."""
    try:
        find_compiler()
    except CompileError as exc:
        return f"{exc.hint} (on Debian: apt install g++), then: {BUILD}"
    return f"{BUILD} (some seconds, once)"
