"""Files of API keys: what is a key in them, and what is no such file."""

import os
import socket
import threading

import pytest

from normistral.errors import NormistralError, UsageError
from normistral.server.auth import read_keys


def write(tmp_path, text: str, mode: int = 0o600):
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_with_a_number_sign_is_whole(tmp_path) -> None:
    key = "0123456789abcdef#ghijk"
    keys = read_keys(write(tmp_path, f"# of the office\n  # indented\n{key} ola\n"))
    assert keys.tenant(f"Bearer {key}") == "ola"
    with pytest.raises(NormistralError, match="not known"):
        keys.tenant("Bearer 0123456789abcdef")
    assert read_keys(None, {"NORMISTRAL_API_KEYS": f"{key} ola,fedcba9876543210 kari"}).tenant(f"Bearer {key}") == "ola"


@pytest.mark.parametrize("entry", ["0123456789abcdef # ola", "0123456789abcdef #ola"])
def test_a_comment_behind_a_key_is_refused(tmp_path, entry) -> None:
    with pytest.raises(UsageError, match="comment behind a key"):
        read_keys(write(tmp_path, entry))


def test_a_key_of_the_environment_does_not_vanish_as_a_comment() -> None:
    with pytest.raises(UsageError, match="begins with #"):
        read_keys(None, {"NORMISTRAL_API_KEYS": "#0123456789abcdef"})


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "socket", "large", "binary", "missing", "nul", "long"])
def test_what_is_no_file_of_keys_is_refused_at_once(tmp_path, kind) -> None:
    path = tmp_path / "keys"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "large":
        path.write_text("0123456789abcdef\n" * 100_000)
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe" * 20)
    elif kind == "nul":
        path = tmp_path / "a\0b"
    elif kind == "long":
        path = tmp_path / ("x" * 5000)
    refused = []

    def read() -> None:
        try:
            read_keys(path)
        except UsageError as error:
            refused.append(error.message)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(5)
    assert len(refused) == 1
    assert refused[0].startswith("cannot read the keys in") or (kind == "binary" and "UTF-16" in refused[0])


def test_a_file_that_everybody_may_write_lets_everybody_in(tmp_path, caplog) -> None:
    with pytest.raises(UsageError, match="everybody may write"):
        read_keys(write(tmp_path, "0123456789abcdef", 0o602))
    read_keys(write(tmp_path, "0123456789abcdef", 0o644))
    assert "can be read by others" in caplog.text
