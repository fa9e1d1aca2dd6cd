"""The wheels that an artifact needs on the target: found by pip, checked to be complete, described."""

from __future__ import annotations

import email.parser
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from importlib.util import find_spec
from pathlib import Path

from normistral.bundle.target import Target
from normistral.errors import ArtifactError, DownloadError, MissingExtraError
from normistral.files import sha256_file

_ROUNDS = 5  # of requirements that only the target has; one has always been enough
_ASK = "see what pip says; --wheels FOLDER takes wheels that are there already"


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
    own: Path | None, extras: Sequence[str], version: str, target: Target, source: Path | None, into: Path
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
            metadata = email.parser.BytesParser().parsebytes(archive.read(name))
            unpacked = sum(entry.file_size for entry in archive.infolist())
        return Wheel(
            path, canonicalize_name(metadata["Name"]), metadata["Version"], sha256_file(path), unpacked, metadata
        )
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError) as exc:
        raise ArtifactError(f"{path.name} is not a whole wheel: {exc}", "get it again") from exc


def find_own_wheel(folder: Path, version: str) -> Path | None:
    """normistral's wheel in a folder of wheels, if it is of this version."""
    return next(iter(sorted(folder.glob(f"normistral-{version}-*.whl"))), None)


def _download(requirements: list[str], target: Target, source: Path | None, into: Path) -> None:
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


def _close(wheels: dict[str, Wheel], extras: Sequence[str], target: Target) -> tuple[Closure, set[str]]:
    """What is reached from normistral on the target, and the requirements that no wheel meets."""
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
