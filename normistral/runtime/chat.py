"""A conversation: whole turns in, answers out, and a KV cache that outlives them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.taint import strings_in
from normistral.artifact.tokenizer import require_unicode
from normistral.errors import UsageError
from normistral.progress import OnBytes, ignore_bytes
from normistral.runtime.chunks import Chunk, Completion, ToolCall
from normistral.runtime.options import GenerationConfig
from normistral.runtime.overflow import (
    Fitted,
    LeftOut,
    Overflow,
    answer_room,
    count_turns,
    fit_conversation,
    require_overflow,
    room_hint,
    without_oldest,
)
from normistral.runtime.runner import NonBlockingLock, Runner
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.sessions import SavedMessage, restore_sequence, save_sequence
from normistral.runtime.tools import ToolCallParser, read_tools, tool_structure

Message = dict[str, Any]


class Chat:
    """One conversation with a model; made by `Model.chat`.

    The whole conversation is rendered and tokenised for every turn, so what the model reads never depends on how it
    came about; the KV cache then keeps the common beginning, so only what is new is computed. Of a thinking model only
    the answers are kept: later turns do not see old reasoning. An answer that ended inside its reasoning is kept as "".

    Attributes:
        messages: the conversation so far, as {"role": ..., "content": ...}; read it, and change it with the methods.
            Answers that called tools have "tool_calls" too, and results "tool_call_id", as in OpenAI's API.
        dropped: messages left out of the model's view by "drop-oldest", in all. They stay in `messages`.
        left_out: what the last prompt lacked of the conversation, by `overflow`; None if it was whole.
    """

    def __init__(self, runner: Runner, template: ChatTemplate, system: str | None, overflow: Overflow) -> None:
        require_overflow(overflow)
        self.messages: list[Message] = []
        self.dropped = 0
        self.left_out: LeftOut | None = None
        self._runner = runner
        self._template = template
        self._overflow = overflow
        self._sequence: CachedSequence | None = None
        self._busy = NonBlockingLock(
            "this chat is still answering",
            "read the answer to its end, or close() its iterator; cancel() makes it end soon",
        )
        self._cancelled: threading.Event | None = None
        self.reset(system)

    @property
    def context_left(self) -> int:
        """Tokens that the next message and its answer may take together; never below 0."""
        visible, context = without_oldest(self.messages, self.dropped), self._runner.context_length
        used = len(self._template.encode(visible, add_generation_prompt=False)) if visible else 0
        if self._overflow == "cut-middle":  # then there is always room
            used = min(used, context - answer_room(context, context))
        return max(0, context - used)

    def send(self, message: str | Mapping[str, str], **options: Any) -> Completion:
        """Send a message and wait for the whole answer; arguments and errors as in `stream`."""
        return Completion.from_chunks(self.stream(message, **options))

    def stream(
        self,
        message: str | Mapping[str, str],
        *,
        tools: Sequence[Any] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        **options: Any,
    ) -> Generator[Chunk, None, None]:
        """Send a message; the answer comes chunk by chunk.

        Message and answer join `messages` when the answer ends, also when it was cancelled or the iterator is closed
        early (then with the text so far). After an error the conversation is as it was before.

        Args:
            message: text, or the results of the last answer's calls by their ids.
            tools: functions with annotations, pydantic models, or mappings with name, description and parameters (JSON
                schema). The answer's calls are in `tool_calls`; nothing is run (docs/tools.md).
            tool_choice: "auto" is text or calls, "required" calls, "none" text; another the name of the one to call.
            parallel_tool_calls: several calls in one answer.

        Raises:
            UsageError: an unknown option or wrong value, one that means nothing to this model, or an empty message.
                From the iterator: the conversation was changed after this call and before the answer began.
            ContextLengthError: the conversation does not fit and `overflow` is "error", or the message alone does not.
            BusyError: this chat is still answering.
            ClosedError: the model was closed.
        """
        known = read_tools(tools)
        thinking = self._runner.manifest.reasoning is not None
        structure = tool_structure(
            known,
            self._template.tool_format,
            tool_choice,
            parallel=parallel_tool_calls,
            text=options.get("structure"),
            thinking=thinking,
        )
        config = self._runner.resolve({**options, "structure": structure} if structure is not None else options)
        self._runner.require_open()
        asked = self._as_messages(message)
        self._busy.require_free()
        parser = ToolCallParser(None)
        described: list[dict[str, Any]] = []
        if known and tool_choice != "none":
            parser = ToolCallParser(self._template.tool_format, certain=tool_choice != "auto")
            described = [tool.described for tool in known]
        fitted = self._fit([*self.messages, *asked], config, described)
        self.left_out = fitted.left_out
        return self._answer(list(self.messages), asked, fitted.dropped, fitted.prompt_ids, config, parser)

    def cancel(self) -> None:
        """Stop the running answer within one token; may be called from any thread or a signal handler."""
        event = self._cancelled  # the answer may end meanwhile
        if event is not None:
            event.set()

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with this system message.

        Raises:
            UsageError: it is no text.
            BusyError: an answer is running.
        """
        if system is not None and not isinstance(system, str):
            raise UsageError(f"a system message is a text, not a {type(system).__name__}", "leave it out for none")
        self._busy.require_free()
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self.dropped = 0

    def undo(self) -> bool:
        """Take back the last message and its answer; False when there is none.

        Raises:
            BusyError: an answer is running.
        """
        self._busy.require_free()
        last_user = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last_user is None:
            return False
        del self.messages[last_user:]
        self.dropped = min(self.dropped, count_turns(self.messages))
        return True

    def replace(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Continue from a saved conversation.

        Raises:
            UsageError: not a list of messages with the texts "role" and "content", and of calls what `messages` has.
            BusyError: an answer is running.
        """
        self._busy.require_free()
        for message in messages:
            extra = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise UsageError('a message has exactly "role" and "content"')
            if not all(isinstance(text, str) for key, text in message.items() if key != "tool_calls"):
                raise UsageError("role and content of a message must be texts")
            if set(message) - {"role", "content"} - extra.get(message["role"], set()):
                raise UsageError('a message has exactly "role" and "content"', "calls have tool_calls and tool_call_id")
            _require_calls(message.get("tool_calls", []))
        self.messages = [dict(message) for message in messages]
        self.dropped = 0

    def fork(self) -> Chat:
        """A second conversation that goes on from here, with its own copy of history and KV cache.

        Raises:
            BusyError: an answer is running.
            EngineError: the engine failed.
            ClosedError: the model was closed.
        """
        other = Chat(self._runner, self._template, None, self._overflow)
        with self._busy.held():
            other.replace(self.messages)
            other.dropped = self.dropped
            if self._sequence is not None:
                other._sequence = self._runner.create_sequence()
                other._sequence.continue_from(self._sequence)
        return other

    def save(self, path: str | Path, on_bytes: OnBytes = ignore_bytes) -> None:
        """Write conversation and KV cache to a file, for `Model.restore_chat`; it replaces a file that is there.

        The file has permissions 0600 and is written whole or not at all.

        Args:
            on_bytes: called with the number of bytes just written, for a progress bar.

        Raises:
            BusyError: an answer is running.
            UsageError: `path` is a folder, or a message holds half a character.
            NormistralError: it cannot be written.
            ClosedError: the model was closed.
        """
        with self._busy.held():
            self._sequence = self._sequence or self._runner.create_sequence()
            messages = [SavedMessage(**message) for message in self.messages]
            for message in messages:
                require_unicode("".join(strings_in(message.as_message)))
            save_sequence(
                self._runner, self._sequence, path, on_bytes, kind="chat", messages=messages, dropped=self.dropped
            )

    def restore(self, path: str | Path, on_bytes: OnBytes) -> None:
        """For `Model.restore_chat`: become what `save` wrote there."""
        with self._busy.held():
            header, self._sequence = restore_sequence(self._runner, path, "chat", on_bytes)
            self.messages = [message.as_message for message in header.messages]
            self.dropped = min(header.dropped, count_turns(self.messages))

    def close(self) -> None:
        """Free this chat's KV cache; the chat can still be used, and then computes it anew."""
        self._busy.require_free()
        if self._sequence is not None:
            self._sequence.close()
            self._sequence = None

    def _as_messages(self, message: str | Mapping[str, str]) -> list[Message]:
        """The next messages of the conversation: the user's, or results of calls."""
        if not isinstance(message, Mapping):
            if not isinstance(message, str):
                raise UsageError(f"a message is a text, not a {type(message).__name__}", "turn it into a text")
            if not message.strip():
                raise UsageError("the message is empty", "write something")
            return [{"role": "user", "content": message}]
        asked = [call["id"] for call in self.messages[-1].get("tool_calls", ())] if self.messages else []
        if set(message) != set(asked) or not asked or not all(isinstance(text, str) for text in message.values()):
            raise UsageError("results are a text for each call of the last answer", f"calls: {', '.join(asked) or '-'}")
        return [{"role": "tool", "content": message[call_id], "tool_call_id": call_id} for call_id in asked]

    def _answer(
        self,
        before: list[Message],
        asked: list[Message],
        dropped: int,
        prompt_ids: list[int],
        config: GenerationConfig,
        parser: ToolCallParser,
    ) -> Generator[Chunk, None, None]:
        with self._busy.held():
            if self.messages != before:  # by another answer, `reset` or `undo`: the prompt is of what was there then
                raise UsageError(
                    "the conversation has changed since this message was given to stream",
                    "read each answer before you change the conversation, or give the message again",
                )
            text, failed = "", False
            try:
                with self._runner.cancellation() as event:
                    self._cancelled = event
                    self._sequence = self._sequence or self._runner.create_sequence()
                    for chunk in self._runner.run(self._sequence, prompt_ids, config, event.is_set):
                        shown, _ = parser.push(chunk.token_id, chunk.text)
                        ended = chunk.finish_reason is not None
                        shown += parser.flush() if ended else ""
                        text += shown
                        yield replace(chunk, text=shown, tool_calls=tuple(parser.calls) if ended else ())
            except Exception:
                failed = True
                raise
            finally:
                self._cancelled = None
                if not failed:
                    whole = [call.as_message for call in parser.calls if call.is_whole]
                    answer = {"role": "assistant", "content": text} | ({"tool_calls": whole} if whole else {})
                    self.messages += [*asked, answer]
                    self.dropped = dropped

    def _fit(
        self, messages: list[Message], config: GenerationConfig, tools: Sequence[Mapping[str, Any]] = ()
    ) -> Fitted:
        """The prompt, without what the policy leaves out; raises ContextLengthError where that is not enough."""
        context = self._runner.context_length
        fitted = fit_conversation(
            messages,
            lambda part: self._template.encode(part, tools=tools),
            self._runner.tokenizer,
            self._overflow,
            context - answer_room(context, config.max_new_tokens),
            self.dropped,
        )
        self._runner.require_fit(len(fitted.prompt_ids), "the conversation", room_hint(self._overflow))
        return fitted


def _require_calls(calls: Any) -> None:
    """Raise UsageError for calls that no template could write."""
    hint = "they have id, and function with name and arguments"
    try:
        read = [ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls]
        right = all(isinstance(call.id, str) and isinstance(call.name, str) and call.is_whole for call in read)
    except (LookupError, TypeError, AttributeError) as exc:
        raise UsageError("tool_calls are not those of an answer", hint) from exc
    if not right:
        raise UsageError("tool_calls are not those of an answer", hint)
