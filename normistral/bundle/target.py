"""The machine that a bundle is for: which wheels pip may take, and what their markers mean there."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata

from normistral.errors import REINSTALL, UsageError

_OLDEST_GLIBC_MINOR = 5  # manylinux1
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600
_GLIBC = re.compile(r"manylinux_2_(\d+)_\w+")
_MINORS = range(100)  # of Python 3, to ask requires-python about


@dataclass(frozen=True, slots=True)
class Target:
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


def choose_target(python: str | None = None, platform_tag: str | None = None) -> Target:
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
    return Target(version, found[2], int(found[1]))


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
