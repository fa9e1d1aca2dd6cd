"""Detached signatures by ssh-keygen: `ssh-keygen -Y sign`, which anybody can check with `ssh-keygen -Y verify`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import BinaryIO

from normistral.bundle.install import NAMESPACE
from normistral.errors import MissingExtraError, NormistralError, UsageError, first_line

SUFFIX = ".sig"


def require_key(key: Path) -> str:
    """The key's fingerprint, asked before the long work; the passphrase is not needed for it.

    Raises:
        UsageError: it is no key.
        MissingExtraError: there is no ssh-keygen.
    """
    if not key.is_file():
        raise UsageError(f"there is no key {key}", "make one with: ssh-keygen -t ed25519 -f KEY")
    done = _ssh_keygen(["-l", "-f", str(key)], None)
    if done.returncode != 0:
        raise UsageError(f"{key} is not a key of ssh-keygen", "make one with: ssh-keygen -t ed25519 -f KEY")
    return done.stdout.decode(errors="replace").split()[1]


def sign(stream: BinaryIO, key: Path) -> bytes:
    """The signature of everything in a file that is open for reading; ssh-keygen asks for a passphrase on the terminal.

    Raises:
        NormistralError: the key cannot sign.
    """
    stream.flush()
    os.lseek(stream.fileno(), 0, os.SEEK_SET)
    done = _ssh_keygen(["-Y", "sign", "-f", str(key), "-n", NAMESPACE], stream)
    if done.returncode != 0 or not done.stdout:
        reason = first_line(Exception(done.stderr.decode(errors="replace")))
        raise NormistralError(f"{key} could not sign: {reason}", "nothing was written; give a private key")
    return done.stdout


def _ssh_keygen(arguments: list[str], stdin: BinaryIO | None) -> subprocess.CompletedProcess[bytes]:
    given = subprocess.DEVNULL if stdin is None else stdin
    try:
        return subprocess.run(["ssh-keygen", *arguments], stdin=given, capture_output=True, check=False)
    except FileNotFoundError as exc:
        raise MissingExtraError("ssh-keygen is not installed, which signs", "install OpenSSH's client") from exc
