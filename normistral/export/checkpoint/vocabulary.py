"""Facts from a checkpoint's tokenizer files: special tokens, end-of-sequence ids, chat template, reasoning tags.

The `tokenizers` library is the measure, because it is what the runtime uses; transformers is asked for the names of the
special tokens, which a chat template sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import ReasoningMarkers
from normistral.errors import CheckpointError, first_line
from normistral.export.checkpoint.chat_templates import find_template
from normistral.export.checkpoint.complete_tokenizer import load_backend
from normistral.export.checkpoint.config import read_json

_OPEN, _CLOSE = "<think>", "</think>"  # the only pair that is looked for
# The literal right after a message's content: {{ message['content'] + '<|im_end|>' }}, {{ message.content }}<|im_end|>
_AFTER_CONTENT = re.compile(
    r"content(?:['\"]\])?\s*(?:\|\s*trim\s*)?\)?\s*(?:\+\s*['\"]|\}\})\s*(?P<token><[^<>\s'\"]{1,60}>)"
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Facts from the tokenizer files.

    Attributes:
        specials: transformers' special_tokens_map: bos_token, eos_token, additional_special_tokens and so on.
        eos_ids: ids of every token that a tokenizer file calls end of sequence, and of the token with which the chat
            template closes a message; sorted.
        bos_id: id of bos_token, else config.json's.
        adds_bos: whether encoding plain text puts that token in front.
        template: jinja2 source of the chat template, or None.
        reasoning: the tags of a thinking model, or None.
    """

    specials: dict[str, str | tuple[str, ...]]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    adds_bos: bool
    template: str | None
    reasoning: ReasoningMarkers | None


def read_vocabulary(folder: Path, reference: Any, config_bos_id: int | None, vocab_size: int) -> Vocabulary:
    """Read tokenizer.json and the files beside it.

    Args:
        folder: with a tokenizer.json that has all tokens.
        reference: the tokenizer in transformers.
        config_bos_id: bos_token_id of config.json, for when no tokenizer file names the token.
        vocab_size: how many tokens the model has.

    Raises:
        CheckpointError: a file is damaged, or names a token that tokenizer or model do not have.
    """
    tokenizer = load_backend(folder / "tokenizer.json")
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError("tokenizer.json has an empty vocabulary", "copy the file again")
    settings = _optional_json(folder / "tokenizer_config.json")
    files = {"tokenizer_config.json": settings}
    files["special_tokens_map.json"] = _optional_json(folder / "special_tokens_map.json")
    _require_room(vocabulary, files, vocab_size)
    eos_ids = set(_eos_ids(tokenizer, files))
    template = find_template(folder, settings)
    eos_ids |= set(_closing_tokens(template, tokenizer))
    specials = {
        name: value if isinstance(value, str) else tuple(map(str, value))
        for name, value in reference.special_tokens_map.items()
    }
    bos = specials.get("bos_token")
    bos_id = vocabulary.get(bos) if isinstance(bos, str) else config_bos_id
    return Vocabulary(
        specials=specials,
        eos_ids=tuple(sorted(eos_ids)),
        bos_id=bos_id,
        adds_bos=_adds_bos(tokenizer, bos_id),
        template=template,
        reasoning=_reasoning_markers(template, tokenizer),
    )


def _eos_ids(tokenizer: Any, files: dict[str, dict[str, Any]]) -> Iterator[int]:
    """The ids of what the files call eos_token; NorMistral's name different ones."""
    for file, document in files.items():
        content = _content(document.get("eos_token"), f"{file}: eos_token")
        if content is None:
            continue
        token_id = tokenizer.token_to_id(content)
        if token_id is None:
            raise CheckpointError(
                f"{file} names {content[:60]!r} as eos_token, but the tokenizer has no such token",
                "the tokenizer files belong to different models; copy them again",
            )
        yield token_id


def _require_room(vocabulary: dict[str, int], files: dict[str, dict[str, Any]], vocab_size: int) -> None:
    """Refuse ids that the model does not have, and name the file that asks for the token."""
    for file, document in files.items():
        for name, value in document.items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str) and vocabulary.get(token, 0) >= vocab_size:
                raise CheckpointError(
                    f"{file} names {token[:60]!r} as {name}, but the tokenizer has no such token: it would be "
                    f"{vocabulary[token]}, and the model's ids run to {vocab_size - 1}",
                    f"correct {file}: name a token that the model knows",
                )
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        token = next(token for token, token_id in vocabulary.items() if token_id == largest)
        raise CheckpointError(
            f"the tokenizer does not fit the model: its ids run to {largest}, but config.json has vocab_size "
            f"{vocab_size}; the last token is {ascii(token)[:60]}",
            "the tokenizer and the weights belong to different models, or tokens were added without training them",
        )


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
