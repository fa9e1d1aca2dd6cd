"""Builds normistral with setuptools, and compiles its int4 kernels into the wheel where that can be done.

The kernel has no Python ABI: with it the wheel is py3-none-linux_x86_64 (`auditwheel` finds the manylinux tag), without
it py3-none-any. OpenVINO's headers are a requirement of the build only where a kernel is built. NORMISTRAL_KERNELS says
whether it is: `auto` (default: if there is a compiler, on Linux x86-64), `require` or `none`.

The package's description is README.md with links that work elsewhere: below `Source` of pyproject's project.urls where
there is one, and otherwise without links to files.
"""

from __future__ import annotations

import importlib.util
import os
import posixpath
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  hooks that are as they are
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent.parent
_KERNELS = Path("normistral", "runtime", "kernels")
_COMPILED = "compiled"
_MODES = ("auto", "require", "none")
# Markdown: ![text](target) or [text](target), where the target is no address; and comments.
_RELATIVE = re.compile(r"(!?)\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")
_COMMENT = re.compile(r"^<!--.*?-->\n", re.DOTALL | re.MULTILINE)
_NO_ADDRESS = """
The files that this text speaks of (README.md with pictures, docs/, examples/) are in the source distribution, because
the project has no public address yet.
"""


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What the build of a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _kernel_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable installation needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _kernel_requirements()


def describe(readme: str, version: str, source: str | None) -> str:
    """README.md as the package's description: links below the tag of this version at `source`, a repository's address.

    Without an address links become their texts, pictures go, and a line says where the files are.
    """
    readme = _COMMENT.sub("", readme)
    if source is None:
        return _RELATIVE.sub(lambda link: "" if link[1] else link[2], readme) + _NO_ADDRESS

    def absolute(link: re.Match[str]) -> str:
        view = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({source.rstrip('/')}/{view}/v{version}/{posixpath.normpath(link[3])})"

    return _RELATIVE.sub(absolute, readme)


class EggInfo(egg_info):
    """Metadata whose description can be read outside of the repository."""

    def run(self) -> None:
        """As setuptools runs it."""
        urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        metadata = self.distribution.metadata
        metadata.long_description = describe(readme, metadata.version, urls.get("Source"))
        super().run()


class BuildPy(build_py):
    """Copies the package, and compiles the kernels; in an editable installation into the source itself."""

    compiled = False

    def run(self) -> None:
        """As setuptools runs it."""
        super().run()
        root = ROOT if self.editable_mode else Path(self.build_lib)
        BuildPy.compiled = _compile_kernels(root / _KERNELS / _COMPILED)


class KernelWheel(bdist_wheel):
    """A wheel for any Python, and for this system if there are kernels in it."""

    def run(self) -> None:
        """As setuptools runs it; the package is built first, because its place and tag depend on that."""
        self.run_command("build")
        if BuildPy.compiled:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # else setuptools puts all of it under purelib
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        python, abi, system = super().get_tag()
        return (python, abi, system) if self.root_is_pure else ("py3", "none", system)


def _mode() -> str:
    mode = os.environ.get("NORMISTRAL_KERNELS", "auto")
    if mode not in _MODES:
        raise SystemExit(f"error: NORMISTRAL_KERNELS is {mode!r}\nhint: say one of {', '.join(_MODES)}")
    return mode


def _compiler() -> ModuleType:
    """normistral/runtime/kernels/compiler.py, without the package, whose requirements are not here."""
    spec = importlib.util.spec_from_file_location("normistral_compiler", ROOT / _KERNELS / "compiler.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernel_requirements() -> list[str]:
    """OpenVINO as the package pins it, where its headers will be used."""
    compiler = _compiler()
    if _mode() == "none" or not compiler.is_supported_platform():
        return []
    try:
        compiler.find_compiler()
    except compiler.CompileError:
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [requirement for requirement in project["dependencies"] if requirement.startswith("openvino")]


def _compile_kernels(folder: Path) -> bool:
    """Whether they were compiled into this folder, and one line that says why not."""
    if (mode := _mode()) == "none":
        return False
    compiler = _compiler()
    try:
        if not compiler.is_supported_platform():
            raise compiler.CompileError("the int4 kernel is written for Linux on x86-64", "build on such a machine")
        compiler.compile_into(folder)
    except compiler.CompileError as exc:
        if mode == "require":
            raise SystemExit(f"error: no int4 kernel: {exc.message}\nhint: {exc.hint}") from exc
        print(f"without the compiled int4 kernel, OpenVINO's own products will serve: {exc.message} ({exc.hint})")
        return False
    return True
