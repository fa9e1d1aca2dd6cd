"""The chat template of an artifact, rendered here and by transformers: the same text, the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normistral.errors import ExportError, TemplateError, first_line
from normistral.export.fields import shorten
from normistral.export.proofs import CAUSE
from normistral.manifest import Manifest
from normistral.runtime.template import ChatTemplate
from normistral.runtime.tokenizer import Tokenizer

Conversation = list[dict[str, str]]

_SYSTEM = {"role": "system", "content": "Svar kort, på nynorsk eller bokmål."}
_TURNS: Conversation = [
    {"role": "user", "content": "Hva heter den lengste elva i Norge?"},
    {"role": "assistant", "content": "Glåma, på 621 kilometer."},
    {"role": "user", "content": "  Takk! 🇳🇴\n\nOg på nynorsk? «Ja»\t"},
]
CONVERSATIONS: tuple[Conversation, ...] = (_TURNS[:1], _TURNS, [_SYSTEM, *_TURNS[:1]], [_SYSTEM, *_TURNS])


def check_template(folder: Path, manifest: Manifest, reference: Any) -> int:
    """Compare some conversations.

    Args:
        reference: the checkpoint's tokenizer in transformers.

    Returns:
        how many conversations were compared; 0 for the built-in one, which the checkpoint does not have.

    Raises:
        ExportError: quoting where they part.
    """
    if manifest.template is None or manifest.template.origin == "built-in":
        return 0
    template = ChatTemplate(manifest.template, Tokenizer.from_folder(folder), manifest.reasoning)
    for messages in CONVERSATIONS:
        expected, refused = _render_in_transformers(reference, messages)
        try:
            text, ids = template.render(messages), template.encode(messages)
        except TemplateError as exc:
            if refused:
                continue
            raise ExportError(f"the artifact's chat template fails: {exc.message}", CAUSE) from exc
        if refused:
            raise ExportError(f"the checkpoint's chat template refuses what the artifact's takes: {refused}", CAUSE)
        if text != expected:
            at = next((i for i, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), None)
            at = min(len(text), len(expected)) if at is None else at
            raise ExportError(
                "the artifact's chat template writes another text than the checkpoint's: "
                f"{shorten(text[max(0, at - 12) : at + 12])} instead of "
                f"{shorten(expected[max(0, at - 12) : at + 12])}",
                CAUSE,
            )
        wanted = list(reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if ids != wanted:
            raise ExportError("the artifact's chat template gives other token ids than the checkpoint's", CAUSE)
    return len(CONVERSATIONS)


def _render_in_transformers(reference: Any, messages: Conversation) -> tuple[str, str]:
    """The text, or why the template refuses the messages."""
    try:
        text = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as exc:  # whatever the template raises
        return "", first_line(exc)
    return str(text), ""
