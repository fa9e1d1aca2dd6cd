"""Conversations used in any order, against a list of messages that says what they should be."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import pytest
from fuzzing import examples, hostile_texts, is_unicode, require_readable
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from scripted_models import make_model
from tiny_models import VOCABULARY

from normistral.errors import BusyError, ContextLengthError, NormistralError, UsageError
from normistral.runtime.engines.scripted import random_logits

OPTIONS = {"max_new_tokens": 6, "draft": "off", "seed": 1}
CONTEXT = 300
texts = st.sampled_from(["Hei", "Åssen går det?", "b" * 40, "c" * 90]) | hostile_texts(4)


@dataclasses.dataclass
class Expected:
    messages: list[dict[str, str]]
    overflow: str


class Conversations(RuleBasedStateMachine):
    """Several chats of one model; a second model that caches nothing knows the answers."""

    chats = Bundle("chats")
    files = Bundle("files")

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = make_model(self.folder / "model", random_logits(VOCABULARY), context_length=CONTEXT)
        self.judge = make_model(self.folder / "judge", random_logits(VOCABULARY), context_length=CONTEXT)
        self.expected = {}
        self.saved = {}

    def teardown(self):
        self.model.close()
        self.judge.close()
        shutil.rmtree(self.folder)

    @rule(target=chats, system=st.none() | texts, overflow=st.sampled_from(["error", "drop-oldest", "cut-middle"]))
    def start(self, system, overflow):
        chat = self.model.chat(system=system, overflow=overflow)
        messages = [] if system is None else [{"role": "system", "content": system}]
        self.expected[chat] = Expected(messages, overflow)
        return chat

    @rule(chat=chats, text=texts)
    def send(self, chat, text):
        expected = self.expected[chat]
        fresh = self.judge.chat(overflow=expected.overflow)
        fresh.replace(expected.messages)
        fresh.dropped = chat.dropped  # what was left out once stays out
        outcome = self.outcome(fresh, text)
        assert self.outcome(chat, text) == outcome
        fresh.close()
        if not isinstance(outcome, type):
            expected.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": outcome[1]}]

    @staticmethod
    def outcome(chat, text):
        """Token ids and text of the answer, or the kind of error."""
        try:
            answer = chat.send(text, **OPTIONS)
        except (UsageError, ContextLengthError) as error:
            require_readable(error)
            return type(error)
        assert is_unicode(answer.text)
        return answer.token_ids, answer.text, chat.dropped

    @rule(chat=chats, text=texts, chunks=st.integers(0, 3), stop=st.sampled_from(["cancel", "close"]))
    def begin_and_stop(self, chat, text, chunks, stop):
        """While it answers, everything else is refused; what was said so far is kept."""
        expected = self.expected[chat]
        try:
            stream = chat.stream(text, **OPTIONS)
        except (UsageError, ContextLengthError):
            return
        said, begun = "", False
        for _ in range(chunks):
            if (chunk := next(stream, None)) is None:
                break
            said, begun = said + chunk.text, True
            if chunk.finish_reason is None:
                self.refuses_everything(chat)
        if stop == "cancel":
            chat.cancel()
            for chunk in stream:
                said, begun = said + chunk.text, True
        else:
            stream.close()
        if begun:
            expected.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

    def refuses_everything(self, chat):
        for call in (
            lambda: chat.send("Hei"),
            chat.undo,
            chat.reset,
            chat.fork,
            chat.close,
            lambda: chat.replace([]),
            lambda: chat.save(self.folder / "busy"),
        ):
            with pytest.raises(BusyError):
                call()

    @rule(chat=chats)
    def undo(self, chat):
        messages = self.expected[chat].messages
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        assert chat.undo() == bool(users)
        if users:
            del messages[users[-1] :]

    @rule(chat=chats, system=st.none() | texts)
    def reset(self, chat, system):
        chat.reset(system)
        self.expected[chat].messages[:] = [] if system is None else [{"role": "system", "content": system}]

    @rule(
        chat=chats,
        messages=st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": texts}),
            max_size=4,
        ),
    )
    def replace(self, chat, messages):
        chat.replace(messages)
        self.expected[chat].messages[:] = [dict(message) for message in messages]

    @rule(chat=chats, wrong=st.sampled_from([[{}], [{"role": "user"}], [{"role": 1, "content": "x"}], [None], ["x"]]))
    def replace_by_something_wrong(self, chat, wrong):
        with pytest.raises(UsageError):
            chat.replace(wrong)

    @rule(target=chats, chat=chats)
    def fork(self, chat):
        other = chat.fork()
        expected = self.expected[chat]
        self.expected[other] = Expected([dict(message) for message in expected.messages], expected.overflow)
        return other

    @rule(chat=chats)
    def close(self, chat):
        chat.close()

    @rule(target=files, chat=chats)
    def save(self, chat):
        path = self.folder / f"{len(self.saved)}.session"
        try:
            chat.save(path)
        except NormistralError:
            assert not all(is_unicode(m["content"]) and is_unicode(m["role"]) for m in chat.messages)
            assert not path.exists()
            return multiple()
        messages = [dict(message) for message in self.expected[chat].messages]
        self.saved[path] = (messages, chat.dropped)
        return path

    @rule(target=chats, path=files, overflow=st.sampled_from(["error", "drop-oldest", "cut-middle"]))
    def restore(self, path, overflow):
        chat = self.model.restore_chat(path, overflow=overflow)
        messages, dropped = self.saved[path]
        assert chat.dropped == dropped
        self.expected[chat] = Expected([dict(message) for message in messages], overflow)
        return chat

    @rule(path=consumes(files), position=st.integers(0, 2**20), bit=st.integers(0, 7))
    def damage(self, path, position, bit):
        raw = bytearray(path.read_bytes())
        raw[position % len(raw)] ^= 1 << bit
        path.write_bytes(raw)
        with pytest.raises(NormistralError):
            self.model.restore_chat(path)

    @invariant()
    def each_chat_has_its_own_messages(self):
        for chat, expected in self.expected.items():
            assert chat.messages == expected.messages
            assert 0 <= chat.dropped <= len(chat.messages)

    @invariant()
    def room_is_never_negative(self):
        for chat in self.expected:
            try:
                assert 0 <= chat.context_left <= CONTEXT
            except UsageError:
                assert not all(is_unicode(m["content"]) for m in chat.messages)


TestConversations = Conversations.TestCase
TestConversations.settings = examples(12, stateful_step_count=15)
