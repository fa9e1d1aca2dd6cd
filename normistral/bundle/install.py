"""Installs a bundle of normistral where there is Python, and neither a network nor anything else.

    python3 -I install.py BUNDLE --signers FILE [--prefix FOLDER]

Nothing is unpacked before every byte of the bundle was checked: the signature over the whole file (by ssh-keygen), the
form of the archive, and every file against the list SHA256SUMS. What is unpacked is compared with that list again.

PREFIX is laid out as normistral's own store: artifacts/NAME, kernels/, runtimes/VERSION-HASH (a virtual environment),
and bin/normistral, which is written last. Temporary folders and runtimes have a mark in them; nothing without it is
ever deleted. A copy of this file is in every bundle; it needs the standard library alone.
"""

import sys

# Without -I, Python looks for modules beside this file first, where anybody may have put a base64.py: nothing but sys,
# which is built in, is imported before that is over. (Not even __future__, for which there would be a file, too.)
if __name__ == "__main__" and not sys.flags.isolated and "posix" in sys.builtin_module_names:
    import posix

    posix.execv(sys.executable, [sys.executable, "-I", *sys.argv])
if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python there is
    sys.exit("error: this needs Python 3.11 or newer\nhint: run it with the python3 that the bundle was made for")

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAMESPACE = "normistral-bundle"  # of the signature: one made for mail or git is none for a bundle
SUMS, DESCRIPTION, INSTALLER, SBOM = "SHA256SUMS", "bundle.json", "install.py", "sbom.cdx.json"
ARTIFACT, WHEELS, KERNELS = "artifact/", "wheels/", "kernels/"
SCHEMA = 1
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)

_READ_BYTES = 4 * 2**20
_MAX_TEXT_BYTES = 4 * 2**20  # SHA256SUMS and bundle.json are read into memory
_MAX_SIGNATURE_BYTES = 64 * 2**10
_WHOLE = ".whole"  # the last file of a runtime to be written
_STAGING = ".installing-"
_MARK = ".made-by-normistral"  # the first file of whatever folder may be deleted again
_FIELDS = {
    "schema": int,
    "artifact": str,
    "requirement": str,
    "python": str,
    "machine": str,
    "glibc": str,
    "bytes": int,
}
_LOAD = "import ctypes, openvino, sys; ctypes.CDLL(sys.argv[1])"
_GET_AGAIN = "do not use it; copy or get it again"


class InstallError(Exception):
    """Message and hint, one line each."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


@dataclass(frozen=True)
class Member:
    """A file of the archive: where its bytes are, and their SHA-256."""

    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked from its first byte to its last.

    Attributes:
        sha256: of the whole file.
        signer: the name that the signers file has for the key; None if no signature was asked for.
        description: bundle.json.
    """

    path: Path
    sha256: str
    signer: str | None
    members: dict[str, Member]
    description: dict[str, Any]


# The form of the archive; `normistral bundle` writes by the same rules.


def member_header(name: str, size: int) -> bytes:
    """The blocks in front of a file: one, or three if its name has more than 100 bytes.

    Only name and size differ: there are no owners, times, links or folders.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def is_member_name(name: str) -> bool:
    """True for one of four names, or a plain name in one of three folders."""
    for folder in (ARTIFACT, WHEELS, KERNELS):
        if name.startswith(folder):
            plain = name.removeprefix(folder)
            short = len(name.encode(errors="replace")) < BLOCK
            return plain not in ("", ".", "..") and not set(plain) & set("/\\:\0\n\r") and short
    return name in (SUMS, DESCRIPTION, INSTALLER, SBOM)


def sums_line(sha256: str, name: str) -> str:
    """A line of sha256sum."""
    return f"{sha256}  {name}\n"


# Checking


def check_bundle(path: Path, signers: Path | None = None, sha256: str | None = None) -> Bundle:
    """Read the whole bundle once, and give the same bytes to ssh-keygen.

    Args:
        signers: ssh-keygen's allowed_signers file; None asks for no signature. The signature is beside the bundle.
        sha256: what the whole file must have, or None.

    Raises:
        InstallError: it is not whole, or not from whom it should be.
    """
    if not path.is_file():
        raise InstallError(f"there is no file {path}", "give the bundle's file")
    with path.open("rb") as stream:
        verifier = None if signers is None else _Verifier(path.with_name(path.name + ".sig"), signers)
        reader = _Reader(stream, verifier)
        try:
            members, texts = _read_members(reader)
        except InstallError:
            reader.finish()  # a wrong signature or sum explains the rest
            if sha256 is not None:
                _require_sha256(reader, path, sha256)
            raise
        reader.finish()
        if sha256 is not None:
            _require_sha256(reader, path, sha256)
    signer = None if verifier is None else verifier.signer
    return Bundle(path, reader.sha256(), signer, members, _parse_description(texts[DESCRIPTION]))


def _require_sha256(reader: "_Reader", path: Path, sha256: str) -> None:
    if reader.sha256() != sha256.lower():
        raise InstallError(f"{path} has the SHA-256 {reader.sha256()} instead of {sha256}", _GET_AGAIN)


def _read_members(reader: "_Reader") -> tuple[dict[str, Member], dict[str, bytes]]:
    """Every file of the archive, and the text of those that are read here.

    Every byte is accounted for: headers and padding have one possible form, and SHA256SUMS is exactly the list that
    the other files give, in their order.
    """
    members: dict[str, Member] = {}
    texts: dict[str, bytes] = {}
    while any(header := reader.read(BLOCK)):
        name, size = _read_name_and_size(reader, header)
        if name in members:
            raise _damaged(f"it holds {name} twice")
        if name in (SUMS, DESCRIPTION) and size > _MAX_TEXT_BYTES:
            raise _damaged(f"its {name} is too large")
        offset, digest = reader.position, hashlib.sha256()
        while rest := offset + size - reader.position:
            block = reader.read(min(rest, _READ_BYTES))
            digest.update(block)
            if name in (SUMS, DESCRIPTION):
                texts[name] = texts.get(name, b"") + block
        members[name] = Member(offset, size, digest.hexdigest())
        if any(reader.read(-size % BLOCK)):
            raise _damaged(f"there is something behind {name}")
    if header + reader.up_to(BLOCK + 1) != END:
        raise _damaged("its end is not where it should be")
    for name in (SUMS, DESCRIPTION, INSTALLER, SBOM):
        if not members.get(name, Member(0, 0, "")).size:
            raise _damaged(f"it has no {name}")
    found = "".join(sums_line(member.sha256, name) for name, member in members.items() if name != SUMS).encode()
    if found != texts[SUMS]:
        differing = set(found.splitlines()) ^ set(texts[SUMS].splitlines())
        name = min((line[66:].decode(errors="replace") for line in differing), default=SUMS)
        raise _damaged(f"{name} is not as its {SUMS} says")
    return members, texts


def _read_name_and_size(reader: "_Reader", header: bytes) -> tuple[str, int]:
    """Of the next file, whose header begins with this block and has to be the only one for them."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        name, size = info.name, info.size
        if info.type == tarfile.GNUTYPE_LONGNAME and size <= BLOCK:
            header += reader.read(2 * BLOCK)
            name = header[BLOCK : BLOCK + size - 1].decode()
            size = tarfile.TarInfo.frombuf(header[2 * BLOCK :], "utf-8", "strict").size
        known = size >= 0 and member_header(name, size) == header
    except (tarfile.HeaderError, ValueError, OverflowError) as exc:
        raise _damaged("one of its headers is broken") from exc
    if not known or not is_member_name(name):
        raise _damaged(f"it holds {name!r} in a way that no bundle does")
    return name, size


def _parse_description(raw: bytes) -> dict[str, Any]:
    try:
        description = json.loads(raw)
        good = all(type(description[name]) is kind for name, kind in _FIELDS.items())
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise _damaged(f"its {DESCRIPTION} cannot be read") from exc
    if not good or not re.fullmatch(
        r"[0-9]+\.[0-9]+ [0-9]+\.[0-9]+", f"{description['python']} {description['glibc']}"
    ):
        raise _damaged(f"its {DESCRIPTION} cannot be read")
    if description["schema"] != SCHEMA:
        raise InstallError(f"the bundle has schema {description['schema']}", "use the install.py that it holds")
    if not is_member_name(ARTIFACT + description["artifact"]):
        raise _damaged(f"{description['artifact']!r} is no name of an artifact")
    return dict(description)


def _damaged(what: str) -> InstallError:
    return InstallError(f"the bundle is damaged: {what}", _GET_AGAIN)


class _Reader:
    """Reads a file once from its beginning, hashes it, and hands on what it reads."""

    def __init__(self, stream: BinaryIO, verifier: "_Verifier | None") -> None:
        self._stream, self._verifier, self._digest = stream, verifier, hashlib.sha256()
        self.position = 0

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        block = self.up_to(size)
        if len(block) != size:
            raise _damaged("it ends too early")
        return block

    def up_to(self, size: int) -> bytes:
        """`size` bytes, or what is left."""
        block = self._stream.read(size)
        self._digest.update(block)
        if self._verifier is not None:
            self._verifier.feed(block)
        self.position += len(block)
        return block

    def finish(self) -> None:
        """Read the rest, and have the signature judged."""
        while self.up_to(_READ_BYTES):
            pass
        if self._verifier is not None:
            self._verifier.finish()

    def sha256(self) -> str:
        return self._digest.hexdigest()


class _Verifier:
    """ssh-keygen, verifying a signature over what it is fed (PROTOCOL.sshsig of OpenSSH)."""

    def __init__(self, signature: Path, signers: Path) -> None:
        for path in (signature, signers):
            if not path.is_file():
                raise InstallError(f"{path} is missing", "get it from whom the bundle came, by a way that you trust")
        self._signature = signature
        _require_one_spelling(signature)
        found = self._run("find-principals", "-f", signers).communicate()
        self.signer = found[0].decode().partition("\n")[0]
        if not self.signer:
            raise self._wrong(f"is by nobody that {signers} lists")
        self._process = self._run("verify", "-f", signers, "-I", self.signer, "-n", NAMESPACE)

    def feed(self, block: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has seen enough, and says so at the end
            self._process.stdin.write(block)

    def finish(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.wait() != 0:
            raise self._wrong(f"by {self.signer} is not of this file")

    def _run(self, task: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        command = ["ssh-keygen", "-Y", task, "-s", self._signature, *arguments]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            return subprocess.Popen(command, stdin=pipe, stdout=pipe if task != "verify" else nowhere, stderr=nowhere)
        except FileNotFoundError as exc:
            raise InstallError(
                "ssh-keygen is not here to check the signature",
                "install OpenSSH's client; or check it on another machine, and give --sha256 the file's sum there",
            ) from exc

    def _wrong(self, what: str) -> InstallError:
        return InstallError(f"the signature {self._signature} {what}", _GET_AGAIN)


def _require_one_spelling(signature: Path) -> None:
    """Base64 as ssh-keygen writes it, and nothing else: it would pass over blanks and what follows the end."""
    raw = signature.read_bytes() if signature.stat().st_size <= _MAX_SIGNATURE_BYTES else b""
    form = rb"-----BEGIN SSH SIGNATURE-----\n((?:[A-Za-z0-9+/=]+\n)+)-----END SSH SIGNATURE-----\n"
    found = re.fullmatch(form, raw)
    text = b"" if found is None else found[1].replace(b"\n", b"")
    try:
        good = text != b"" and base64.b64encode(base64.b64decode(text, validate=True)) == text
    except ValueError:
        good = False
    if not good:
        raise InstallError(f"{signature} is not a signature of ssh-keygen, or was damaged", _GET_AGAIN)


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
                while block := stream.read(min(left, _READ_BYTES)):
                    digest.update(block)
                    file.write(block)
                    left -= len(block)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != member.sha256:
                raise _damaged(f"{name} changed while it was unpacked")


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
