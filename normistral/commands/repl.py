"""Interactive chat: reads messages, streams answers, and runs commands that begin with a slash."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from normistral.commands.answer import describe_missing_answer, describe_timings
from normistral.commands.console import (
    AnswerWriter,
    format_columns,
    is_verbose,
    print_error,
    print_lines,
    say,
    warn,
)
from normistral.commands.line_editor import TEXT_BLOCK, LineEditor
from normistral.commands.saved_chats import load_conversation, save_conversation, save_session
from normistral.commands.translate import translate
from normistral.commands.wrapping import cell_width, terminal_columns
from normistral.errors import ContextLengthError, NormistralError, UsageError
from normistral.runtime.chunks import FinishReason, Timings

if TYPE_CHECKING:
    from normistral.runtime.chat import Chat
    from normistral.runtime.model import Model

_LEAVING_WORDS = ("exit", "quit")  # alone in a message; nobody means the model
_SIGNALLED = 128  # an exit code is this and the signal's number, as a shell reports it
_LITTLE_CONTEXT_SHARE = 10  # warn when less than a tenth of the context is left


class Repl:
    """One session.

    Args:
        model: for its name and settings.
        chat: the conversation; also of `model`.
        options: of every answer, as `Chat.stream` takes them.
        editor: reads the messages.
        hide_reasoning: say that a thinking model thinks, and not what.
        session: where conversation and KV cache are saved at the end, and by /save without a file.
    """

    def __init__(
        self,
        model: Model,
        chat: Chat,
        options: dict[str, Any],
        editor: LineEditor,
        *,
        hide_reasoning: bool = False,
        session: Path | None = None,
    ) -> None:
        self._model, self._chat, self._options, self._editor = model, chat, options, editor
        self._hide_reasoning = hide_reasoning
        self._session = session
        self._timings: list[Timings] = []  # of this session's answers
        self._context_left = chat.context_left  # counting it tokenises the conversation: once a turn is enough
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "reset": ("", "begin anew; the system message stays", self._reset),
            "system": ("TEXT", 'set the system message; without TEXT show it; "" removes it', self._system),
            "undo": ("", "take back the last message and its answer", self._undo),
            "save": ("FILE", "save the conversation; /save! FILE overwrites; alone: the --session", self._save),
            "save!": ("FILE", "", lambda argument: self._save(argument, overwrite=True)),
            "load": ("FILE", "continue a saved conversation", self._load),
            "stats": ("", "speed, and how much room is left", self._stats),
            "exit": ("", "leave (so do Ctrl-D, exit and quit)", self._exit),
            "quit": ("", "", self._exit),
        }
        self._leaving = self._cannot_save = False

    def run(self) -> None:
        """Talk until the user leaves, or the terminal is closed, then save the session."""
        say(f"{self._model.name}: /help lists the commands, Ctrl-D leaves, Ctrl-C stops an answer")
        with _ending_on_signals():
            try:
                self._talk()
            except BaseException:
                if self._session is not None:
                    save_session(self._chat, self._session)
                raise

    def _talk(self) -> None:
        while not self._leaving:
            try:
                text = self._editor.read(self.status)
            except EOFError:
                self._exit("")
                continue
            except KeyboardInterrupt:
                continue  # the line is gone, the session is not
            try:
                self.handle(text)
            except NormistralError as error:
                print_error(error.message, error.hint)

    def handle(self, text: str) -> None:
        """Run a command, or answer a message; an empty one is ignored."""
        if not text.strip():
            return
        if text.strip().lower() in _LEAVING_WORDS:
            self._exit("")
        elif text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            self._obey(text[1:])
        else:
            self._answer(text)

    def status(self) -> str:
        """The status line: as much of it as the terminal has room for."""
        name, last = self._model.name, self._timings[-1] if self._timings else None
        speed = [] if last is None else [translate(f"{last.tokens_per_s:.1f} tokens/s")]
        first = [] if last is None else [translate(f"first token after {last.ttft_s:.2f} s")]
        of = self._model.context_length
        candidates = (
            [name, *speed, *first, translate(f"{self._context_left:,} of {of:,} tokens of context left")],
            [name, *speed, translate(f"{self._context_left:,} of {of:,} tokens left")],
            [*speed, translate(f"{self._context_left:,} tokens left")],
        )
        lines = [" · ".join(parts) for parts in candidates]
        columns = terminal_columns(sys.stdout)
        return next((line for line in lines if cell_width(line) < columns), lines[-1])

    def _answer(self, message: str) -> None:
        writer = AnswerWriter(None if self._hide_reasoning else sys.stdout)
        finish_reason: FinishReason | None = None
        thinking = thought = answered = False
        try:
            with _interruptible(self._chat.cancel) as interrupted, ExitStack() as stack:
                before = self._chat.left_out
                stream = stack.enter_context(closing(self._chat.stream(message, **self._options)))
                if self._chat.left_out not in (None, before):
                    warn(self._chat.left_out.describe())
                if interrupted():  # before there was anything to cancel: nothing was sent
                    return
                for chunk in stream:
                    thinking, answered = chunk.reasoning_open, answered or chunk.text != ""
                    if thinking and not thought and self._hide_reasoning:
                        say("(thinking ...)")
                    thought = thought or thinking
                    writer.write(chunk.text, chunk.reasoning)
                    finish_reason = chunk.finish_reason
                    timings = chunk.timings
        except KeyboardInterrupt:  # a second Ctrl-C: the chat has kept the text so far
            finish_reason = "cancelled"
        except ContextLengthError as error:
            raise ContextLengthError(error.message, _room_hint(self._chat)) from error
        else:
            self._timings.append(timings)
        finally:
            writer.end()
            self._context_left = self._chat.context_left
        if finish_reason is not None and thinking and not answered:
            warn(describe_missing_answer(finish_reason))
            self._warn_of_little_context()
        else:
            self._comment(finish_reason)

    def _comment(self, finish_reason: FinishReason | None) -> None:
        """Say what the answer does not: that it is not whole, or that the context fills up."""
        if finish_reason == "cancelled":
            say("(stopped; the text so far is part of the conversation, /undo takes it back)")
        elif finish_reason == "length":
            say("(cut off: this is the most tokens of an answer; --max-new-tokens N allows others)")
        elif finish_reason == "context":
            warn("cut off: the context is full; /undo or /reset makes room")
        if finish_reason != "context":
            self._warn_of_little_context()

    def _warn_of_little_context(self) -> None:
        if self._context_left < self._model.context_length // _LITTLE_CONTEXT_SHARE:
            warn(f"only {self._context_left} tokens of context are left; /reset or /undo makes room")

    def _obey(self, line: str) -> None:
        name = line[: next((i for i, character in enumerate(line) if character.isspace()), len(line))]
        argument = line[len(name) :].strip()
        if name not in self._commands:
            raise UsageError(f"no command /{name}", self._suggest(name))
        takes, _, action = self._commands[name]
        if argument and not takes:
            raise UsageError(f"/{name} takes nothing after it, not {argument!r}", "/help lists the commands")
        action(argument)
        self._context_left = self._chat.context_left

    def _suggest(self, name: str) -> str:
        close = get_close_matches(name.lower(), self._commands, n=1)
        hint = "/help lists the commands; // at the beginning sends a /"
        return f"did you mean /{close[0]}? {hint}" if close else hint

    def _help(self, _: str) -> None:
        rows = [
            (f"/{name} {translate(takes)}".rstrip(), translate(what))
            for name, (takes, what, _) in self._commands.items()
            if what
        ]
        keys = [
            ("//TEXT", "send a message that begins with a slash"),
            ("Enter", "send the message"),
            ("Alt-Enter", "another line; so does a backslash at the end of a line"),
            (TEXT_BLOCK, f"begins a text of several lines; {TEXT_BLOCK} ends it. Pasted text keeps its lines."),
            ("Ctrl-C", "stop the answer, or clear the message"),
            ("Arrow up", "an earlier message; Ctrl-R searches them"),
        ]
        print_lines([format_columns([*rows, *((translate(key), translate(what)) for key, what in keys)], indent=2)])

    def _reset(self, _: str) -> None:
        self._chat.reset(system=self._system_message())
        say("(a new conversation)")

    def _system(self, text: str) -> None:
        if not text:
            current = self._system_message()
            print_lines([translate("no system message") if current is None else current])
            return
        turns = [message for message in self._chat.messages if message["role"] != "system"]
        system = [] if text == '""' else [{"role": "system", "content": text}]
        self._chat.replace([*system, *turns])
        say("(the system message is removed)" if not system else "(the system message is set)")

    def _undo(self, _: str) -> None:
        say("(the last message and its answer are taken back)" if self._chat.undo() else "(nothing to take back)")

    def _save(self, file: str, *, overwrite: bool = False) -> None:
        if not file and self._session is not None:
            save_session(self._chat, self._session)
            return
        path = save_conversation(
            file, self._chat.messages, artifact=self._model.name, settings=self._options, overwrite=overwrite
        )
        say(f"(saved {len(self._chat.messages)} messages to {path})")

    def _load(self, file: str) -> None:
        conversation = load_conversation(file)
        self._chat.replace(conversation.messages)
        self._context_left = self._chat.context_left
        other = f", which were with {conversation.artifact}" if conversation.artifact != self._model.name else ""
        say(f"(loaded {len(conversation.messages)} messages{other})")
        self._warn_of_little_context()

    def _stats(self, _: str) -> None:
        timings, capabilities = self._timings, self._model.capabilities
        left, length = self._chat.context_left, self._model.context_length
        rows = [
            ("model", f"{self._model.name}, {capabilities.name} on {capabilities.device}"),
            ("messages", f"{len(self._chat.messages)} in this conversation"),
            ("room", f"{left:,} of {length:,} tokens are left; a token is a short word or a part of one"),
        ]
        if self._chat.left_out is not None:
            rows.append(("left out", self._chat.left_out.describe()))
        if self._options:
            rows.append(("options", ", ".join(f"{key} {value}" for key, value in self._options.items())))
        if timings:
            answers, decode_s = len(timings), sum(one.decode_s for one in timings)
            prompt_tokens = sum(one.prompt_tokens for one in timings)
            cached_tokens = sum(one.cached_tokens for one in timings)
            new_tokens = sum(one.new_tokens for one in timings)
            rows += [
                ("last answer", describe_timings(timings[-1])),
                ("all answers", f"{answers} with {new_tokens:,} tokens in {decode_s:.1f} s"),
                ("read", f"{prompt_tokens:,} tokens, {cached_tokens:,} of them known from before"),
            ]
        if is_verbose():
            settings = ", ".join(f"{key}={value}" for key, value in capabilities.settings.items())
            rows.append(("settings", settings or "none"))
        print_lines([format_columns([(translate(name), translate(text)) for name, text in rows], indent=2)])

    def _exit(self, _: str) -> None:
        if self._session is not None and not self._cannot_save:
            try:
                save_session(self._chat, self._session)
            except NormistralError as error:
                self._cannot_save = True
                print_error(error.message, error.hint)
                say("(the session is not saved; /save FILE keeps what was said; leave again to give it up)")
                return
        self._leaving = True

    def _system_message(self) -> str | None:
        messages = self._chat.messages
        return messages[0]["content"] if messages and messages[0]["role"] == "system" else None


@contextmanager
def _interruptible(cancel: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C call `cancel`, and a second one raise KeyboardInterrupt; gives whether there was one."""
    presses = 0

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt
        cancel()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let a closed terminal (SIGHUP) and SIGTERM end the conversation by SystemExit, and only the first of them."""
    names = ("SIGHUP", "SIGTERM")  # Windows has no SIGHUP; after nohup it is ignored
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for one in handled:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(_SIGNALLED + number)

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _room_hint(chat: Chat) -> str:
    if len(chat.messages) < 2:
        return "shorten the message"
    return "/undo takes back the last exchange, /reset begins anew; --overflow says what else may be left out"
