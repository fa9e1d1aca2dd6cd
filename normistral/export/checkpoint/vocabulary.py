"""The tokenizer as transformers builds it from all its files, a tokenizer.json that says the same, and facts from both.

tokenizer.json is the truth where there is one, and stays as it is. But transformers also adds tokens that stand only in
the other files, and some of its classes replace a part of it; this package, onnxruntime-genai and openvino_genai read
tokenizer.json alone. So what transformers changes is written into the file, and everything else in it is kept.

The facts are special tokens, end-of-sequence ids, chat template, reasoning tags. The `tokenizers` library is the
measure, because it is what the runtime uses; transformers is asked for the names of the special tokens, which a chat
template sees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import ReasoningMarkers
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.errors import CheckpointError, first_line
from normistral.export.checkpoint.chat_templates import find_template
from normistral.export.checkpoint.files import read_json, read_optional_json, recognise, unreadable, write_json

_SETTINGS = "tokenizer_config.json"


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer as transformers loads it; runs no code of the checkpoint and asks no network.

    Raises:
        CheckpointError: transformers cannot load it, or it is none of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # the tokenizers package raises bare Exception for a damaged file, and panics
        raise _blame(folder, exc) from exc
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(
            f"{_SETTINGS} names the class {type(tokenizer).__name__}, which does not read {TOKENIZER_NAME}",
            "name a class that does, such as PreTrainedTokenizerFast",
        )
    return tokenizer


def complete_tokenizer(folder: Path, reference: Any, notes: list[str]) -> tuple[str, ...]:
    """Write tokenizer.json anew where transformers' tokenizer has more than it, or adds other tokens around a text.

    Args:
        folder: with the checkpoint's tokenizer files.
        reference: its tokenizer in transformers.

    Returns:
        the tokens that stood only in other files.
    """
    import json

    path = folder / TOKENIZER_NAME
    if not path.exists():
        reference.backend_tokenizer.save(str(path))
        notes.append("tokenizer.json was made from tokenizer.model")
        return ()
    given, own = read_json(path), load_backend(path)
    built = json.loads(reference.backend_tokenizer.to_str())
    changed: dict[str, Any] = {}
    added: tuple[str, ...] = ()
    if own.get_added_tokens_decoder() != reference.backend_tokenizer.get_added_tokens_decoder():
        known = {token.content for token in own.get_added_tokens_decoder().values()}
        added = tuple(token["content"] for token in built["added_tokens"] if token["content"] not in known)
        changed["added_tokens"] = [_as_decoded(token, reference.backend_tokenizer) for token in built["added_tokens"]]
        notes.append(_describe_added(added))
    if _around(own) != _around(reference.backend_tokenizer):
        changed["post_processor"] = built["post_processor"]
        notes.append("what tokenizer.json puts around a text is replaced, as transformers' class for it does")
    if _adds_blank(given) != _adds_blank(built):
        changed["pre_tokenizer"] = built["pre_tokenizer"]
        notes.append(f"whether a text begins with a blank follows add_prefix_space of {_SETTINGS}, as in transformers")
    if changed:
        write_json(path, given | changed)
    return added


def load_backend(path: Path) -> Any:
    """A tokenizer.json in the `tokenizers` library, without the truncation and padding that training left in it.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    read_json(path)  # for its size limit and its clear messages
    try:
        backend = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # a panic in its Rust code is no Exception
        raise unreadable(
            path, f"{path.name} cannot be read: {first_line(exc)[:160]}", "download or copy the file again"
        ) from exc
    backend.no_truncation()
    backend.no_padding()
    return backend


def _as_decoded(token: dict[str, Any], backend: Any) -> dict[str, Any]:
    """The token with its flag "special" as the backend behaves: one that was special stays so, whatever is written."""
    is_left_out = not backend.decode([token["id"]]) and backend.decode([token["id"]], skip_special_tokens=False)
    return token | {"special": token["special"] or bool(is_left_out)}


def _describe_added(added: tuple[str, ...]) -> str:
    if not added:
        return f"some added tokens are read as {_SETTINGS} describes them, and not as tokenizer.json does"
    shown = ", ".join(ascii(token)[1:-1][:40] for token in added[:5])
    more = f" and {len(added) - 5} more" if len(added) > 5 else ""
    return f"tokens that stand only beside tokenizer.json were added to it: {shown}{more}"


def _around(backend: Any) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return whole, []


def _adds_blank(tokenizer: dict[str, Any]) -> Any:
    """add_prefix_space of a byte-level pre-tokenizer, the one that transformers' classes overrule."""
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    return pre_tokenizer.get("add_prefix_space") if isinstance(pre_tokenizer, dict) else None


def _blame(folder: Path, exc: BaseException) -> CheckpointError:
    """Why transformers cannot load a tokenizer, and in which file."""
    if not (folder / TOKENIZER_NAME).exists():
        found = recognise(folder / "tokenizer.model")
        if found is not None:
            return CheckpointError(f"tokenizer.model is {found.what}", found.hint)
        return CheckpointError(
            f"tokenizer.model cannot be converted: {first_line(exc)[:160]}",
            "use a checkpoint that has a tokenizer.json",
        )
    load_backend(folder / TOKENIZER_NAME)
    return CheckpointError(
        f"transformers cannot open the tokenizer as {_SETTINGS} describes it: {first_line(exc)[:160]}",
        f"correct {_SETTINGS} and the files beside it; tokenizer.json itself can be read",
    )


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


def read_vocabulary(
    folder: Path, tokenizer: Tokenizer, reference: Any, config_bos_id: int | None, vocab_size: int
) -> Vocabulary:
    """Read tokenizer.json and the files beside it.

    Args:
        folder: with a tokenizer.json that has all tokens; `tokenizer` is made of it.
        reference: the tokenizer in transformers.
        config_bos_id: bos_token_id of config.json, for when no tokenizer file names the token.
        vocab_size: how many tokens the model has.

    Raises:
        CheckpointError: a file is damaged, or names a token that tokenizer or model do not have.
    """
    vocabulary = tokenizer.vocabulary()
    added = {token.text: token.id for token in tokenizer.added_tokens}
    if not vocabulary:
        raise CheckpointError("tokenizer.json has an empty vocabulary", "copy the file again")
    files = {name: read_optional_json(folder / name) for name in (_SETTINGS, "special_tokens_map.json")}
    _require_room(vocabulary, files, vocab_size)
    eos_ids = set(_eos_ids(vocabulary, files))
    template = find_template(folder, files[_SETTINGS])
    eos_ids |= set(_closing_tokens(template, added))
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
        reasoning=_reasoning_markers(template, added),
    )


def _eos_ids(vocabulary: dict[str, int], files: dict[str, dict[str, Any]]) -> Iterator[int]:
    """Ids of eos_token in each file; NorMistral's files name different ones."""
    for file, document in files.items():
        content = _content(document.get("eos_token"), f"{file}: eos_token")
        if content is None:
            continue
        if content not in vocabulary:
            raise CheckpointError(
                f"{file} names {content[:60]!r} as eos_token, but the tokenizer has no such token",
                "the tokenizer files belong to different models; copy them again",
            )
        yield vocabulary[content]


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


def _content(token: object, where: str) -> str | None:
    """A special token's text: written as a string, or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is None or content == "":
        return None
    if not isinstance(content, str):
        raise CheckpointError(f"{where} is {ascii(token)[:60]}, not a token", "copy the file again")
    return content


def _closing_tokens(template: str | None, added: dict[str, int]) -> Iterator[int]:
    """The special token that stands right after a message's content in the template: a model ends its turn with it.

    Where every role has a token of its own there, what ends the model's turn cannot be told from them. The end of its
    reasoning is none: it may stand there too (`message.reasoning_content + '</think>'`).
    """
    if template is None:
        return
    found = {match["token"] for match in _AFTER_CONTENT.finditer(template)} & (added.keys() - {_OPEN, _CLOSE})
    if len(found) == 1:
        yield added[found.pop()]


def _reasoning_markers(template: str | None, added: dict[str, int]) -> ReasoningMarkers | None:
    """The tags of the reasoning: both are added tokens, or else both stand in the chat template."""
    if _OPEN in added and _CLOSE in added:
        return ReasoningMarkers(_OPEN, _CLOSE, added[_OPEN], added[_CLOSE])
    if template is not None and _OPEN in template and _CLOSE in template:
        return ReasoningMarkers(_OPEN, _CLOSE)
    return None


def _adds_bos(tokenizer: Tokenizer, bos_id: int | None) -> bool:
    try:
        with_specials = tokenizer.encode("a")
        without = tokenizer.encode("a", add_special_tokens=False)
    except Exception as exc:  # tokenizers raises plain Exceptions
        raise CheckpointError(
            f"the tokenizer cannot encode text: {first_line(exc)[:160]}", "copy the file again"
        ) from exc
    return bool(bos_id is not None and with_specials[:1] == [bos_id] and without[:1] != [bos_id])
