"""What a checkpoint's tokenizer files say: the vocabulary, the special tokens, the chat template, the reasoning's tags.

The `tokenizers` library is the measure, because it is what the runtime uses; transformers is asked only for the one
thing that it alone can do, to convert a sentencepiece model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError, first_line
from normistral.export.chat_templates import TEMPLATE_NAME, find_template
from normistral.export.config import read_json
from normistral.manifest import ReasoningMarkers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    TEMPLATE_NAME,
)
_OPEN, _CLOSE = "<think>", "</think>"  # the only pair that is looked for
# The literal right after a message's content: {{ message['content'] + '<|im_end|>' }}, {{ message.content }}<|im_end|>
_AFTER_CONTENT = re.compile(
    r"content(?:['\"]\])?\s*(?:\|\s*trim\s*)?\)?\s*(?:\+\s*['\"]|\}\})\s*(?P<token><[^<>\s'\"]{1,60}>)"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokenizer says.

    Attributes:
        largest_id: the largest token id it can produce.
        specials: content of bos_token, eos_token, pad_token and unk_token, where a file names them.
        eos_ids: ids of every token that a tokenizer file calls end of sequence, and of the token with which the chat
            template closes a message; sorted.
        bos_id: id of bos_token, else config.json's.
        adds_bos: whether encoding plain text puts that token in front.
        template: jinja2 source of the chat template, or None.
        reasoning: the tags of a thinking model, or None.
    """

    largest_id: int
    specials: dict[str, str]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    adds_bos: bool
    template: str | None
    reasoning: ReasoningMarkers | None


def read_vocabulary(folder: Path, config_bos_id: int | None) -> Vocabulary:
    """Read tokenizer.json and the files beside it.

    Args:
        config_bos_id: bos_token_id of config.json, for when no tokenizer file names the token.

    Raises:
        CheckpointError: a file is damaged, or names a token that the tokenizer does not have.
    """
    tokenizer = _load(folder / "tokenizer.json")
    settings = _optional_json(folder / "tokenizer_config.json")
    special_map = _optional_json(folder / "special_tokens_map.json")
    specials: dict[str, str] = {}
    eos_ids: set[int] = set()
    files = [("special_tokens_map.json", special_map), ("tokenizer_config.json", settings)]
    if "added_tokens_decoder" not in settings:
        files.reverse()  # transformers lets special_tokens_map.json overrule a tokenizer_config.json of the older kind
    for file, document in files:
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            content = _content(document.get(name), f"{file}: {name}")
            if content is None:
                continue
            token_id = tokenizer.token_to_id(content)
            if token_id is None:
                raise CheckpointError(
                    f"{file} names {content[:60]!r} as {name}, but the tokenizer has no such token",
                    "the tokenizer files belong to different models; copy them again",
                )
            specials[name] = content
            if name == "eos_token":
                eos_ids.add(token_id)
    template = find_template(folder, settings)
    eos_ids |= set(_closing_tokens(template, tokenizer))
    bos_id = tokenizer.token_to_id(specials["bos_token"]) if "bos_token" in specials else config_bos_id
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError("tokenizer.json has an empty vocabulary", "copy the file again")
    return Vocabulary(
        largest_id=max(vocabulary.values()),
        specials=specials,
        eos_ids=tuple(sorted(eos_ids)),
        bos_id=bos_id,
        adds_bos=_adds_bos(tokenizer, bos_id),
        template=template,
        reasoning=_reasoning_markers(template, tokenizer),
    )


def convert_sentencepiece(folder: Path) -> None:
    """Write tokenizer.json beside a tokenizer.model, through transformers' own converter.

    Raises:
        CheckpointError: the model cannot be read.
    """
    from transformers import LlamaTokenizerFast

    settings = _optional_json(folder / "tokenizer_config.json")
    options = {"add_prefix_space": True}  # sentencepiece's own default; the fast class takes silence for False
    options |= {key: settings[key] for key in (*options, "add_bos_token", "add_eos_token", "legacy") if key in settings}
    try:
        fast = LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), **options)
        fast.backend_tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as exc:  # sentencepiece and protobuf raise types of their own
        raise CheckpointError(
            f"tokenizer.model cannot be converted: {first_line(exc)[:160]}",
            "use a checkpoint that has a tokenizer.json",
        ) from exc


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    read_json(path)  # for its size limit and its clear messages
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # a panic in its Rust code is no Exception
        raise CheckpointError(
            f"tokenizer.json cannot be read: {first_line(exc)[:160]}", "download or copy the file again"
        ) from exc


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: object, where: str) -> str | None:
    """A special token's text: written as a string, or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is None or content == "":
        return None
    if not isinstance(content, str):
        raise CheckpointError(f"{where} is {ascii(token)[:60]}, not a token", "copy the file again")
    return content


def _closing_tokens(template: str | None, tokenizer: Any) -> Iterator[int]:
    """The special token that stands right after a message's content in the template: a model ends its turn with it.

    Where every role has a token of its own there, what ends the model's turn cannot be told from them. The end of its
    reasoning is none: it may stand there too (`message.reasoning_content + '</think>'`).
    """
    if template is None:
        return
    added = _added_tokens(tokenizer)
    found = {match["token"] for match in _AFTER_CONTENT.finditer(template)} & (added.keys() - {_OPEN, _CLOSE})
    if len(found) == 1:
        yield added[found.pop()]


def _reasoning_markers(template: str | None, tokenizer: Any) -> ReasoningMarkers | None:
    """The tags of the reasoning: both are added tokens, or else both stand in the chat template."""
    added = _added_tokens(tokenizer)
    if _OPEN in added and _CLOSE in added:
        return ReasoningMarkers(_OPEN, _CLOSE, added[_OPEN], added[_CLOSE])
    if template is not None and _OPEN in template and _CLOSE in template:
        return ReasoningMarkers(_OPEN, _CLOSE)
    return None


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def _adds_bos(tokenizer: Any, bos_id: int | None) -> bool:
    try:
        with_specials = tokenizer.encode("a", add_special_tokens=True).ids
        without = tokenizer.encode("a", add_special_tokens=False).ids
    except Exception as exc:  # tokenizers raises plain Exceptions
        raise CheckpointError(
            f"the tokenizer cannot encode text: {first_line(exc)[:160]}", "copy the file again"
        ) from exc
    return bool(bos_id is not None and with_specials[:1] == [bos_id] and without[:1] != [bos_id])
