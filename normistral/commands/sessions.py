"""Sessions of the command line: what --session opens and saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from normistral.commands.console import say
from normistral.commands.progress import show_progress
from normistral.errors import UsageError
from normistral.files import require_place

if TYPE_CHECKING:
    from normistral.runtime.chat import Chat, Overflow
    from normistral.runtime.model import Model


def check_session(path: Path, system: str | None) -> None:
    """Find mistakes before a model is loaded.

    Raises:
        UsageError: it cannot be written; or it is there and no session, or has a system message of its own.
        SessionError: it is damaged.
    """
    require_place(path, "--session")
    if not path.exists():
        return
    from normistral.runtime.session_file import open_session

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
