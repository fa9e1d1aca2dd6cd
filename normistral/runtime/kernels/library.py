"""The compiled int4 kernel: whether this machine can run it, where it lies, and how it is made.

It is compiled on the machine itself, in seconds, against the headers that OpenVINO's own wheel brings. One file for
each version of OpenVINO, set of instructions and source, beside the local store. Its SHA-256 stands behind its last
byte, where the loader does not look: loading a file that was cut short would end the process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from normistral import store
from normistral.errors import EngineError, ResourceError
from normistral.hardware import Machine

_SOURCE = Path(__file__).with_name("int4_matmul.cpp")
_INCLUDED = ("int4_arrays.hpp", "int4_avx512.hpp", "int4_avx2.hpp")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")


class Variant(NamedTuple):
    """The kernel for one set of instructions: those of the processor, by their names in /proc/cpuinfo."""

    name: str
    needed: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = Variant("avx2", frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c"))
_AVX_VNNI = Variant("avxvnni", _AVX2.needed | {"avx_vnni"}, (*_AVX2.flags, "-mavxvnni"))
_AVX512 = Variant(
    "avx512",
    _AVX2.needed | {"avx512f", "avx512bw", "avx512_vnni"},
    (*_AVX2.flags, "-mavx512f", "-mavx512bw", "-mavx512vnni"),
)
VARIANTS = (_AVX512, _AVX_VNNI, _AVX2)  # the fastest first
_COMPILE_S = 300
_DIGEST_BYTES = hashlib.sha256().digest_size
_HINT = "install a C++ compiler (g++ or clang++), or name one in CXX"


def find_obstacle(machine: Machine) -> str | None:
    """Why the kernel cannot run on this machine, in a few words; None where it can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return "it is written for Linux on x86-64"
    missing = sorted(_AVX2.needed - machine.instruction_sets)
    return f"the processor lacks {', '.join(missing)}" if missing else None


def library_path(machine: Machine) -> Path:
    """Where the kernel for this machine and the installed OpenVINO belongs; it need not be there."""
    return store.kernels_dir() / _file_name(_variant(machine))


def _file_name(variant: Variant) -> str:
    source = hashlib.sha256()
    for name in (_SOURCE.name, *_INCLUDED):
        source.update(_SOURCE.with_name(name).read_bytes())
    return f"int4-openvino-{version('openvino')}-{variant.name}-{source.hexdigest()[:12]}.so"


def _variant(machine: Machine) -> Variant:
    return next(variant for variant in VARIANTS if machine.instruction_sets >= variant.needed)


def find_library(machine: Machine) -> Path | None:
    """The compiled kernel, if it is there and can run here."""
    if find_obstacle(machine) is not None:
        return None
    path = library_path(machine)
    return path if path.is_file() else None


def check_library(path: Path) -> None:
    """See that the file is as it was compiled.

    Raises:
        EngineError: it is damaged, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise EngineError(f"cannot read {path}: {exc.strerror}", "check its permissions") from exc
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise EngineError(f"{path} is damaged", "make it again: normistral build-kernel")


def build_library(machine: Machine) -> Path:
    """Compile the kernel; one that is there already is replaced once the new one is whole.

    Raises:
        EngineError: it cannot run here, there is no compiler, or the compiler fails.
        ResourceError: the store cannot be written to.
    """
    if obstacle := find_obstacle(machine):
        raise EngineError(f"the int4 kernel is of no use here: {obstacle}", "OpenVINO's own products serve")
    path = library_path(machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
            _compile_whole(_variant(machine), Path(scratch)).replace(path)
    except OSError as exc:
        raise ResourceError(f"cannot write {path}: {exc.strerror}", "set NORMISTRAL_HOME to another folder") from exc
    return path


def build_for_others(folder: Path) -> list[Path]:
    """Compile the kernel for every processor that there is one for, into a folder.

    Raises:
        EngineError: there is no compiler, or it fails.
    """
    return [_compile_whole(variant, folder) for variant in VARIANTS]


def _compile_whole(variant: Variant, folder: Path) -> Path:
    """The library with its digest behind it; the same compiler makes the same bytes."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise EngineError("there is no C++ compiler", _HINT)
    made = folder / _file_name(variant)
    _compile(compiler, variant, made)
    digest = hashlib.sha256(made.read_bytes()).digest()
    with made.open("ab") as file:
        file.write(digest)
    return made


def _compile(compiler: str, variant: Variant, output: Path) -> None:
    found = importlib.util.find_spec("openvino")
    assert found is not None
    assert found.origin is not None
    openvino = Path(found.origin).parent
    libraries = [_newest(openvino / "libs", name) for name in ("libopenvino.so", "libtbb.so")]
    include = openvino / "include"
    if not include.is_dir() or not all(libraries):
        raise EngineError("this OpenVINO came without headers", "install the one from PyPI: pip install openvino")
    command = [compiler, *_FLAGS, *variant.flags, str(_SOURCE), f"-I{include}", f"-L{openvino / 'libs'}"]
    command += [f"-fmacro-prefix-map={folder}/=" for folder in (_SOURCE.parent, include)]  # what assertions name
    command += [f"-l:{name}" for name in libraries]
    try:
        done = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, encoding="utf-8", errors="replace", timeout=_COMPILE_S
        )
    except subprocess.TimeoutExpired as exc:
        raise EngineError(
            f"{compiler} did not finish in {_COMPILE_S} seconds", "try again on a quieter machine"
        ) from exc
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.search(r"\berror\b", line)]
        raise EngineError(f"{compiler} failed: {(errors or ['it says nothing'])[0]}", _HINT)


def _newest(folder: Path, name: str) -> str:
    """The library with its version behind the name, as the loader wants it; "" if it is not there."""
    return max((path.name for path in folder.glob(f"{name}.*")), default="")
