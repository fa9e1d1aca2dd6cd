"""The chat template, rendered here and by transformers: the same text, the same ids; no weight is needed for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import ReasoningMarkers, Template
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import CheckpointError, TemplateError, first_line
from normistral.export.checkpoint.fields import shorten

Conversation = list[dict[str, str]]

_SYSTEM = {"role": "system", "content": "Svar kort, på nynorsk eller bokmål."}
_TURNS: Conversation = [
    {"role": "user", "content": "Hva heter den lengste elva i Norge?"},
    {"role": "assistant", "content": "Glåma, på 621 kilometer."},
    {"role": "user", "content": "  Takk! 🇳🇴\n\nOg på nynorsk? «Ja»\t"},
]
_GIVE_ONE = "correct the checkpoint's chat template, or give one in jinja with --chat-template FILE"
CONVERSATIONS: tuple[Conversation, ...] = (_TURNS[:1], _TURNS, [_SYSTEM, *_TURNS[:1]], [_SYSTEM, *_TURNS])


def prove_template(template: Template, folder: Path, reasoning: ReasoningMarkers | None, reference: Any) -> int:
    """Compare some conversations.

    Args:
        folder: with the tokenizer.json that will be shipped.
        reference: the checkpoint's tokenizer in transformers.

    Returns:
        how many conversations were compared; 0 for the built-in template, which the checkpoint does not have.

    Raises:
        CheckpointError: quoting where they part.
    """
    if template.origin == "built-in":
        return 0
    ours = ChatTemplate(template, Tokenizer.from_folder(folder), reasoning)
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
                f"the chat template writes another text here than in transformers: {where_they_part(text, expected)}",
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


def where_they_part(text: str, expected: str) -> str:
    """A few characters of both, around the first that differs."""
    at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
    at = min(len(text), len(expected)) if at is None else at
    start = max(0, at - 12)
    return f"{shorten(text[start : at + 12])} instead of {shorten(expected[start : at + 12])}"


def _render_in_transformers(reference: Any, messages: Conversation) -> tuple[str, str]:
    """The text, or why the template refuses the messages."""
    try:
        text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as exc:  # whatever the template raises
        return "", first_line(exc)
    return str(text), ""
