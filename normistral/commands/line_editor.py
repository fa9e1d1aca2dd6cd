"""Reads a message at the terminal: line editing, history, several lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.artifact import store
from normistral.commands.console import one_line, warn
from normistral.files import explain, open_file

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

TEXT_BLOCK = '"""'


class LineEditor:
    """An input line with a status line below.

    Args:
        keep_history: remember messages in a file of the user's (0600) for the next session.
    """

    def __init__(self, *, keep_history: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory

        self._session: PromptSession[str] = PromptSession(
            history=_open_history(store.history_file()) if keep_history else InMemoryHistory(),
            multiline=True,
            key_bindings=_bindings(),
            enable_open_in_editor=False,
            prompt_continuation="  ",
        )

    def read(self, status: Callable[[], str]) -> str:
        """The next message.

        Args:
            status: gives the text of the status line; asked again whenever it is drawn, as when the window changes.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C; what was typed is gone.
        """
        text: str = self._session.prompt("> ", bottom_toolbar=lambda: one_line(status()))
        return strip_text_block(text)


def wants_more(text: str) -> bool:
    """True if Enter begins another line: after a backslash, and inside of a text block."""
    return text.endswith("\\") or _block_is_open(text)


def strip_text_block(text: str) -> str:
    """A message without the marks around it."""
    inner = text.strip()
    if len(inner) >= 2 * len(TEXT_BLOCK) and inner.startswith(TEXT_BLOCK) and inner.endswith(TEXT_BLOCK):
        return inner[len(TEXT_BLOCK) : -len(TEXT_BLOCK)].strip("\n")
    return text


def _block_is_open(text: str) -> bool:
    inner = text.strip()
    return inner.startswith(TEXT_BLOCK) and (inner == TEXT_BLOCK or not inner.endswith(TEXT_BLOCK))


def _whole_characters(text: str) -> str:
    """Bytes that were typed and are no UTF-8 as replacement characters: they could not be sent or remembered."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _open_history(path: Path) -> History:
    """The history in `path`, which only its owner may read; kept for this session only if that cannot be had."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = open_file(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, follow=False)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, 0o600)  # an older one may be open to others
        finally:
            os.close(descriptor)
    except OSError as exc:
        warn(f"messages are not remembered: {path}: {explain(exc)[0]}")
        return InMemoryHistory()
    return FileHistory(path)


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send_or_continue(event: KeyPressEvent) -> Any:
        buffer = event.current_buffer
        if not wants_more(buffer.text):
            buffer.text = _whole_characters(buffer.text)
            buffer.validate_and_handle()
            return
        if buffer.text.endswith("\\") and not _block_is_open(buffer.text):
            buffer.cursor_position = len(buffer.text)
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> Any:
        event.current_buffer.insert_text("\n")

    return bindings
