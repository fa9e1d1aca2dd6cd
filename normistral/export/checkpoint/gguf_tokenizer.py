"""Rebuild tokenizer.json and tokenizer_config.json from a .gguf file's metadata.

llama.cpp names the pre-tokenizer and keeps vocabulary, merges or scores, token types and flags; everything is rebuilt
from those, as llama.cpp reads them (src/llama-vocab.cpp). A pre-tokenizer that is not known here is an error: a wrong
one splits words differently from how the model learnt them, and nothing else would show it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.files import write_json

_ORIGINAL = "export the original checkpoint instead of the .gguf file"
_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4
# Llama 3's split; https://huggingface.co/meta-llama/Meta-Llama-3-8B tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Mistral's Tekken; https://huggingface.co/mistralai/Mistral-Nemo-Base-2407 tokenizer.json.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# LLAMA_VOCAB_PRE_TYPE_DEFAULT in llama.cpp: the splits are applied one after the other.
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
_SPLITS = {"llama-bpe": (_LLAMA3,), "llama3": (_LLAMA3,), "tekken": (_TEKKEN,), "default": _DEFAULT}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "tekken")  # they look a word up before merging, and add BOS by default
_SINGLE_DIGITS = ("smollm", "starcoder", "refact")
_GPT2 = ("gpt-2", "gpt2")
_MAX_TOKEN_CHARACTERS = 1024  # every way to cut a token in two is looked up


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Write tokenizer.json and tokenizer_config.json.

    Returns:
        notes for the user.

    Raises:
        CheckpointError: the metadata are incomplete, contradict each other, or name an unknown pre-tokenizer.
    """
    from tokenizers import processors

    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("the .gguf file has no vocabulary", _ORIGINAL)
    if any(len(token) > _MAX_TOKEN_CHARACTERS for token in tokens):
        raise CheckpointError(f"the .gguf file has a token of over {_MAX_TOKEN_CHARACTERS} characters", _ORIGINAL)
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("the .gguf file's vocabulary has the same token twice", _ORIGINAL)
    if metadata.get("tokenizer.ggml.add_eos_token") is True:
        raise CheckpointError("the .gguf file's tokenizer ends every text with EOS: nothing could follow", _ORIGINAL)
    notes: tuple[str, ...] = ()
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(tokens, _list(metadata, "merges", len_at_least=0), pre)
        adds_bos = pre in _WHOLE_WORDS_FIRST
        if pre == "default":
            notes = ("the .gguf file does not name its pre-tokenizer; llama.cpp's default is used, as llama.cpp would",)
    elif kind == "llama":
        scores = _list(metadata, "scores", len_at_least=len(tokens))
        tokenizer = _sentencepiece_bpe(metadata, tokens, scores)
        adds_bos = True
    else:
        raise CheckpointError(f"the .gguf file's tokenizer is of the unknown kind {ascii(kind)[:40]}", _ORIGINAL)
    _add_special_tokens(tokenizer, metadata, tokens)
    specials = {
        f"{name}_token": _token(metadata, tokens, key)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    given = metadata.get("tokenizer.ggml.add_bos_token")
    adds_bos = given if isinstance(given, bool) else adds_bos
    bos, bos_id = specials["bos_token"], metadata.get("tokenizer.ggml.bos_token_id")
    if adds_bos and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {name: content for name, content in specials.items() if content is not None}
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        settings["chat_template"] = list(template) if isinstance(template, array) else template
    write_json(folder / "tokenizer_config.json", settings)
    return notes


def _byte_level_bpe(tokens: list[str], merges: Sequence[Any], pre: object) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else () for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in pairs):
        raise CheckpointError("the .gguf file's merges do not fit its vocabulary", DOWNLOAD_AGAIN)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _GPT2 or pre in _SINGLE_DIGITS)
    if pre in _GPT2:
        splits = []
    elif pre in _SINGLE_DIGITS:
        splits = [pre_tokenizers.Digits(individual_digits=True)]
    elif isinstance(pre, str) and pre in _SPLITS:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    else:
        known = ", ".join([*_SPLITS, *_SINGLE_DIGITS, *_GPT2])
        raise CheckpointError(f"the .gguf file names the pre-tokenizer {ascii(pre)[:40]}; known are {known}", _ORIGINAL)
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str], scores: Sequence[Any]) -> Any:
    """A Llama 2 tokenizer, put together as its published tokenizer.json is; merges follow from the scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    score_of = dict(zip(tokens, scores, strict=False))
    merges = [
        (token[:i], token[i:], score)
        for token, score in score_of.items()
        for i in range(1, len(token))
        if token[:i] in score_of and token[i:] in score_of
    ]
    # The order of transformers' SentencePieceExtractor: best score first, then longer pieces.
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    unknown = _token(metadata, tokens, "unknown")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [merge[:2] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    blank = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank] if prefix else [blank])
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
    return tokenizer


def _add_special_tokens(tokenizer: Any, metadata: dict[str, Any], tokens: list[str]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, array) or len(types) != len(tokens):
        raise CheckpointError("the .gguf file does not say which of its tokens are special", _ORIGINAL)
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _token(metadata: dict[str, Any], tokens: list[str], key: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise CheckpointError(
            f"the .gguf file's {key} token is {ascii(token_id)[:40]}, but ids run to {len(tokens) - 1}", DOWNLOAD_AGAIN
        )
    return tokens[token_id]


def _list(metadata: dict[str, Any], key: str, *, len_at_least: int) -> Sequence[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list | array) or len(values) < len_at_least:
        raise CheckpointError(f"the .gguf file's tokenizer has no {key} for its {len_at_least} tokens", _ORIGINAL)
    return values
