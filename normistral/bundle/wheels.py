"""The platform that a bundle is for, and the wheels that an artifact needs there: found by pip, complete, described."""

from __future__ import annotations

import base64
import email.parser
import hashlib
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution, metadata
from importlib.util import find_spec
from pathlib import Path

import normistral
from normistral.errors import REINSTALL, ArtifactError, DownloadError, MissingExtraError, UsageError
from normistral.files import sha256_file

_ROUNDS = 5  # of requirements that only the target has; one has always been enough
_ASK = "see what pip says; --wheels FOLDER takes wheels that are there already"
_OLDEST_GLIBC_MINOR = 5  # manylinux1
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600
_GLIBC = re.compile(r"manylinux_2_(\d+)_\w+")
_MINORS = range(100)  # of Python 3, to ask requires-python about


@dataclass(frozen=True, slots=True)
class TargetPlatform:
    """Linux with glibc, and one version of CPython.

    Attributes:
        python: such as "3.11".
        machine: as `platform.machine` says it there.
        glibc_minor: wheels may need glibc 2.X up to this one.
    """

    python: str
    machine: str
    glibc_minor: int

    @property
    def tag(self) -> str:
        """Its platform tag (PEP 600)."""
        return f"manylinux_2_{self.glibc_minor}_{self.machine}"

    def pip_options(self) -> list[str]:
        """pip's options for wheels of this target. It takes a newer platform tag for none of the older ones."""
        options = ["--only-binary", ":all:", "--implementation", "cp", "--python-version", self.python]
        for minor in range(self.glibc_minor, _OLDEST_GLIBC_MINOR - 1, -1):
            options += ["--platform", f"manylinux_2_{minor}_{self.machine}"]
            if minor in _OLD_NAMES:
                options += ["--platform", f"{_OLD_NAMES[minor]}_{self.machine}"]
        return options

    def marker_environment(self) -> dict[str, str]:
        """Values of environment markers (PEP 508). Of the Python only the minor version is known: its first release."""
        return {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "platform_release": "",
            "platform_version": "",
        }


def choose_target(python: str | None = None, platform_tag: str | None = None) -> TargetPlatform:
    """The target that a user asks for; None is what this machine has.

    Raises:
        UsageError: another Python than normistral runs on, or no platform tag of Linux with glibc.
    """
    version = "{}.{}".format(*sys.version_info) if python is None else python
    if version not in (pythons := supported_pythons()):
        raise UsageError(f"normistral does not run on Python {version}", f"choose one of {', '.join(pythons)}")
    tag = _tag_of_this_machine() if platform_tag is None else platform_tag
    found = re.fullmatch(r"manylinux_2_(\d{1,3})_(x86_64|aarch64)", tag)
    if found is None or int(found[1]) < _OLDEST_GLIBC_MINOR:
        raise UsageError(
            f"{tag} is not a platform that a bundle can be for",
            "name the glibc and the processor, as in manylinux_2_34_x86_64 (ldd --version says which glibc)",
        )
    return TargetPlatform(version, found[2], int(found[1]))


def supported_pythons() -> tuple[str, ...]:
    """The versions of Python that requires-python of pyproject.toml allows, as the installation has noted them.

    Raises:
        UsageError: the package was never installed.
    """
    from packaging.specifiers import SpecifierSet

    try:
        allowed = SpecifierSet(metadata("normistral")["Requires-Python"])
    except PackageNotFoundError as exc:
        raise UsageError("normistral is not installed here, so it is not known what it requires", REINSTALL) from exc
    return tuple(python for python in (f"3.{minor}" for minor in _MINORS) if python in allowed)


def needed_glibc_minor(platform_tags: Iterable[str]) -> int:
    """The least that one of a wheel's tags asks for; 0 for a wheel of Python alone."""
    minors = []
    for tag in platform_tags:
        for minor, name in _OLD_NAMES.items():
            if tag.startswith(f"{name}_"):
                minors.append(minor)
        if found := _GLIBC.fullmatch(tag):
            minors.append(int(found[1]))
    return min(minors, default=0)


def _tag_of_this_machine() -> str:
    library, version = platform.libc_ver()
    if platform.system() != "Linux" or library != "glibc":
        return f"{platform.system()} {platform.machine()}"
    return f"manylinux_{version.replace('.', '_')}_{platform.machine()}"


@dataclass(frozen=True)
class Wheel:
    """A wheel, and what it says about itself.

    Attributes:
        name: as PyPI normalises it.
        unpacked_bytes: of its files.
        metadata: its METADATA file.
    """

    path: Path
    name: str
    version: str
    sha256: str
    unpacked_bytes: int
    metadata: Message


@dataclass(frozen=True)
class Closure:
    """Wheels of which none is missing and none too many, by name; and which requires which."""

    wheels: dict[str, Wheel]
    requires: dict[str, tuple[str, ...]]


def collect_wheels(
    own: Path | None, extras: Sequence[str], version: str, target: TargetPlatform, source: Path | None, into: Path
) -> Closure:
    """Everything that `normistral[extras]` needs on the target, and pip to install it.

    Args:
        own: normistral's wheel; None takes the one in `source`.
        source: a folder of wheels; None has pip ask its index.
        into: an empty folder for the wheels.

    Raises:
        DownloadError: pip found no such set of wheels.
        MissingExtraError: there is no pip.
        ArtifactError: a wheel is damaged.
    """
    asked = f"[{','.join(extras)}]" if extras else ""
    requirements = [f"normistral{asked}=={version}" if own is None else f"{own}{asked}", "pip"]
    for _ in range(_ROUNDS):
        _download(requirements, target, source, into)
        wheels = {wheel.name: wheel for wheel in map(read_wheel, sorted(into.glob("*.whl")))}
        closure, missing = _close(wheels, extras, target)
        if not missing:
            return closure
        # pip reads markers as if the target were this machine.
        requirements += sorted(missing)
    raise DownloadError(f"no set of wheels was found with {', '.join(sorted(missing))}", _ASK)


def read_wheel(path: Path) -> Wheel:
    """Raises ArtifactError if it is no wheel."""
    from packaging.utils import canonicalize_name

    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
            described = email.parser.BytesParser().parsebytes(archive.read(name))
            unpacked = sum(entry.file_size for entry in archive.infolist())
        return Wheel(
            path, canonicalize_name(described["Name"]), described["Version"], sha256_file(path), unpacked, described
        )
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as exc:
        raise ArtifactError(f"{path.name} is not a whole wheel: {exc}", "get it again") from exc


def find_own_wheel(folder: Path, version: str) -> Path | None:
    """normistral's wheel in a folder of wheels, if it is of this version."""
    return next(iter(sorted(folder.glob(f"normistral-{version}-*.whl"))), None)


def _download(requirements: list[str], target: TargetPlatform, source: Path | None, into: Path) -> None:
    if find_spec("pip") is None:
        raise MissingExtraError("this environment has no pip, which finds the wheels", "python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    if source is not None:
        command += ["--isolated", "--no-index", "--find-links", str(source)]
    done = subprocess.run(
        [*command, *target.pip_options(), "--dest", str(into), *requirements],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["nothing"])[-1]
        raise DownloadError(f"pip found no wheels for Python {target.python} on {target.tag}: {reason}", _ASK)


def _close(wheels: dict[str, Wheel], extras: Sequence[str], target: TargetPlatform) -> tuple[Closure, set[str]]:
    """The wheels that normistral needs on the target, and the requirements that no wheel meets."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    requires: dict[str, tuple[str, ...]] = {"pip": ()}
    missing: set[str] = set()
    waiting = [("normistral", frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        found = []
        for line in wheels[name].metadata.get_all("Requires-Dist") or []:
            requirement = Requirement(line)
            environments = [target.marker_environment() | {"extra": extra} for extra in ("", *wanted)]
            if requirement.marker is not None and not any(map(requirement.marker.evaluate, environments)):
                continue
            other = canonicalize_name(requirement.name)
            if other not in wheels or not requirement.specifier.contains(wheels[other].version, prereleases=True):
                requirement.marker = None
                missing.add(str(requirement))
                continue
            found.append(other)
            if (node := (other, frozenset(requirement.extras))) not in seen:
                seen.add(node)
                waiting.append(node)
        requires[name] = tuple(sorted({*requires.get(name, ()), *found} - {name}))
    return Closure({name: wheels[name] for name in sorted(requires) if name in wheels}, requires), missing


# The wheel of normistral itself, made of the package that is running. It may have been installed from a wheel, from a
# folder, or as editable: its code is always in the package's folder, and what pip wrote about it in its .dist-info. So
# neither a network nor a build tool is needed, and what was tried here is what arrives there. The same files give the
# same bytes.

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
