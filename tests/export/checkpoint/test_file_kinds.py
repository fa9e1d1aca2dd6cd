"""Files that are something else than their name says are called what they are."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from broken_gguf import GOOD_GGUF
from tiny_models import make_mistral

from normistral.errors import CheckpointError
from normistral.export.checkpoint.files import recognise, unreadable
from normistral.export.checkpoint.gguf_file import read_gguf
from normistral.export.checkpoint.torch_file import read_torch_file
from normistral.export.checkpoint.weights import read_safetensors

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 4943162336\n"
)
PAGE = b'\n<!DOCTYPE html>\n<html class=""><head></head></html>'


@pytest.mark.parametrize(
    ("name", "content", "what", "hint"),
    [
        ("model.safetensors", POINTER, "a pointer of Git LFS, not the file itself (4943162336 bytes)", "git lfs pull"),
        ("tokenizer.json", POINTER, "a pointer of Git LFS", "git lfs pull"),
        ("tokenizer.model", POINTER, "a pointer of Git LFS", "git lfs pull"),
        ("config.json", PAGE, "a web page", "/resolve/"),
        ("model.gguf", b"\xef\xbb\xbf<html>", "a web page", "/resolve/"),
        ("model.safetensors", b'<?xml version="1.0"?><Error>', "a web page", "/resolve/"),
        ("config.json", b"", "empty", "again"),
        ("config.json", b"Entry not found", "an error message that was saved under this name: 'Entry not", "again"),
        ("model.safetensors", b'{"error":"Unauthorized"}', "an error message", "again"),
        ("config.json", '{"a": 1}'.encode("utf-16"), "a text in UTF-16", "UTF-8"),
        ("config.json", '{"a": 1}'.encode("utf-16-le"), "a text in UTF-16", "UTF-8"),
        ("chat_template.jinja", "{{ x }}".encode("utf-16"), "a text in UTF-16", "UTF-8"),
        ("model.safetensors", bytes(5000), "filled with zeros", "again"),
        ("config.json", bytes(500), "filled with zeros", "again"),
        ("tokenizer.json", gzip.compress(b"{}", mtime=0), "compressed with gzip", "unpack"),
        ("model.safetensors", GOOD_GGUF, "a GGUF file", ".gguf"),
        ("model.gguf", b"tjgg" + bytes(range(200)), "a GGML file", "original"),
        ("model.safetensors", b"PK\x03\x04" + bytes(range(200)), "a zip file", "pytorch_model.bin"),
        ("pytorch_model.bin", b"\x89HDF\r\n\x1a\n" + bytes(200), "an HDF5 file", "safetensors"),
        ("pytorch_model.bin", struct.pack("<Q", 64) + b'{"a":{"dtype"', "a safetensors file", ".safetensors"),
    ],
)
def test_what_a_file_is(tmp_path: Path, name: str, content: bytes, what: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = unreadable(tmp_path / name, f"{name} is damaged", "download it again")
    assert error.message.startswith(f"{name} is {what}")
    assert hint in (error.hint or "")


def test_files_that_are_what_they_say_are_left_to_their_readers(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    assert make_mistral(tmp_path / "bin", safetensors=False)
    (folder / "model.gguf").write_bytes(GOOD_GGUF)
    (folder / "model.gguf.json").write_bytes(b"\xef\xbb\xbf{}")  # a BOM is no other encoding
    (folder / "answer.json").write_text('{"message": 1, "hidden_size": 2, "a": 3, "b": 4}')
    for path in [*folder.iterdir(), *(tmp_path / "bin").iterdir(), tmp_path / "missing"]:
        assert recognise(path) is None, path
    error = unreadable(folder / "config.json", "config.json is damaged", "copy it again")
    assert (error.message, error.hint) == ("config.json is damaged", "copy it again")


@pytest.mark.parametrize(
    ("read", "name"),
    [(read_safetensors, "model.safetensors"), (read_torch_file, "pytorch_model.bin"), (read_gguf, "model.gguf")],
)
@pytest.mark.parametrize(("content", "what"), [(POINTER, "Git LFS"), (PAGE, "web page"), (b"", "empty")])
def test_readers_of_weights_say_what_the_file_is(tmp_path: Path, read, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=what):
        read(tmp_path / name)
