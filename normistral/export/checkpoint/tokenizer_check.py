"""Comparison of tokenizer.json and the chat template with transformers, before any weight is read.

tokenizer.json alone has to give the ids of transformers, which reads all files; the chat template rendered by this
package has to give the same text and ids as rendered by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError, CheckpointError, TemplateError, first_line
from normistral.export.checkpoint.fields import shorten
from normistral.export.texts import load_texts
from normistral.runtime.detokenizer import StreamDetokenizer

_SETTINGS = "tokenizer_config.json"
# What tokenizers differ in: blanks, line ends, letters that are composed, compatible, rare, of no word or of no width.
_ODD_TEXTS = (
    *("", " ", "a", "  to blanke foran", "bak  ", "en  to   tre    fire", "linje\n\nog\r\nlinje\t\tslutt\n", "\n"),
    *("Sámegiella: čáŋgu, ŧ, đ, ž, š. Åarjelsaemien: ïe, öö", "blåbærsyltetøy ÆØÅ æøå", "A\u030a e\u0301 \u212b"),
    *(
        "😀 👩\u200d👩\u200d👧 🇳🇴 ☕\ufe0f",
        "ﬁ ½ ① ㎏ ｆｕｌｌ Ⅳ … ™",
        "日本語 العربية עברית ไทย",
        "\u00a0x\u2009y\u200bz\ufeff",
    ),
    *(
        "1 23 456 7890 3,14 1e-5 §1",
        "def f(x):\n    return {'a': x[0]}  # ja\n\tpass",
        "<0x0A> ▁ Ġ </s ><s",
        "\x00\x01\x7f",
    ),
    *(
        "don't It's DON'T",
        "HTML <b>x</b> &amp; {{ x }} {% if %}",
        "https://www.uio.no/?a=b&c=%20#d",
        "\ufffd\ufffe\U0010ffff",
    ),
)


def verify_tokenizer(folder: Path, tokenizer: Tokenizer, reference: Any) -> int:
    """Compare ids and decoded text for our texts, and for every added token of either side in several surroundings.

    Where transformers builds its tokenizer from other files than tokenizer.json, every piece of the vocabulary is
    compared too.

    Args:
        folder: with the tokenizer.json that will be shipped; `tokenizer` is made of it.
        reference: the checkpoint's tokenizer in transformers.

    Returns:
        how many tokens were compared.

    Raises:
        CheckpointError: they differ; naming the file that makes transformers differ.
    """
    backend = reference.backend_tokenizer
    if tokenizer.vocabulary() != backend.get_vocab(with_added_tokens=True):
        raise _refusal(folder, reference, "has other tokens than transformers'")
    short = list(_ODD_TEXTS)
    for token in sorted({token.text for token in tokenizer.added_tokens} | set(reference.get_added_vocab())):
        short += [token, surround(token)]
    texts = [*short, *(line for text in load_texts().values() for line in text.splitlines(keepends=True))]
    if _differs(folder, backend):
        texts += sorted(tokenizer.decode([i], skip_special_tokens=False) for i in range(tokenizer.vocabulary_size))
    compared = 0
    expected = reference(texts, padding=False, truncation=False)["input_ids"]
    for number, (text, theirs) in enumerate(zip(texts, expected, strict=True)):
        ours = tokenizer.encode(text)
        if ours != theirs:
            at = _first_difference(ours, theirs)
            raise _refusal(
                folder,
                reference,
                f"gives other ids for {shorten(text)}, from token {at} on: {ours[at : at + 4]} instead of "
                f"{theirs[at : at + 4]},",
            )
        if number < len(short):
            _require_same_text(folder, tokenizer, reference, ours)
        compared += len(ours)
    return compared


def _require_same_text(folder: Path, tokenizer: Tokenizer, reference: Any, ids: list[int]) -> None:
    """The text of ids is transformers', at once and token by token."""
    try:
        stream = StreamDetokenizer(tokenizer)
    except ArtifactError as exc:
        raise CheckpointError(
            exc.message, "use a checkpoint whose tokenizer.json has a decoder of the usual steps"
        ) from exc
    text = tokenizer.decode(ids)
    if text != reference.backend_tokenizer.decode(ids):
        raise _refusal(folder, reference, f"makes another text, {shorten(text)}, of the ids {ids[:8]}")
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    if streamed != text:
        raise CheckpointError(
            f"tokenizer.json's decoder cannot be followed token by token: {shorten(streamed)}, not {shorten(text)}",
            "report it, with the model's tokenizer.json",
        )


def surround(token: str) -> str:
    """A text that has a token at its start and its end, between letters, between blanks, and twice in a row."""
    return f"{token}a{token} b {token} c{token}{token}\n{token} {token}"


def _differs(folder: Path, backend: Any) -> bool:
    """Whether transformers' tokenizer was not read from tokenizer.json, and is not the same."""
    from tokenizers import Tokenizer as Backend

    ours, theirs = (json.loads(one.to_str()) for one in (Backend.from_file(str(folder / "tokenizer.json")), backend))
    return any(ours[part] != theirs[part] for part in ("model", "normalizer", "pre_tokenizer", "decoder"))


def _refusal(folder: Path, reference: Any, what: str) -> CheckpointError:
    """The error that names the file which makes transformers differ from tokenizer.json."""
    settings = reference.init_kwargs
    message = f"tokenizer.json {what} than transformers {type(reference).__name__}"
    if settings.get("split_special_tokens"):
        return CheckpointError(
            f"{_SETTINGS} has split_special_tokens, which no tokenizer.json can express: {message}",
            f"remove split_special_tokens from {_SETTINGS}",
        )
    if settings.get("add_prefix_space") is not None and (folder / "tokenizer.model").exists():
        return CheckpointError(
            f"add_prefix_space in {_SETTINGS} makes transformers read tokenizer.model in place of tokenizer.json, and "
            f"they differ: {message}",
            f"remove add_prefix_space from {_SETTINGS} to keep tokenizer.json, or remove tokenizer.json",
        )
    return CheckpointError(
        f"{_SETTINGS} makes another tokenizer of tokenizer.json: {message}",
        f'name a class in {_SETTINGS} that reads tokenizer.json as it is: "tokenizer_class": "PreTrainedTokenizerFast"',
    )


Conversation = list[dict[str, str]]

_SYSTEM = {"role": "system", "content": "Svar kort, på nynorsk eller bokmål."}
_TURNS: Conversation = [
    {"role": "user", "content": "Hva heter den lengste elva i Norge?"},
    {"role": "assistant", "content": "Glåma, på 621 kilometer."},
    {"role": "user", "content": "  Takk! 🇳🇴\n\nOg på nynorsk? «Ja»\t"},
]
_GIVE_ONE = "correct the checkpoint's chat template, or give one in jinja with --chat-template FILE"
CONVERSATIONS: tuple[Conversation, ...] = (_TURNS[:1], _TURNS, [_SYSTEM, *_TURNS[:1]], [_SYSTEM, *_TURNS])


def verify_template(ours: ChatTemplate, reference: Any) -> int:
    """Compare some conversations.

    Args:
        ours: the checkpoint's template over the tokenizer.json that will be shipped.
        reference: the checkpoint's tokenizer in transformers.

    Returns:
        how many conversations were compared.

    Raises:
        CheckpointError: quoting where they part.
    """
    for messages in CONVERSATIONS:
        expected, refused = _render_in_transformers(reference, messages)
        try:
            text, ids = ours.render(messages), ours.encode(messages)
        except TemplateError as exc:
            if refused:
                continue
            raise CheckpointError(f"{exc.message}, and transformers renders it", _GIVE_ONE) from exc
        if refused:
            raise CheckpointError(f"in transformers the chat template fails: {refused}", _GIVE_ONE)
        if text != expected:
            raise CheckpointError(
                f"the chat template writes another text here than in transformers: {first_difference(text, expected)}",
                _GIVE_ONE,
            )
        wanted = list(reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if ids != wanted:
            raise CheckpointError(
                "the chat template's text becomes other tokens here than in transformers: the template writes control "
                "tokens in a way that cannot be followed",
                _GIVE_ONE,
            )
    return len(CONVERSATIONS)


def first_difference(text: str, expected: str) -> str:
    """A few characters of both, around the first that differs."""
    at = _first_difference(text, expected)
    start = max(0, at - 12)
    return f"{shorten(text[start : at + 12])} instead of {shorten(expected[start : at + 12])}"


def _first_difference(left: Sequence[Any], right: Sequence[Any]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _render_in_transformers(reference: Any, messages: Conversation) -> tuple[str, str]:
    """The text, or why the template refuses the messages."""
    try:
        text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as exc:  # whatever the template raises
        return "", first_line(exc)
    return str(text), ""
