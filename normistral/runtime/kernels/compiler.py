"""Compiling the int4 kernel, for each kind of processor, against the headers that OpenVINO's wheel brings.

The build of this package's own wheels loads this file by its path (scripts/build_backend.py), where nothing of the
package can be imported yet: the standard library has to be enough.

A kernel's SHA-256 stands behind its last byte, where the loader does not look.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

DIGEST_BYTES = hashlib.sha256().digest_size
_SOURCE = Path(__file__).with_name("int4_matmul.cpp")
_INCLUDED = (
    "old_runtime.hpp",
    "int4_arrays.hpp",
    "int4_avx512.hpp",
    "int4_avx2.hpp",
    "int8_arrays.hpp",
    "int8_avx512.hpp",
    "int8_avx2.hpp",
)
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_COMPILE_S = 300
_HINT = "install a C++ compiler (g++ or clang++), or name one in CXX"


class CompileError(Exception):
    """No kernel could be compiled; reason and hint are one line each."""

    def __init__(self, message: str, hint: str = _HINT) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


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


def is_supported_platform() -> bool:
    """Whether the kernel can be compiled for this system at all; it is written for Linux on x86-64."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


def file_name(variant: Variant) -> str:
    """A name of its own for each installed version of OpenVINO, set of instructions and source."""
    source = hashlib.sha256()
    for name in (_SOURCE.name, *_INCLUDED):
        source.update(_SOURCE.with_name(name).read_bytes())
    return f"int4-openvino-{version('openvino')}-{variant.name}-{source.hexdigest()[:12]}.so"


def find_compiler() -> str:
    """The path of CXX, or of c++ where that is not set.

    Raises:
        CompileError: it is not there.
    """
    named = os.environ.get("CXX")
    found = shutil.which(named or "c++")
    if found is None:
        raise CompileError(f"CXX names {named}, which is not there" if named else "there is no C++ compiler")
    return found


def compile_kernels(variants: Sequence[Variant], folder: Path) -> list[Path]:
    """Compile these into a folder, at the same time; the same compiler makes the same bytes.

    Raises:
        CompileError: there is no compiler, or it fails; or OpenVINO's headers are not there.
    """
    compiler, openvino = find_compiler(), _find_openvino()
    with ThreadPoolExecutor() as threads:
        made = [folder / file_name(variant) for variant in variants]
        list(threads.map(lambda variant, path: _compile(compiler, openvino, variant, path), variants, made))
    for path in made:
        digest = hashlib.sha256(path.read_bytes()).digest()
        with path.open("ab") as file:
            file.write(digest)
    return made


def compile_into(folder: Path) -> None:
    """Compile every variant, in the place of what the folder holds.

    Raises:
        CompileError: as `compile_kernels`; the folder is as it was.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = compile_kernels(VARIANTS, Path(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in made:
            shutil.copyfile(path, folder / path.name)


def _find_openvino() -> Path:
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        raise CompileError("OpenVINO is not installed", "pip install openvino")
    return Path(found.origin).parent


def _compile(compiler: str, openvino: Path, variant: Variant, output: Path) -> None:
    libraries = [_newest(openvino / "libs", name) for name in ("libopenvino.so", "libtbb.so")]
    include = openvino / "include"
    if not include.is_dir() or not all(libraries):
        raise CompileError("this OpenVINO came without headers", "install the one from PyPI: pip install openvino")
    command = [compiler, *_FLAGS, *variant.flags, str(_SOURCE), f"-I{include}", f"-L{openvino / 'libs'}"]
    command += [f"-fmacro-prefix-map={folder}/=" for folder in (_SOURCE.parent, include)]  # what assertions name
    command += [f"-l:{name}" for name in libraries]
    try:
        done = subprocess.run(
            [*command, "-o", str(output)], capture_output=True, encoding="utf-8", errors="replace", timeout=_COMPILE_S
        )
    except subprocess.TimeoutExpired as exc:
        raise CompileError(
            f"{compiler} did not finish in {_COMPILE_S} seconds", "try again on a quieter machine"
        ) from exc
    except OSError as exc:
        raise CompileError(f"{compiler} cannot be started: {exc.strerror}") from exc
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.search(r"\berror\b", line)]
        raise CompileError(f"{compiler} failed: {(errors or ['it says nothing'])[0]}")


def _newest(folder: Path, name: str) -> str:
    """The library with its version behind the name, as the loader wants it; "" if it is not there."""
    return max((path.name for path in folder.glob(f"{name}.*")), default="")
