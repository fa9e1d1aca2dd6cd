"""What is asked about a document: its own prompt or conversation, or an instruction with its fields filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from normistral.batch.documents import Document
from normistral.errors import UsageError

_FIELD = re.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]


def check_instruction(instruction: str) -> None:
    """Refuse an instruction that would ask the same of every document.

    Raises:
        UsageError: it names no field.
    """
    if not _FIELD.search(instruction):
        raise UsageError(
            "the instruction has no field of the documents in it", "write it like: Summarise this text: {text}"
        )


def fill(instruction: str, document: Mapping[str, Any]) -> str:
    """The instruction with every {field} that it names; other braces stay as they are.

    Raises:
        UsageError: the document has no such field, or no text or number there.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        found = document.get(name)
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            raise UsageError(f"the document has no text {name!r}", f"it has: {', '.join(sorted(document))}")
        return str(found)

    return _FIELD.sub(value, instruction)


def find_prompt(document: Document, instruction: str | None) -> str | Messages:
    """A text to complete or to be said by the user; or a conversation that ends with the user's turn.

    Raises:
        UsageError: the document has neither "prompt" nor "messages", both, or something else in them.
    """
    if instruction is not None:
        return fill(instruction, document)
    given = [name for name in ("prompt", "messages") if name in document]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise UsageError(f'the document has {found} of "prompt" and "messages"', "give one, or an --instruction")
    prompt = document[given[0]]
    if given[0] == "prompt":
        if not isinstance(prompt, str):
            raise UsageError('"prompt" is no text')
        return prompt
    if not (isinstance(prompt, list) and all(map(_is_message, prompt)) and prompt and prompt[-1]["role"] == "user"):
        raise UsageError('"messages" is no conversation that ends with a turn of the user')
    return prompt


def with_system(prompt: str | Messages, system: str | None) -> Messages:
    """The whole conversation.

    Raises:
        UsageError: it has a system message already.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise UsageError("the document has a system message of its own", "leave --system out, or take it out")
    return [{"role": "system", "content": system}, *messages]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
    )
