"""The wheel of normistral itself, made of the package that is running.

It may have been installed from a wheel, from a folder, or as editable: its code is always in the package's folder, and
what pip wrote about it in its .dist-info. So neither a network nor a build tool is needed, and what was tried here is
what arrives there. The same files give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import normistral
from normistral.errors import REINSTALL, UsageError

_NAME = "normistral"
_WHEEL = "Wheel-Version: 1.0\nGenerator: normistral bundle\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_COPIED = ("METADATA", "entry_points.txt", "top_level.txt")
_SOURCE_NAMES = {"METADATA": "PKG-INFO"}  # in the .egg-info that an editable installation leaves beside the source
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time that a zip file knows


def pack_own_wheel(into: Path) -> Path:
    """Write normistral-VERSION-py3-none-any.whl.

    Raises:
        UsageError: the package was never installed, or its source has changed what it requires since.
    """
    try:
        installed = distribution(_NAME)
    except PackageNotFoundError as exc:
        raise UsageError("normistral is not installed here, so it is not known what it requires", REINSTALL) from exc
    package = Path(normistral.__file__).parent
    _require_current(installed, package.parent / "pyproject.toml")
    return pack_wheel(package, installed, normistral.__version__, into)


def pack_wheel(package: Path, installed: Distribution, version: str, into: Path) -> Path:
    """Write a wheel of a folder of Python code and the metadata of its installation (PEP 427)."""
    info = f"{package.name}-{version}.dist-info"
    contents = {f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes() for path in _code(package)}
    for name in _COPIED:
        if text := installed.read_text(name) or installed.read_text(_SOURCE_NAMES.get(name, name)):
            contents[f"{info}/{name}"] = text.encode()
    for licence in installed.metadata.get_all("License-File") or []:
        text = installed.read_text(f"licenses/{licence}") or installed.read_text(licence)
        if text:
            contents[f"{info}/licenses/{licence}"] = text.encode()
    contents[f"{info}/WHEEL"] = _WHEEL.encode()
    contents = dict(sorted(contents.items()))
    lines = [f"{name},sha256={_record_hash(content)},{len(content)}\n" for name, content in contents.items()]
    contents[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    wheel = into / f"{package.name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, content)
    return wheel


def _code(package: Path) -> Iterator[Path]:
    """Its files, but for what was compiled: the wheel is for any system, and kernels travel beside it."""
    for path in package.rglob("*"):
        hidden = any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(package).parts)
        if path.is_file() and not hidden and path.suffix != ".so":
            yield path


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _require_current(installed: Distribution, project_file: Path) -> None:
    """An editable installation keeps the requirements of the day it was made."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if installed.version != normistral.__version__:
        raise UsageError(f"normistral {normistral.__version__} was installed as {installed.version}", REINSTALL)
    if not project_file.is_file():
        return
    project = tomllib.loads(project_file.read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        declared += [f'{requirement}; extra == "{extra}"' for requirement in requirements]
    same_python = SpecifierSet(project["requires-python"]) == SpecifierSet(
        next(iter(installed.metadata.get_all("Requires-Python") or ()), "")
    )
    needed, noted = ({str(Requirement(line)) for line in lines} for lines in (declared, installed.requires or []))
    if needed != noted or not same_python:
        raise UsageError("normistral requires other packages now than when it was installed", REINSTALL)
