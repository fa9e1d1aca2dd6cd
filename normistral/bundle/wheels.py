"""The platform that a bundle is for, and the wheels that an artifact needs there: found by pip, complete, described."""

from __future__ import annotations

import email.parser
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from pathlib import Path

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
