"""Conversations as files: the JSON of /save and /load, and the sessions of --session, which keep the KV cache too.

Written whole or not at all, readable by their owner only, checked when they are read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from normistral.commands.console import say
from normistral.commands.progress import show_progress
from normistral.errors import NormistralError, UsageError
from normistral.files import atomic_save, checked, explain, read_file, require_place

if TYPE_CHECKING:
    from normistral.runtime.chat import Chat
    from normistral.runtime.model import Model
    from normistral.runtime.overflow import Overflow

_FORMAT = "normistral-chat"
_VERSION = 1
_MAX_BYTES = 64 * 2**20
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class SavedChat:
    """A saved conversation: messages of {"role", "content"}, and the name of the artifact that they were with."""

    messages: list[dict[str, str]]
    artifact: str


def save_conversation(
    file: str, messages: list[dict[str, str]], *, artifact: str, settings: dict[str, Any], overwrite: bool
) -> Path:
    """Write a conversation with permissions 0600, through a neighbour that is renamed.

    Raises:
        UsageError: no file is named, or it exists and `overwrite` is false.
        NormistralError: it cannot be written.
    """
    path = _path(file, "/save FILE")
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "artifact": artifact,
        "settings": msgspec.to_builtins(settings),  # a structure is one of them
        "messages": messages,
    }
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} is there already", f"overwrite it with: /save! {file}")
    require_place(path)
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    with atomic_save(path) as stream:
        stream.write(text.encode("utf-8", "surrogatepass"))
    return path


def load_conversation(file: str) -> SavedChat:
    """Read what `save_conversation` wrote.

    Raises:
        UsageError: no file is named, or it is no saved conversation.
        NormistralError: it cannot be read.
    """
    path = _path(file, "/load FILE")
    try:
        document = json.loads(read_file(path, _MAX_BYTES).decode("utf-8-sig"))  # an editor may have put a mark there
    except OSError as exc:
        raise NormistralError(f"cannot read {path}: {explain(exc)[0]}", "/load takes a file that /save wrote") from exc
    except (ValueError, RecursionError) as exc:
        raise _not_saved(path, "it is not JSON in UTF-8") from exc
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _not_saved(path, f'its "format" is not "{_FORMAT}"')
    if document.get("version") != _VERSION:
        raise _not_saved(path, f"its version is {document.get('version')!r}, not {_VERSION}")
    messages, artifact = document.get("messages"), document.get("artifact")
    if not isinstance(messages, list) or not isinstance(artifact, str):
        raise _not_saved(path, '"messages" or "artifact" is missing')
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise _not_saved(path, f'message {position} has not exactly "role" and "content"')
        if message["role"] not in _ROLES or (message["role"] == "system" and position > 0):
            raise _not_saved(path, f"message {position} cannot have the role {message['role']!r}")
        if not isinstance(message["content"], str):
            raise _not_saved(path, f"the content of message {position} is no text")
    return SavedChat(messages, artifact)


def _path(file: str, usage: str) -> Path:
    if not file:
        raise UsageError("no file is named", f"use it like this: {usage}")
    try:
        path = Path(file).expanduser()
        if checked(path).is_dir():
            raise UsageError(f"{path} is a folder", f"name a file: {usage}")
    except RuntimeError as exc:
        raise UsageError(f"{file}: there is no such user", f"name a file: {usage}") from exc
    except OSError as exc:
        raise UsageError(f"{file} cannot be used: {explain(exc)[0]}", f"name a file: {usage}") from exc
    return path


def _not_saved(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is no saved conversation: {why}", "/load takes a file that /save wrote")


def check_session(path: Path, system: str | None) -> None:
    """Find mistakes before a model is loaded.

    Raises:
        UsageError: it cannot be written; or it is there and no session, or has a system message of its own.
        SessionError: it is damaged.
    """
    require_place(path, "--session")
    if not path.exists():
        return
    from normistral.runtime.sessions import open_session

    with open_session(path):
        pass
    if system is not None:
        raise UsageError(
            f"{path} has a conversation with its own system message", "leave --system out, or name a new file"
        )


def open_conversation(model: Model, path: Path, system: str | None, overflow: Overflow) -> Chat:
    """The conversation of a session, or a new one where there is no file; errors as in `Model.restore_chat`."""
    if not path.exists():
        return model.chat(system=system, overflow=overflow)
    with show_progress() as progress, progress.stage(f"reading {path}", path.stat().st_size, "bytes") as reading:
        chat = model.restore_chat(path, overflow, reading.advance)
    say(f"(going on after {len(chat.messages)} messages)")
    return chat


def save_session(chat: Chat, path: Path) -> None:
    """Save conversation and KV cache; errors as in `Chat.save`."""
    with show_progress() as progress, progress.stage(f"saving {path}", unit="bytes") as saving:
        chat.save(path, saving.advance)
