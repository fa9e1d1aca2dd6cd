"""A checkpoint's tokenizer files, laid out for transformers 4.57: plain UTF-8, in its spelling, without paths or code.

Files that need no change are linked. tokenizer_config.json is written anew where transformers 4.57 would not read it as
the version that saved the checkpoint does: where version 5 saved it, or where the class is named in config.json alone.

Sources of the rules: transformers 4.57.6 and 5.24.0, `AutoTokenizer.from_pretrained` and `_from_pretrained` of
`PreTrainedTokenizerBase`.
"""

from __future__ import annotations

import codecs
import json
import shutil
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.files import read_json, read_optional_json, unreadable, write_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SETTINGS = "tokenizer_config.json"
_CLASSES = {"mistral": "LlamaTokenizerFast", "llama": "LlamaTokenizerFast", "bloom": "BloomTokenizerFast"}
# Classes that transformers 5 introduced. They read tokenizer.json as it is.
_CLASSES_OF_5 = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend")
# Classes that version 5 gives to TokenizersBackend. It builds all others anew, from the vocabulary in tokenizer.json.
_READ_AS_IT_IS = (*_CLASSES_OF_5, "PreTrainedTokenizer", "BloomTokenizer")
# What sets a tokenizer up for training or names files of the machine that saved it; a path is never followed.
_DROPPED = ("auto_map", "name_or_path", "init_inputs", "from_slow", "slow_tokenizer_class", "device_map")
_MAX_TOKEN_CHARACTERS = 1024
_AS_IT_IS = 'set "tokenizer_class": "TokenizersBackend" in tokenizer_config.json to have tokenizer.json read as it is'


def lay_out_tokenizer(folder: Path, view: Path, config: dict[str, Any], model_type: str, notes: list[str]) -> None:
    """Link the tokenizer files of `folder` into `view`, or write what transformers 4.57 takes for the same.

    Args:
        config: config.json as the checkpoint has it.
        model_type: of its architecture, as transformers names it.

    Raises:
        CheckpointError: there is no tokenizer, a file cannot be read, or transformers 5 reads it in a way that is not
            followed here.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            _lay_out_file(folder / name, view / name)
    if not (view / "tokenizer.json").exists() and not (view / "tokenizer.model").exists():
        raise CheckpointError(
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model",
            "copy the tokenizer's files beside config.json",
        )
    given = read_optional_json(view / _SETTINGS)
    if given.get("auto_map") is not None:
        notes.append("the tokenizer comes with code of its own (auto_map), which is never run")
    settings = {key: value for key, value in given.items() if key not in _DROPPED and not key.endswith("_file")}
    tokenizer = read_json(view / "tokenizer.json") if (view / "tokenizer.json").exists() else None
    _check_files_of_versions(given)
    model = (tokenizer or {}).get("model")
    if isinstance(model, dict) and model.get("dropout"):
        raise CheckpointError(
            f"tokenizer.json cuts words at random, as for training: dropout is {ascii(model['dropout'])[:20]}",
            "set dropout of model to null in tokenizer.json",
        )
    for name in ("special_tokens_map.json", "added_tokens.json"):
        _require_short_tokens(read_optional_json(view / name), name)
    _require_short_tokens({key: value for key, value in settings.items() if "_token" in key}, _SETTINGS)
    _require_short_tokens({"added_tokens": (tokenizer or {}).get("added_tokens")}, "tokenizer.json")
    if is_saved_by_5(config, settings):
        settings = _translate_from_5(settings, config, model_type, tokenizer)
        _rename_extra_tokens(view / "special_tokens_map.json")
        _require_one_description(settings, view / "special_tokens_map.json")
    else:
        settings = _name_class(settings, config, model_type)
        if tokenizer is not None and not (view / "tokenizer.model").exists() and _builds_from_model(settings):
            del settings["add_prefix_space"]  # transformers would look for tokenizer.model, and fail
            notes.append("tokenizer_config.json's add_prefix_space is without effect: there is no tokenizer.model")
    if settings != given:
        write_json(view / _SETTINGS, settings)


def _require_one_description(settings: dict[str, Any], special_map: Path) -> None:
    """Refuse a token with flags (lstrip and so on) that is also listed without: versions 4 and 5 keep another one."""
    documents = [settings, read_optional_json(special_map)]
    listed = [token for document in documents for token in document.get("additional_special_tokens") or ()]
    for document in documents:
        for name, token in document.items():
            flags = ("lstrip", "rstrip", "single_word", "normalized")
            if isinstance(token, dict) and token.get("content") in listed and any(map(token.get, flags)):
                raise CheckpointError(
                    f"the tokenizer's files describe {ascii(token['content'])[:60]} in two ways: as {name} and as an "
                    "extra special token",
                    f"remove it from the list, or the flags from {name}",
                )


def _rename_extra_tokens(path: Path) -> None:
    """special_tokens_map.json with version 5's extra_special_tokens under the name that 4.57 knows."""
    document = read_optional_json(path)
    extra = document.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        known = document.get("additional_special_tokens") or []
        write_json(path, document | {"additional_special_tokens": [*known, *(e for e in extra if e not in known)]})


def is_saved_by_5(config: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether transformers 5 saved the checkpoint: it says so, or only version 5 can read tokenizer_config.json.

    Args:
        config: config.json.
        settings: tokenizer_config.json.
    """
    if settings.get("tokenizer_class") in _CLASSES_OF_5 or isinstance(settings.get("extra_special_tokens"), list):
        return True
    if "model_specific_special_tokens" in settings or "backend" in settings:
        return True
    version = config.get("transformers_version")
    major = version.partition(".")[0] if isinstance(version, str) else ""
    return major.isascii() and major.isdigit() and len(major) < 4 and int(major) >= 5


def link_or_copy(source: Path, target: Path) -> None:
    """A symbolic link, or a copy where the file system has none."""
    try:
        target.symlink_to(source.resolve())
    except (OSError, NotImplementedError):
        shutil.copyfile(source, target)


def _lay_out_file(source: Path, target: Path) -> None:
    """A link; a copy without the byte order mark where a JSON file has one, which transformers does not take."""
    if source.suffix == ".json":
        read_json(source)  # says what the file is, where it is something else
        raw = source.read_bytes()
        if raw.startswith(codecs.BOM_UTF8):
            target.write_bytes(raw.removeprefix(codecs.BOM_UTF8))
            return
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise unreadable(source, f"{source.name} is not UTF-8 at byte {exc.start}", "save it as UTF-8") from exc
    link_or_copy(source, target)


def _require_short_tokens(value: Any, file: str) -> None:
    """Refuse an added token that the `tokenizers` library would take minutes and more to look for."""
    texts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for text in texts:
        if isinstance(text, str) and len(text) > _MAX_TOKEN_CHARACTERS:
            raise CheckpointError(
                f"{file} has a token of {len(text)} characters, more than {_MAX_TOKEN_CHARACTERS}: {text[:20]!r}...",
                f"correct {file}",
            )
        _require_short_tokens(text, file)


def _check_files_of_versions(settings: dict[str, Any]) -> None:
    files = settings.get("fast_tokenizer_files")
    if files is not None and files != ["tokenizer.json"]:
        raise CheckpointError(
            f"{_SETTINGS} names tokenizer files for several versions of transformers: {ascii(files)[:80]}",
            "keep the one that you want as tokenizer.json, and remove fast_tokenizer_files from tokenizer_config.json",
        )


def _name_class(settings: dict[str, Any], config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The class that transformers 4.57 takes, named where it is not: after config.json, else after the model's type."""
    if settings.get("tokenizer_class") is not None:
        return settings
    return settings | {"tokenizer_class": config.get("tokenizer_class") or _CLASSES[model_type]}


def _builds_from_model(settings: dict[str, Any]) -> bool:
    """Whether transformers 4.57 builds the tokenizer from tokenizer.model, although there is a tokenizer.json."""
    name = settings.get("tokenizer_class")
    return isinstance(name, str) and name.startswith("LlamaTokenizer") and settings.get("add_prefix_space") is not None


def _translate_from_5(
    settings: dict[str, Any], config: dict[str, Any], model_type: str, tokenizer: dict[str, Any] | None
) -> dict[str, Any]:
    """Translate tokenizer_config.json as transformers 5 reads it to the fields of 4.57.

    Version 5 reads tokenizer.json as it is: it ignores add_bos_token and add_eos_token, and add_prefix_space, which
    4.57 would write into a byte-level pre-tokenizer.
    """
    if tokenizer is None:
        raise CheckpointError(
            "transformers 5 makes another tokenizer of tokenizer.model than 4.57 does, and by its files the checkpoint "
            "was saved by version 5",
            "write tokenizer.json with transformers 5: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    _require_read_as_it_is(settings, config, model_type, tokenizer)
    dropped = ("add_bos_token", "add_eos_token", "backend", "is_local", "local_files_only", "add_prefix_space")
    translated = {key: value for key, value in settings.items() if key not in dropped}
    translated["tokenizer_class"] = "PreTrainedTokenizerFast"
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    if isinstance(pre_tokenizer, dict) and isinstance(pre_tokenizer.get("add_prefix_space"), bool):
        translated["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    named = translated.pop("model_specific_special_tokens", None) or {}
    extra = translated.pop("extra_special_tokens", None) or translated.pop("additional_special_tokens", None) or []
    translated.pop("additional_special_tokens", None)
    if not isinstance(named, dict) or not isinstance(extra, list | dict):
        raise CheckpointError(
            f"{_SETTINGS}: extra_special_tokens or model_specific_special_tokens is not a list or map of tokens",
            "correct tokenizer_config.json",
        )
    if isinstance(extra, dict):
        named, extra = extra | named, []
    standard = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    own = {k: v for k, v in translated.items() if k.endswith("_token") and isinstance(v, str) and k not in standard}
    for name in own:
        del translated[name]
    if own or named:
        translated["extra_special_tokens"] = own | named
    if extra:
        translated["additional_special_tokens"] = extra
    return translated


def _require_read_as_it_is(
    settings: dict[str, Any], config: dict[str, Any], model_type: str, tokenizer: dict[str, Any]
) -> None:
    """Refuse a tokenizer.json that transformers 5 would build anew in another way than the file says."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if model_type == "mistral" or name is None:
        return  # TokenizersBackend, whatever class is named
    name = str(name).removesuffix("Fast")
    if name in _READ_AS_IT_IS:
        return
    if name == "LlamaTokenizer" and ('"ByteLevel"' in json.dumps(tokenizer) or _is_built_by_llama(settings, tokenizer)):
        return
    if name == "GPT2Tokenizer" and _is_built_by_gpt2(settings, tokenizer):
        return
    raise CheckpointError(
        f"transformers 5, which saved the checkpoint, builds a {ascii(name)[1:-1][:40]} anew, in another way than its "
        "tokenizer.json says",
        _AS_IT_IS,
    )


def _is_built_by_llama(settings: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json is what LlamaTokenizer of transformers 5 builds of its vocabulary and merges."""
    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    decoders += [{"type": "Fuse"}, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    model = _flags(tokenizer)
    return (
        tokenizer.get("normalizer") is None
        and tokenizer.get("pre_tokenizer")
        == {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        and tokenizer.get("decoder") == {"type": "Sequence", "decoders": decoders}
        and model == {"type": "BPE", "fuse_unk": True, "byte_fallback": True}
    )


def _is_built_by_gpt2(settings: dict[str, Any], tokenizer: dict[str, Any]) -> bool:
    """Whether tokenizer.json is what GPT2Tokenizer of transformers 5 builds of its vocabulary and merges."""
    pre_tokenizer = tokenizer.get("pre_tokenizer") or {}
    return (
        tokenizer.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("add_prefix_space") is (settings.get("add_prefix_space") is True)
        and pre_tokenizer.get("use_regex") is not False
        and (tokenizer.get("decoder") or {}).get("type") == "ByteLevel"
        and _flags(tokenizer) == {"type": "BPE"}
    )


def _flags(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The fields of the model's section that are set, without its lists."""
    model = tokenizer.get("model")
    given = model.items() if isinstance(model, dict) else ()
    return {key: value for key, value in given if key not in ("vocab", "merges", "unk_token") and value}
