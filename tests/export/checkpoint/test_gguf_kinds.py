"""GGUF files of other kinds: split ones are read, the others are called what they are."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from broken_gguf import TEXT, gguf, gguf_tensor, gguf_text, meta
from safetensors.numpy import load_file
from tiny_gguf import byte_level_vocabulary, open_gguf, write_gguf
from tiny_models import make_llama

from normistral.errors import CheckpointError, UsageError
from normistral.export.checkpoint.gguf_file import gguf_parts, read_gguf
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import hash_sources
from normistral.files import sha256_file
from normistral.progress import NoProgress


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model in three files, and the whole one beside them."""
    folder = make_llama(tmp_path_factory.mktemp("split") / "model")
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"][-1] = "ĠĠ"
    write_gguf(folder.parent / "whole.gguf", folder, vocabulary)
    write_gguf(folder.parent / "tiny.gguf", folder, vocabulary, split=8)
    return sorted(folder.parent.glob("tiny-*-of-*.gguf"))


def test_a_split_model_is_read_whole_from_any_of_its_parts(parts: list[Path], tmp_path: Path) -> None:
    assert [part.name for part in parts] == [f"tiny-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    whole = open_gguf(parts[0].parent / "whole.gguf", tmp_path / "whole")
    for index, part in enumerate(parts):
        checkpoint = open_gguf(part, tmp_path / str(index))
        assert checkpoint.config == whole.config
        found, expected = (load_file(item.folder / "model.safetensors") for item in (checkpoint, whole))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert hash_sources(checkpoint).files == {path.name: sha256_file(path) for path in parts}


def test_parts_that_are_missing_mixed_or_renamed(parts: list[Path], tmp_path: Path) -> None:
    for part in parts:
        (tmp_path / part.name).write_bytes(part.read_bytes())
    first, second, third = (tmp_path / part.name for part in parts)
    content = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf holds '.*', which another part holds too"):
        read_gguf(first)
    third.write_bytes(gguf())
    with pytest.raises(CheckpointError, match=r"the 3 parts of tiny-00001.* hold 16 tensors, but the first one says"):
        read_gguf(first)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model; tiny-00003-of-00003\.gguf is missing"):
        read_gguf(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf, tiny-00003-of-00003\.gguf are missing"):
        read_gguf(first)
    first.rename(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointError, match="one of 3 parts of a model, which its name does not say") as caught:
        read_gguf(tmp_path / "tiny.gguf")
    assert "-00001-of-00003.gguf" in caught.value.hint
    assert content


def test_names_that_are_no_parts() -> None:
    for name in ("model.gguf", "model-00003-of-00002.gguf", "model-00000-of-00002.gguf", "m-1-of-2.gguf"):
        assert gguf_parts(Path(name)) == (Path(name),)


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file", "gguf-convert-endian model.gguf little"),
        (gguf(version=1), "is a GGUF file of version 1", "original"),
        (gguf(version=4), "is a GGUF file of version 4", "upgrade"),
        (
            gguf((), (gguf_tensor(b"a", (32,), 31, 0),), bytes(64)),
            "packed as Q4_0_4_4, which llama.cpp removed",
            "Q4_0",
        ),
        (gguf((), (gguf_tensor(b"a", (32,), 38, 0),), bytes(64)), "packed as IQ4_NL_8_8, which llama.cpp", "Q4_0"),
        (gguf((), (gguf_tensor(b"a", (32,), 4, 0),), bytes(64)), "packed as Q4_2, which llama.cpp removed", "Q4_0"),
        (gguf((), (gguf_tensor(b"a", (32,), 99, 0),), bytes(64)), "packed as ggml's type 99", "original"),
        (
            gguf((meta("tokenizer.ggml.model", TEXT, gguf_text(b"\xff")),)),
            "is truncated or damaged: 'utf-8' codec can't decode",
            "again",
        ),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str, hint: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_gguf(tmp_path / "model.gguf")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_a_description_in_another_encoding_does_no_harm(tmp_path: Path) -> None:
    entry = meta("general.description", TEXT, gguf_text("Bokmål".encode("latin-1")))
    (tmp_path / "model.gguf").write_bytes(gguf((entry,)))
    assert read_gguf(tmp_path / "model.gguf").metadata == {"general.description": "Bokm\ufffdl"}


@pytest.mark.parametrize("name", ["model.gguf.part1of2", "model.gguf-split-a", "model.Q4_K_M.gguf.001"])
def test_pieces_of_a_file_are_to_be_joined(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gguf())
    with pytest.raises(UsageError, match=r"is a piece of a \.gguf file") as caught:
        locate(str(tmp_path / name), progress=NoProgress())
    assert "cat " in caught.value.hint
