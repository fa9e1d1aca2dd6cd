"""Installs a bundle of normistral where there is Python, and neither a network nor anything else.

    python3 -I install.py BUNDLE --signers FILE [--prefix FOLDER]

Nothing is unpacked before every byte of the bundle was checked: the signature over the whole file (by ssh-keygen), the
form of the archive, and every file against the list SHA256SUMS. What is unpacked is compared with that list again.

PREFIX is laid out as normistral's own store: artifacts/NAME, kernels/, runtimes/VERSION-HASH (a virtual environment),
and bin/normistral, which is written last. Temporary folders and runtimes have a mark in them; nothing without it is
ever deleted. A copy of this file is in every bundle; it needs the standard library alone.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normistral.bundle.check import (
    ARTIFACT,
    KERNELS,
    READ_BYTES,
    WHEELS,
    Bundle,
    InstallError,
    check_bundle,
    damaged,
    is_member_name,
    sums_line,
)

_WHOLE = ".whole"  # the last file of a runtime to be written
_STAGING = ".installing-"
_MARK = ".made-by-normistral"  # the first file of whatever folder may be deleted again
_LOAD = "import ctypes, openvino, sys; ctypes.CDLL(sys.argv[1])"


# Installing


def install(bundle: Bundle, prefix: Path, name: str) -> Path:
    """Install a checked bundle; what fails or is interrupted leaves PREFIX as it was.

    Args:
        name: of the artifact.

    Returns:
        The command.

    Raises:
        InstallError: this machine is another than the bundle is for, there is another artifact of this name, or too
            little disk; PREFIX is or holds somebody else's; or the runtime does not work.
    """
    require_machine(bundle.description)
    prefix = _absolute(prefix)
    artifact, runtime = prefix / "artifacts" / name, prefix / "runtimes" / _runtime_name(bundle)
    for folder in (prefix, artifact.parent, runtime.parent, prefix / "bin"):
        _make_folder(folder)
    with _locked(prefix):
        _remove_leftovers(prefix)
        there = _is_there(bundle, artifact)
        free = shutil.disk_usage(prefix).free
        if not there and free < bundle.description["bytes"]:
            needed = f"{bundle.description['bytes'] / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            raise InstallError(
                f"the disk of {prefix} is too full: {needed}", "free some space, or give another --prefix"
            )
        _require_usable(runtime)
        try:
            with _staging(artifact.parent) as folder:
                staged = folder / name
                if not there:
                    _unpack(bundle, ARTIFACT, staged)
                if not (runtime / _WHOLE).exists():
                    runtime.mkdir()
                    (runtime / _MARK).touch()
                    _make_runtime(bundle, runtime)
                _say("trying it")
                tried = artifact if there else staged
                _run([runtime / "bin" / "normistral", "doctor", tried], prefix, "does not run here")
                _add_kernels(bundle, prefix, runtime)
                os.sync()  # should the power fail, names come after contents
                if not there:
                    staged.rename(artifact)
                (runtime / _WHOLE).touch()
                return _write_command(prefix, runtime)
        finally:
            _remove_leftovers(prefix)


def require_machine(description: dict[str, Any]) -> None:
    """Raises InstallError unless the wheels are for this Python and this machine."""
    python = "{}.{}".format(*sys.version_info)
    if python != description["python"]:
        raise InstallError(
            f"the bundle is for Python {description['python']}; this is {python}",
            f"run it with python{description['python']}, or make a bundle for another Python (--python-version)",
        )
    here = f"{platform.system()} {platform.machine()}"
    if here != f"Linux {description['machine']}":
        raise InstallError(
            f"the bundle is for Linux {description['machine']}; this is {here}", "make a bundle for this machine"
        )
    library, version = platform.libc_ver()
    if library != "glibc" or _numbers(version) < _numbers(description["glibc"]):
        raise InstallError(
            f"the bundle needs glibc {description['glibc']}; this system has {library} {version}".rstrip(),
            f"make a bundle with --platform manylinux_{version.replace('.', '_')}_{description['machine']}"
            if library == "glibc"
            else "use a system with glibc",
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _runtime_name(bundle: Bundle) -> str:
    """Version and hash of the wheels, so that bundles of several artifacts share one runtime."""
    wheels = "".join(sums_line(m.sha256, n) for n, m in sorted(bundle.members.items()) if n.startswith(WHEELS))
    version = bundle.description["requirement"].rpartition("==")[2]
    return f"{version}-{hashlib.sha256(wheels.encode()).hexdigest()[:12]}"


def _is_there(bundle: Bundle, artifact: Path) -> bool:
    """True if PREFIX holds just this artifact already."""
    if not os.path.lexists(artifact):
        return False
    for name, member in bundle.members.items():
        path = artifact / name.removeprefix(ARTIFACT)
        if name.startswith(ARTIFACT) and (not path.is_file() or _sha256(path) != member.sha256):
            raise InstallError(
                f"{artifact} is there already, and is not what the bundle holds", "give another --name, or remove it"
            )
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(bundle: Bundle, folder: str, target: Path) -> None:
    """Write the files of one folder of the archive, comparing each with the list once more."""
    _say(f"unpacking {folder.rstrip('/')}")
    target.mkdir()
    with bundle.path.open("rb") as stream:
        for name, member in bundle.members.items():
            if not name.startswith(folder):
                continue
            stream.seek(member.offset)
            digest, left = hashlib.sha256(), member.size
            with (target / name.removeprefix(folder)).open("xb") as file:
                block = stream.read(min(left, READ_BYTES))
                while block:
                    digest.update(block)
                    file.write(block)
                    left -= len(block)
                    block = stream.read(min(left, READ_BYTES))
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != member.sha256:
                raise damaged(f"{name} changed while it was unpacked")


def _make_runtime(bundle: Bundle, runtime: Path) -> None:
    """A virtual environment with the bundle's wheels, installed by the pip among them.

    It is made where it will be used, because its scripts name their interpreter by its path.
    """
    try:
        import venv
    except ImportError as exc:
        raise InstallError(
            "this Python has no module venv", "install it; on Debian its package is python3-venv"
        ) from exc
    with _staging(runtime.parent) as folder:
        wheels = folder / "wheels"
        _unpack(bundle, WHEELS, wheels)
        _say("making the runtime")
        venv.create(runtime, symlinks=True, with_pip=False)
        (pip,) = wheels.glob("pip-*.whl")
        options = ["--isolated", "--disable-pip-version-check", "--no-input", "--quiet", "--no-cache-dir"]
        options += ["--no-index", "--find-links", str(wheels), "--only-binary", ":all:"]
        command = [
            runtime / "bin" / "python",
            "-I",
            pip / "pip",
            "install",
            *options,
            bundle.description["requirement"],
        ]
        _run(command, runtime.parent, "could not be installed")


def _add_kernels(bundle: Bundle, prefix: Path, runtime: Path) -> None:
    """Compiled products that can be loaded here: they may need a newer C++ library than the wheels do."""
    if not any(name.startswith(KERNELS) for name in bundle.members):
        return
    kernels = prefix / "kernels"
    _make_folder(kernels)
    with _staging(kernels) as folder:
        staged = folder / "kernels"
        _unpack(bundle, KERNELS, staged)
        for kernel in sorted(staged.iterdir()):
            attempt: list[str | Path] = [runtime / "bin" / "python", "-I", "-c", _LOAD, kernel]
            if subprocess.run(attempt, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0:
                _replace(kernel, kernels / kernel.name)
            else:
                _say(f"left out, because it cannot be loaded here: {kernel.name}; the engine's own products will serve")


def _run(command: Sequence[str | Path], home: Path, failure: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    environment = clean | {"NORMISTRAL_HOME": str(home)}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
        raise InstallError(f"the runtime {failure}: {said[-500:]}", "nothing was installed; see what it says")


def _write_command(prefix: Path, runtime: Path) -> Path:
    """PREFIX/bin/normistral, which knows the artifacts in PREFIX by their names; the old one works until then."""
    command = prefix / "bin" / "normistral"
    with _staging(command.parent) as folder:
        new = folder / "normistral"
        new.write_text(
            "#!/bin/sh\n"
            f"NORMISTRAL_HOME=${{NORMISTRAL_HOME:-{shlex.quote(str(prefix))}}}\n"
            "export NORMISTRAL_HOME\n"
            f'exec {shlex.quote(str(runtime / "bin" / "normistral"))} "$@"\n',
            encoding="utf-8",
        )
        new.chmod(new.stat().st_mode | (new.stat().st_mode & 0o444) >> 2)
        _replace(new, command)
    return command


# Names in PREFIX: what is somebody else's is not used, and what has no mark of ours is not deleted


def _absolute(prefix: Path) -> Path:
    try:
        return prefix.expanduser().absolute()
    except RuntimeError as exc:
        raise InstallError(f"{prefix} names a user that is not there", "give --prefix the path of a folder") from exc


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _make_folder(folder: Path) -> None:
    """Make a folder, or require that no other user can exchange its content."""
    folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    open_to_all = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
    if not _is_own(status) or open_to_all:
        whose = "can be written by everybody" if open_to_all else "belongs to another user"
        raise InstallError(f"{folder} {whose}: what is installed there could be exchanged", "give another --prefix")


def _require_usable(runtime: Path) -> None:
    """Raises InstallError if there is something under the name of the runtime that no installation made."""
    if not os.path.lexists(runtime):
        return
    status = runtime.lstat()
    if not stat.S_ISDIR(status.st_mode) or not _is_own(status) or not (runtime / _WHOLE).is_file():
        raise InstallError(f"{runtime} is there already, and no installation made it", "move it elsewhere")


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A new private folder, deleted in the end."""
    folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    try:
        (folder / _MARK).touch()
        yield folder
    finally:
        shutil.rmtree(folder)


def _replace(new: Path, old: Path) -> None:
    """Rename a file over another, or over nothing."""
    if os.path.lexists(old) and not stat.S_ISREG(old.lstat().st_mode):
        raise InstallError(f"{old} is not a file, so it is not replaced", "move it elsewhere")
    new.replace(old)


@contextmanager
def _locked(prefix: Path) -> Iterator[None]:
    import fcntl  # not on Windows, which `require_machine` has refused

    path = prefix / ".install.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise InstallError(f"cannot use {path}: {exc.strerror}", "remove it, or give another --prefix") from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _is_own(os.fstat(descriptor)):
            raise InstallError(f"{path} is not a file of yours", "remove it, or give another --prefix")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise InstallError(f"another installation is writing {prefix}", "wait until it is done") from exc
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(prefix: Path) -> None:
    """Delete unfinished folders with our mark; only while holding the lock."""
    places = [(name, _STAGING + "*") for name in ("artifacts", "kernels", "bin", "runtimes")]
    for path in [path for name, pattern in (*places, ("runtimes", "*")) for path in (prefix / name).glob(pattern)]:
        try:
            status, mark = path.lstat(), (path / _MARK).lstat()
        except OSError:
            continue  # no folder, or none of ours
        ours = stat.S_ISDIR(status.st_mode) and stat.S_ISREG(mark.st_mode) and _is_own(status) and _is_own(mark)
        if ours and not (path / _WHOLE).exists():
            shutil.rmtree(path)


# The command line


def main() -> int:
    """Check and install; exit code 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted."""
    options = _parser().parse_args()
    try:
        _say(f"checking {options.bundle}")
        bundle = check_bundle(options.bundle, options.signers, options.sha256)
        print(f"{bundle.sha256}  {bundle.path}")
        if bundle.signer is not None:
            print(f"signed by {bundle.signer}; all {len(bundle.members)} files are as they were bundled")
        elif options.sha256 is None:
            _say("warning: nobody vouches for this bundle; it is whole, but anybody may have made it")
        if options.check:
            return 0
        name = options.name or bundle.description["artifact"]
        command = install(bundle, options.prefix, name)
        print(f"installed; talk to it with:\n  {shlex.quote(str(command))} chat {shlex.quote(name)}")
        return 0
    except InstallError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was installed", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}\nhint: nothing was installed", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    home = os.environ.get("NORMISTRAL_HOME")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    parser = argparse.ArgumentParser(description="Install a bundle of normistral, without a network.")
    parser.add_argument("bundle", type=Path, help="the archive; its signature is beside it, as BUNDLE.sig")
    trust = parser.add_argument_group("who vouches for it (one of these)").add_mutually_exclusive_group(required=True)
    trust.add_argument("--signers", type=Path, metavar="FILE", help="allowed_signers file with the keys that you trust")
    trust.add_argument("--sha256", type=_sum, metavar="SUM", help="SHA-256 of the archive, from somebody you trust")
    trust.add_argument("--allow-unsigned", action="store_true", help="nobody; only find accidental damage")
    parser.add_argument("--check", action="store_true", help="check it, and install nothing")
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path(home or f"{data}/normistral"),
        help="where to install; default: normistral's folder among this user's data",
    )
    parser.add_argument("--name", type=_name, help="install the artifact under this name; default: its own")
    return parser


def _sum(text: str) -> str:
    if not re.fullmatch("[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError("a SHA-256 has 64 hexadecimal digits")
    return text


def _name(text: str) -> str:
    if text.startswith(".") or not is_member_name(ARTIFACT + text):
        raise argparse.ArgumentTypeError("an artifact's name is one plain file name")
    return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
