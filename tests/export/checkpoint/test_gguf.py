"""A .gguf file becomes the checkpoint that it was made from, or is refused."""

from __future__ import annotations

import json
import random
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import TYPES, byte_level_vocabulary, open_gguf, write_gguf
from tiny_models import TEMPLATE, make_llama

from normistral.artifact.manifest import SamplingDefaults
from normistral.errors import CheckpointError, NormistralError, ResourceError, UnsupportedArchitectureError
from normistral.export.checkpoint.fields import IgnoredFields
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.gguf import convert_gguf
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import hash_sources, open_checkpoint
from normistral.files import sha256_file
from normistral.progress import NoProgress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one merge and SmolLM2's pre-tokenizer, as its own tokenizer.json has it."""
    from tokenizers import Tokenizer, pre_tokenizers

    folder = make_llama(tmp_path_factory.mktemp("source") / "model", vocab=262)
    path = folder / "tokenizer.json"
    document = read_json(path)
    document["model"]["vocab"] = {("ĠĠ" if i == 261 else word): i for word, i in document["model"]["vocab"].items()}
    document["model"]["merges"] = [["Ġ", "Ġ"]]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.save(str(path))
    return folder


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    return write_gguf(model.parent / "tiny.gguf", model, byte_level_vocabulary(model))


def test_round_trip(model: Path, file: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    checkpoint = open_gguf(file, tmp_path / "workspace")
    before, after = load_file(model / "model.safetensors"), load_file(checkpoint.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (checkpoint.stop_token_ids, checkpoint.bos_token_id, checkpoint.adds_bos) == ((4,), 1, False)
    assert (checkpoint.architecture.head_dim, checkpoint.architecture.tied_embeddings) == (24, False)
    assert checkpoint.template is not None
    assert (checkpoint.template.text, checkpoint.template.eos_token) == (TEMPLATE, "<|im_end|>")
    assert hash_sources(checkpoint).files == {"tiny.gguf": sha256_file(file)}


def test_tokenizer_splits_as_the_named_pre_tokenizer_does(model: Path, file: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = open_gguf(file, tmp_path / "workspace").folder
    ours, original = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        Tokenizer.from_file(str(model / "tokenizer.json")),
    )
    for text in (
        "Hello",
        "tre   blanke",
        "Hva er 12345 + æøå 🙂?",
        "<|im_start|> user\nHei<|im_end|>\n",
        "  to  blanke\t\n",
    ):
        assert ours.encode(text).ids == original.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    splits = ours.pre_tokenizer.pre_tokenize_str("år 2024")  # one digit each, unlike GPT-2's
    assert [piece for piece, _ in splits] == ["Ã¥r", "Ġ", "2", "0", "2", "4"]


def test_bos_is_added_only_when_the_file_says_so(model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bos.gguf", model, {**byte_level_vocabulary(model), "adds_bos": True})
    assert open_gguf(path, tmp_path / "workspace").adds_bos


def test_packed_weights(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    path = write_gguf(tmp_path / "packed.gguf", model, byte_level_vocabulary(model), packed=True)
    before = load_file(model / "model.safetensors")
    after = load_file(open_gguf(path, tmp_path / "workspace").folder / "model.safetensors")
    for name, values in before.items():
        assert np.abs(after[name] - values).max() <= np.abs(values).max() / 127, name


def test_settings_of_sampling_are_the_authors(model: Path, tmp_path: Path) -> None:
    """llama.cpp's converter takes them from generation_config.json."""
    settings = {"temp": 0.3, "top_k": 64, "top_p": 0.9, "penalty_repeat": 1.1}
    extra = {f"general.sampling.{name}": value for name, value in settings.items()}
    path = write_gguf(tmp_path / "a.gguf", model, byte_level_vocabulary(model), extra=extra)
    found = open_gguf(path, tmp_path / "workspace").sampling
    assert found == SamplingDefaults(temperature=0.3, top_k=64, top_p=0.9, repetition_penalty=1.1)


def test_unknown_pre_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", model, {**byte_level_vocabulary(model), "pre": "viking"})
    with pytest.raises(CheckpointError, match="pre-tokenizer 'viking'"):
        open_gguf(path, tmp_path / "workspace")


def test_a_vocabulary_that_would_take_for_ever_is_refused(model: Path, tmp_path: Path) -> None:
    vocabulary = byte_level_vocabulary(model)
    vocabulary["tokens"][-1] = "a" * 1025
    with pytest.raises(CheckpointError, match="a token of over 1024 characters"):
        open_gguf(write_gguf(tmp_path / "a.gguf", model, vocabulary), tmp_path / "workspace")


@pytest.mark.parametrize("architecture", ["qwen2", "bloom", "gemma3"])
def test_other_architecture_is_named_beside_what_is_supported(model: Path, tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", model, byte_level_vocabulary(model), architecture=architecture)
    with pytest.raises(UnsupportedArchitectureError, match=f"architecture '{architecture}'") as caught:
        open_gguf(path, tmp_path / "workspace")
    assert "supported is: llama" in caught.value.hint
    assert list((tmp_path / "workspace").iterdir()) == []


def test_weights_are_unpacked_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unpacked matrix outlives the next, and the most that is held is a few copies of the largest one."""
    folder = make_llama(tmp_path / "model", layers=20, hidden=128, feed_forward=512, head_dim=32, vocab=262)
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"][-1] = "ĠĠ"
    path = write_gguf(tmp_path / "deep.gguf", folder, vocabulary, packed=True)
    unpacked: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []
    dequantize = gguf.dequantize

    def counting(*arguments: Any) -> np.ndarray:
        alive.append(sum(values() is not None for values in unpacked))
        values = dequantize(*arguments)
        unpacked.append(weakref.ref(values))
        return values

    monkeypatch.setattr(gguf, "dequantize", counting)
    tracemalloc.start()
    try:
        convert_gguf(path, tmp_path / "unpacked", IgnoredFields(), progress=NoProgress())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    written = (tmp_path / "unpacked" / "model.safetensors").stat().st_size
    assert len(unpacked) == 20 * 9 + 3
    assert max(alive) == 0
    largest = 512 * 128 * 4
    assert peak < 8 * largest < written / 8  # its packed bytes, the unpacking's own steps, the rows put in order


def test_too_little_memory_is_said_with_numbers(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normistral.export.checkpoint.gguf.available_memory_bytes", lambda: 10**9)
    with pytest.raises(ResourceError, match=r"unpacks to 0\.0 GB of float32.*1\.1 GB.*1\.0 GB of memory"):
        open_gguf(file, tmp_path / "workspace")
    assert list((tmp_path / "workspace").iterdir()) == []


def test_truncated_and_damaged_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    rng = random.Random(3)
    path = tmp_path / "damaged.gguf"
    for keep in (0, 3, 4, 10, 24, 100, 1000, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError) as caught:
            open_gguf(path, tmp_path / f"cut{keep}")
        assert "damaged.gguf" in caught.value.message
    refused = 0
    for trial in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(6000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            open_gguf(path, tmp_path / f"flip{trial}")
        except NormistralError:
            refused += 1
    assert refused > 20  # many flips only change a token's text; none ends in a traceback


def test_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Ids equal those of the sentencepiece library, from a .gguf file and from a tokenizer.model."""
    import sentencepiece
    from tokenizers import Tokenizer

    words = "Hovedstaden i Norge er Oslo. Været på Vestlandet er vått, og fjorden er blå. Hun kjøper brød og ost."
    (tmp_path / "text.txt").write_text("\n".join([words, words.lower(), "Å ære ørret: 12 + 34 = 46!"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "spm"), vocab_size=400, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    pieces = range(original.get_piece_size())
    kinds = {original.is_unknown: TYPES.UNKNOWN, original.is_control: TYPES.CONTROL, original.is_byte: TYPES.BYTE}
    vocabulary = {
        "model": "llama",
        "tokens": [original.id_to_piece(i) for i in pieces],
        "scores": [original.get_score(i) for i in pieces],
        "types": [next((kind for test, kind in kinds.items() if test(i)), TYPES.NORMAL) for i in pieces],
    }
    folder = make_llama(tmp_path / "model", vocab=len(pieces), chat=False)
    from_gguf = open_gguf(write_gguf(tmp_path / "spm.gguf", folder, vocabulary), tmp_path / "one")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    (tmp_path / "spm.model").rename(folder / "tokenizer.model")
    (tmp_path / "two").mkdir()
    from_model = open_checkpoint(locate(str(folder), progress=NoProgress()), tmp_path / "two", progress=NoProgress())
    assert "tokenizer.json was made from tokenizer.model" in from_model.notes
    for checkpoint in (from_gguf, from_model):
        assert checkpoint.adds_bos
        tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
        for text in ("Hovedstaden i Norge er Oslo.", "blåbær og brød", "12 + 46 🙂", "to  blanke"):
            assert tokenizer.encode(text, add_special_tokens=False).ids == original.encode(text)
            assert tokenizer.decode(original.encode(text)) == text
