"""Reads a message at the terminal: line editing, history, several lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.artifact import store
from normistral.commands.console import one_line, warn
from normistral.files import explain, open_file, replace_undecodable

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

        self._problem: OSError | None = None
        history = _open_history(store.history_file(), self._note) if keep_history else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            history=history,
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
        if self._problem is not None:  # told only now: the line was still being drawn
            _warn_of_history(self._problem)
            self._problem = None
        return strip_text_block(text)

    def _note(self, problem: OSError) -> None:
        self._problem = problem


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


def _open_history(path: Path, on_error: Callable[[OSError], None]) -> History:
    """The history in `path`, which only its owner may read; kept for this session only if that cannot be had.

    Args:
        on_error: told why it could not be read or written later on.
    """
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Remembered(FileHistory):
        def load_history_strings(self) -> Iterable[str]:
            try:
                return list(super().load_history_strings())
            except OSError as exc:
                on_error(exc)
                return ()

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as exc:
                on_error(exc)

    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = open_file(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, follow=False)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(descriptor, 0o600)  # an older one may be open to others
        finally:
            os.close(descriptor)
    except OSError as exc:
        _warn_of_history(exc)
        return InMemoryHistory()
    return Remembered(path)


def _warn_of_history(exc: OSError) -> None:
    path = store.history_file()
    warn(f"messages are not remembered: {path}: {explain(exc)[0]}")


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send_or_continue(event: KeyPressEvent) -> Any:
        buffer = event.current_buffer
        if not wants_more(buffer.text):
            buffer.text = replace_undecodable(buffer.text)  # others could not be sent or remembered
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
