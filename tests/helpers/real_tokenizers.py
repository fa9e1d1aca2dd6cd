"""Checkpoints around the tokenizers of the family's parents, and around one made by the 11B models' recipe.

The PyPI package `mistral-common` (Apache-2.0) carries sentencepiece v1 with 32,000 pieces (parent of 7b-warm), v3 with
32,768, and Tekken (parent of 11b). Only its data files are used: it is installed into a folder of its own beside the
other packages (Makefile), because transformers behaves differently where it can import it.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from tiny_models import make_mistral, write_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from normistral.export.texts import load_texts

SENTENCEPIECE = {"v1": ("tokenizer.model.v1", 32_000), "v3": ("mistral_instruct_tokenizer_240323.model.v3", 32_768)}
CHATML = ("<|im_start|>", "<|im_end|>")
_FOLDER = "tokenizers_of_mistral/mistral_common/data"


def data_file(name: str) -> Path:
    """A data file of mistral-common."""
    for place in sys.path:
        path = Path(place) / _FOLDER / name
        if path.exists():
            return path
    raise FileNotFoundError(f"mistral-common is not installed: make .venv/.ready-dev (it brings {name})")


def make_with_sentencepiece(
    folder: Path, version: str, *, chatml: str | None = None, legacy: bool | None = None, merges: int | None = None
) -> Path:
    """A checkpoint with tokenizer.model alone.

    Args:
        chatml: where the ChatML tokens stand: "added_tokens.json", "added_tokens_decoder", "additional_special_tokens",
            "special_tokens_map.json"; None for no such tokens.
        legacy: of tokenizer_config.json; None leaves it out.
        merges: keep the first so many of 28,000. Reading, converting and writing takes a second with all of them.
    """
    name, size = SENTENCEPIECE[version]
    model = data_file(name).read_bytes()
    if merges is not None:
        model, size = _with_fewer_merges(model, merges)
    make_mistral(
        folder, layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, feed_forward=16, vocab=size + 2, chat=False
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    settings: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {"unk_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
    special_map: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    ids = {token: size + i for i, token in enumerate(CHATML)}
    if chatml == "added_tokens.json":
        write_json(folder / chatml, ids)
    elif chatml == "added_tokens_decoder":
        flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
        settings[chatml] = {str(i): {"content": token} | flags for token, i in ids.items()}
    elif chatml == "additional_special_tokens":
        settings[chatml] = list(CHATML)
    elif chatml == "special_tokens_map.json":
        write_json(folder / "added_tokens.json", ids)
        special_map |= {"additional_special_tokens": list(CHATML), "eos_token": "<|im_end|>"}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special_map)
    return folder


def _with_fewer_merges(model: bytes, merges: int) -> tuple[bytes, int]:
    """The model without its last merges, and its number of pieces; all letters, bytes and control tokens stay."""
    from sentencepiece import sentencepiece_model_pb2

    whole = sentencepiece_model_pb2.ModelProto.FromString(model)
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    merged = [number for number, piece in enumerate(whole.pieces) if piece.type == normal and len(piece.piece) > 1]
    for number in reversed(merged[merges:]):
        del whole.pieces[number]
    whole.trainer_spec.vocab_size = len(whole.pieces)
    return whole.SerializeToString(), len(whole.pieces)


def make_with_tekken(folder: Path, entries: int) -> Path:
    """A checkpoint with the first `entries` of Tekken as tokenizer.json, byte-level BPE with whole words first."""
    document = json.loads(data_file("tekken_240718.json").read_text(encoding="utf-8"))
    names = {value: key for key, value in _bytes_to_letters().items()}
    words = [
        "".join(names[byte] for byte in base64.b64decode(entry["token_bytes"])) for entry in document["vocab"][:entries]
    ]
    specials = ["<unk>", "<s>", "</s>", "<pad>", *CHATML]
    vocabulary = {word: i for i, word in enumerate([*specials, *words])}
    merges = [(left, right) for word in words for left, right in [_last_merge(word, vocabulary)] if left]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(document["config"]["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(folder, tokenizer, specials)


def make_by_the_recipe_of_11b(folder: Path, entries: int = 1200) -> Path:
    """A checkpoint with a tokenizer trained on our texts as normistral-11b's was (facts: ltgoslo/norallm)."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<special_{i}>" for i in range(11))]
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.NFKC(),
            normalizers.Replace(Regex("\n"), "\n "),
            normalizers.Replace(Regex(" *\n"), "\n"),
        ]
    )
    words = (
        r" ?[\p{Lu}\p{Lt}]?[\p{Ll}\p{Lm}\p{Lo}\p{M}]+| ?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+| ?\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\n]*|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(".{1,24}"), "isolated"),
        ]
    )
    steps = [decoders.ByteLevel(), decoders.Strip(" ", 1, 0), decoders.Replace("\n ", "\n")]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_texts().values(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _finish(folder, tokenizer, specials)


def _finish(folder: Path, tokenizer: Tokenizer, specials: list[str]) -> Path:
    size = tokenizer.get_vocab_size()
    make_mistral(folder, layers=1, hidden=16, heads=2, kv_heads=1, head_dim=8, feed_forward=16, vocab=size, chat=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    write_json(folder / "special_tokens_map.json", names)
    return folder


def _last_merge(word: str, vocabulary: dict[str, int]) -> tuple[str, str]:
    """The two tokens that a token was merged from: those whose later one came first."""
    cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
    known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
    return min(known, key=lambda cut: max(vocabulary[part] for part in cut), default=("", ""))


def _bytes_to_letters() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in printable):
        letters[chr(256 + i)] = byte
    return letters
