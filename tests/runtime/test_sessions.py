"""Sessions on the scripted engine: what is saved, what is refused, and what one sequence takes from another."""

import dataclasses
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scripted_models import make_model
from tiny_models import VOCABULARY

from normistral.artifact.manifest import Template
from normistral.errors import BusyError, ClosedError, EngineError, NormistralError, SessionError, UsageError
from normistral.runtime import sessions
from normistral.runtime.engines.base import CacheTensor
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.sequence import WORTH_COPYING
from normistral.runtime.sessions import SessionHeader, open_session, session_key, write_session

OPTIONS = {"max_new_tokens": 8, "ignore_eos": True, "draft": "off"}  # what is computed is counted
LONG = "Blåbærsyltetøy på brød. " * 6  # 168 tokens
HELPERS = Path(__file__).parents[1] / "helpers"


def random_model(folder, **changes):
    return make_model(folder, random_logits(VOCABULARY), context_length=800, **changes)


def base(tmp_path):
    return random_model(tmp_path / "base", role="base", template=None, adds_bos=True)


def computed(model):
    """Tokens that the engine has computed so far."""
    return sum(map(len, model._backend.forwarded))


@pytest.fixture
def model(tmp_path):
    return random_model(tmp_path / "model")


@pytest.fixture
def saved(tmp_path, model):
    """A conversation of one exchange, saved."""
    chat = model.chat(system="Svar på bokmål.")
    chat.send("Åssen går det?", **OPTIONS)
    path = tmp_path / "samtale.session"
    chat.save(path)
    return path


# Conversations


def test_a_restored_conversation_goes_on_with_the_same_tokens_and_computes_only_what_is_new(tmp_path, saved, model):
    there = model.restore_chat(saved)
    other = random_model(tmp_path / "model")
    here = other.restore_chat(saved)
    assert here.messages == there.messages
    assert [message["role"] for message in here.messages] == ["system", "user", "assistant"]
    expected, found = there.send("Og nå?", **OPTIONS), here.send("Og nå?", **OPTIONS)
    assert found.token_ids == expected.token_ids
    assert found.timings.cached_tokens > 0
    assert computed(other) == found.timings.prompt_tokens - found.timings.cached_tokens + 7


def test_half_a_character_cannot_be_saved(tmp_path, model):
    """Found by fuzzing: a system message that no answer was asked for yet."""
    chat = model.chat(system="\ud800")
    with pytest.raises(UsageError, match="half a character"):
        chat.save(tmp_path / "a.session")
    assert not (tmp_path / "a.session").exists()


def test_dropped_messages_stay_dropped(tmp_path):
    model = make_model(tmp_path, ["svar"], context_length=160)
    chat = model.chat(overflow="drop-oldest")
    for text in ("a" * 40, "b" * 40, "c" * 40):
        chat.send(text, max_new_tokens=8)
    assert chat.dropped > 0
    chat.save(tmp_path / "s")
    restored = model.restore_chat(tmp_path / "s", overflow="drop-oldest")
    assert (restored.dropped, restored.messages) == (chat.dropped, chat.messages)
    assert restored.context_left == chat.context_left


@pytest.mark.parametrize("spoken", [False, True])
def test_a_conversation_without_a_cache_can_be_saved(tmp_path, model, spoken):
    chat = model.chat(system="Svar på bokmål.")
    if spoken:
        chat.replace([{"role": "user", "content": "Hei"}, {"role": "assistant", "content": "Hei!"}])
    chat.save(tmp_path / "s")
    restored = model.restore_chat(tmp_path / "s")
    assert restored.messages == chat.messages
    assert restored.send("Ja?", **OPTIONS).timings.cached_tokens == 0


def test_an_answering_chat_is_not_saved(tmp_path, model):
    chat = model.chat()
    chunks = chat.stream("Hei", **OPTIONS)
    next(chunks)
    with pytest.raises(BusyError):
        chat.save(tmp_path / "s")
    with pytest.raises(BusyError):
        chat.fork()
    chunks.close()
    chat.save(tmp_path / "s")


def test_no_answer_begins_while_a_chat_is_saved(tmp_path, model):
    chat = model.chat()
    chat.send("Hei", **OPTIONS)
    refused = []

    def send(count):
        with pytest.raises(BusyError):
            chat.send("Hei", **OPTIONS)
        refused.append(count)

    chat.save(tmp_path / "s", on_bytes=send)
    assert refused


def test_a_closed_model_saves_and_restores_nothing(tmp_path, model, saved):
    chat, prefix = model.chat(), model.prefill("Hei")
    model.close()
    for use in (chat.save, prefix.save, model.restore_chat, model.restore_prefix):
        with pytest.raises(ClosedError):
            use(saved)
    assert random_model(tmp_path / "model").restore_chat(saved).messages


# The file


def test_only_the_owner_may_read_it(saved):
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_progress_counts_the_bytes(tmp_path, model, saved):
    chat = model.chat()
    chat.send(LONG, **OPTIONS)
    written, read = [], []
    chat.save(tmp_path / "s", on_bytes=written.append)
    model.restore_chat(tmp_path / "s", on_bytes=read.append)
    assert 0.9 * (tmp_path / "s").stat().st_size < sum(written) <= (tmp_path / "s").stat().st_size
    assert sum(read) >= len(chat._sequence._token_ids) * 8


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file_and_no_other(model, saved, failure):
    before, neighbours = saved.read_bytes(), sorted(saved.parent.iterdir())
    chat = model.chat()
    chat.send("Hei", **OPTIONS)

    def fail(count):
        raise failure

    with pytest.raises((NormistralError, KeyboardInterrupt)) as caught:
        chat.save(saved, on_bytes=fail)
    if caught.type is NormistralError:
        assert "the disk is full" in caught.value.message
    assert saved.read_bytes() == before
    assert sorted(saved.parent.iterdir()) == neighbours
    assert chat.send("Og nå?", **OPTIONS).timings.cached_tokens > 0


KILLED = """
import sys
from pathlib import Path
from scripted_models import make_model
chat = make_model(Path(sys.argv[1]), ["svar"]).chat()
chat.send("Hei")
def wait(count):
    print("writing", flush=True)
    sys.stdin.read()
chat.save(sys.argv[2], on_bytes=wait)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_ends_while_it_writes_leaves_the_old_file_whole(tmp_path, model, saved, number):
    before = saved.read_bytes()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "tokenizer"), str(saved)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(number)
        process.wait(timeout=30)
    assert saved.read_bytes() == before
    left_over = [path for path in tmp_path.iterdir() if path.name.startswith(".samtale")]
    assert len(left_over) == (number == signal.SIGKILL)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in left_over)
    model.restore_chat(saved)


def read(path):
    with open_session(path) as session:
        return list(session.tensors())


def test_every_changed_byte_is_found(saved):
    whole = saved.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        saved.write_bytes(damaged)
        with pytest.raises((SessionError, UsageError)) as caught:
            read(saved)
        assert caught.value.hint
        assert isinstance(caught.value, SessionError) or position < len(sessions.MAGIC)


def test_every_missing_end_is_found_and_so_is_one_byte_too_many(saved):
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(SessionError if length >= len(sessions.MAGIC) else UsageError):
            read(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(SessionError, match="its end does not fit"):
        read(saved)


def test_a_failed_restore_leaves_nothing_behind(model, saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-40])
    with pytest.raises(SessionError, match="ends too early"):
        model.restore_chat(saved)
    assert all(sequence._token_ids is None or sequence._engine.token_ids for sequence in model._sequences)


def write(path, model, token_ids, tensors, **changes):
    """A session whose hashes are right, whatever it says."""
    header = SessionHeader(kind="chat", key=session_key(model), artifact="x", token_ids=token_ids)
    for name, value in changes.items():
        setattr(header, name, value)
    write_session(path, header, tensors, lambda count: None)


def test_a_promise_of_more_than_there_is_allocates_nothing(tmp_path, model, monkeypatch):
    record = sessions._Record

    def huge(name, kind, shape):
        return record(name, kind, [2**31, 2**31])

    monkeypatch.setattr(sessions, "_Record", huge)
    write(tmp_path / "s", model, [5], [CacheTensor("tokens", np.array([5]))])
    monkeypatch.setattr(sessions, "_Record", record)
    with pytest.raises(SessionError, match="ends too early"):
        model.restore_chat(tmp_path / "s")


@pytest.mark.parametrize("length", [2**62, 2**31])
def test_a_header_that_is_too_long_is_not_read(model, saved, length):
    whole = saved.read_bytes()
    start = len(sessions.MAGIC) + 4
    saved.write_bytes(whole[:start] + length.to_bytes(8, "little") + whole[start + 8 :])
    with pytest.raises(SessionError, match="header is too long"):
        model.restore_chat(saved)


def test_writing_and_reading_take_the_memory_of_one_tensor(tmp_path, model):
    def tensors():
        for number in range(16):
            yield CacheTensor(f"{number}", np.full((1, 2, 2**10, 2**8), number, np.float32))  # 2 MB

    tracemalloc.start()
    try:
        write(tmp_path / "s", model, [5], tensors())
        with open_session(tmp_path / "s") as session:
            assert [tensor.array.mean() for tensor in session.tensors()] == list(range(16))
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**21
    finally:
        tracemalloc.stop()


def test_a_newer_version_asks_for_an_upgrade(model, saved):
    whole = saved.read_bytes()
    start = len(sessions.MAGIC)
    saved.write_bytes(whole[:start] + (3).to_bytes(4, "little") + whole[start + 4 :])
    with pytest.raises(SessionError, match="has version 3 of the format") as caught:
        model.restore_chat(saved)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize(
    ("token_ids", "tensors", "error"),
    [
        ([5, 6], [("tokens", [5])], EngineError),
        ([5], [("other", [5])], EngineError),
        ([5], [("tokens", [5]), ("tokens", [5])], EngineError),
        ([5], [], EngineError),
        ([], [("tokens", [5])], SessionError),
        ([VOCABULARY], [("tokens", [5])], SessionError),
        ([5] * 801, [("tokens", [5] * 801)], SessionError),
    ],
)
def test_tensors_that_are_not_this_models_are_refused(tmp_path, model, token_ids, tensors, error):
    write(tmp_path / "s", model, token_ids, [CacheTensor(name, np.array(values)) for name, values in tensors])
    with pytest.raises(error):
        model.restore_chat(tmp_path / "s")


def test_a_header_of_other_fields_is_refused(tmp_path, model, saved):
    whole = saved.read_bytes()
    start = len(sessions.MAGIC) + 12
    length = int.from_bytes(whole[start - 8 : start], "little")
    text = whole[start : start + length].replace(b'"kind":"chat"', b'"mind":"chat"')
    head = whole[:start] + text
    saved.write_bytes(head + hashlib.sha256(head).digest() + whole[start + length + 32 :])
    with pytest.raises(SessionError, match=r"damaged: .*mind"):
        model.restore_chat(saved)


def test_what_is_no_session_is_said_to_be_none(tmp_path, model):
    (tmp_path / "text").write_text("Kjære dagbok", encoding="utf-8")
    with pytest.raises(UsageError, match="is no saved session"):
        model.restore_chat(tmp_path / "text")
    with pytest.raises(UsageError, match="there is no session"):
        model.restore_chat(tmp_path / "none")
    for name in (tmp_path, "a\0b", "\ud800"):
        with pytest.raises(SessionError, match="cannot read"):
            model.restore_chat(name)
    with pytest.raises(UsageError, match="is a folder"):
        model.chat().save(tmp_path)


# What it belongs to


def test_another_artifact_is_refused(tmp_path, saved):
    with pytest.raises(SessionError, match="was saved with another artifact \\(scripted\\)"):
        random_model(tmp_path / "model", notes=("noe annet",)).restore_chat(saved)


def test_another_template_is_refused(tmp_path, saved):
    template = Template("{{ messages[0].content }}", "checkpoint")
    with pytest.raises(SessionError, match="another artifact and chat template"):
        random_model(tmp_path / "model", template=template).restore_chat(saved)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "openvino"}, "engine scripted instead of openvino"),
        ({"device": "GPU.1"}, "device none instead of GPU"),
        ({"kv_cache_key": {"KV_CACHE_PRECISION": "u8"}}, "KV_CACHE_PRECISION None instead of u8"),
    ],
)
def test_another_engine_device_or_setting_is_refused(tmp_path, saved, changes, expected):
    model = random_model(tmp_path / "model")
    model._backend.capabilities = dataclasses.replace(model.capabilities, **changes)
    with pytest.raises(SessionError, match=expected) as caught:
        model.restore_chat(saved)
    assert caught.value.hint


@pytest.mark.parametrize("change", [{"device": "none.1"}, {"settings": {"threads": "9"}}, {"prefill_chunk": 7}])
def test_what_changes_no_number_does_not_matter(tmp_path, saved, change):
    model = random_model(tmp_path / "model")
    model._backend.capabilities = dataclasses.replace(model.capabilities, **change)
    assert model.restore_chat(saved).messages


def test_a_prefix_is_no_chat(tmp_path, model, saved):
    model.prefill("Hei").save(tmp_path / "p")
    with pytest.raises(UsageError, match="is a saved prefix, not a chat"):
        model.restore_chat(tmp_path / "p")
    with pytest.raises(UsageError, match="is a saved chat, not a prefix"):
        model.restore_prefix(saved)


def test_the_header_can_be_read_alone(saved):
    with open_session(saved) as session:
        assert session.header.messages[1].content == "Åssen går det?"


# Forks


def test_a_fork_goes_on_by_itself(model):
    chat = model.chat(system="x")
    chat.send("Hei", **OPTIONS)
    before = [dict(message) for message in chat.messages]
    fork = chat.fork()
    chat.close()  # the fork's cache is its own
    start = computed(model)
    answer = fork.send("Og nå?", **OPTIONS)
    assert computed(model) - start == answer.timings.prompt_tokens - answer.timings.cached_tokens + 7
    assert answer.timings.cached_tokens > 0
    assert chat.messages == before
    assert chat.send("Og nå?", **OPTIONS).token_ids == answer.token_ids
    assert fork.messages == chat.messages


def test_a_fork_of_a_silent_chat_is_a_chat(model):
    assert model.chat(system="x").fork().send("Hei", **OPTIONS).token_ids


# What one sequence takes from another


def test_a_long_beginning_is_taken_from_a_living_neighbour(model):
    first, second = model.chat(system=LONG), model.chat(system=LONG)
    first.send("en", **OPTIONS)
    start = computed(model)
    answer = second.send("to", **OPTIONS)
    assert answer.timings.cached_tokens >= WORTH_COPYING
    assert computed(model) - start == answer.timings.prompt_tokens - answer.timings.cached_tokens + 7
    # Neither has touched the other.
    first.undo()
    assert first.send("to", **OPTIONS).token_ids == answer.token_ids


def test_generate_prefixes_and_chats_take_from_each_other(model):
    prompt = model.tokenizer.encode(LONG)
    model.generate(prompt, **OPTIONS)
    prefix = model.prefill(LONG)
    assert prefix.generate("x", **OPTIONS).timings.cached_tokens >= len(prompt) - 1
    model.generate("noe annet", **OPTIONS)
    assert model.generate([*prompt, 7], **OPTIONS).timings.cached_tokens >= len(prompt) - 1


@pytest.mark.parametrize(("length", "taken"), [(WORTH_COPYING - 1, 0), (WORTH_COPYING, WORTH_COPYING)])
def test_a_short_beginning_is_computed(model, length, taken):
    prompt = [5 + i % 200 for i in range(length)]
    prefix = model.prefill([*prompt, 9])
    assert model.generate([*prompt, 7, 7], **OPTIONS).timings.cached_tokens == taken
    prefix.close()


def test_closed_chats_leave_nothing(model):
    chat = model.chat(system=LONG)
    chat.send("en", **OPTIONS)
    chat.close()
    assert model.chat(system=LONG).send("to", **OPTIONS).timings.cached_tokens == 0
    chat = model.chat(system=LONG)
    chat.send("en", **OPTIONS)
    del chat
    assert model.chat(system=LONG).send("tre", **OPTIONS).timings.cached_tokens == 0


def test_a_neighbour_whose_cache_is_unknown_gives_nothing(model):
    chat = model.chat(system=LONG)
    chat.send("en", **OPTIONS)
    chat._sequence._token_ids = None  # as after an interrupted forward
    assert model.chat(system=LONG).send("to", **OPTIONS).timings.cached_tokens == 0


def test_a_neighbour_that_is_closed_meanwhile_is_done_without(model, monkeypatch):
    chat, other = model.chat(system=LONG), model.chat(system=LONG)
    expected = chat.send("en", **OPTIONS)

    def closed(length):
        raise ClosedError("the model was closed")

    monkeypatch.setattr(chat._sequence._engine, "save", closed)
    answer = other.send("en", **OPTIONS)
    assert answer.timings.cached_tokens == 0
    assert answer.token_ids == expected.token_ids


def test_conversations_in_threads_share_and_stay_apart(tmp_path, model):
    texts = [f"{LONG}{name}" for name in ("en", "to", "tre", "fire", "fem", "seks")]
    expected = [make(tmp_path, text) for text in texts]
    start = threading.Barrier(len(texts))

    def talk(text):
        chat = model.chat(system=LONG)
        start.wait()
        return [chat.send(text, **OPTIONS).token_ids, chat.send("videre", **OPTIONS).token_ids]

    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(3):
            assert list(pool.map(talk, texts)) == expected


def make(tmp_path, text):
    chat = random_model(tmp_path / "model").chat(system=LONG)
    return [chat.send(text, **OPTIONS).token_ids, chat.send("videre", **OPTIONS).token_ids]


# Prefixes


@pytest.fixture
def base_model(tmp_path):
    return base(tmp_path)


def test_a_document_is_computed_once_for_all_questions_and_files(tmp_path, base_model):
    document = base_model.prefill(LONG)
    assert computed(base_model) == len(base_model.tokenizer.encode(LONG))
    document.save(tmp_path / "d")
    other = base(tmp_path)
    restored = other.restore_prefix(tmp_path / "d")
    fresh = base(tmp_path)
    for question in ("Hva?", "Når?", "Hvorfor ikke?"):
        expected = fresh.generate(LONG + question, **OPTIONS).token_ids
        for prefix in (document, restored):
            answer = prefix.generate(question, **OPTIONS)
            assert answer.token_ids == expected
            assert answer.timings.prompt_tokens - answer.timings.cached_tokens == len(question.encode())
    assert computed(other) == 3 * 7 + len("Hva?Når?Hvorfor ikke?".encode())


def test_a_prefix_can_be_saved_after_questions(tmp_path, base_model):
    document = base_model.prefill(LONG)
    document.generate("Hva?", **OPTIONS)
    document.save(tmp_path / "d")
    with open_session(tmp_path / "d") as session:
        assert session.header.token_ids == base_model.tokenizer.encode(LONG)
        assert session.header.prefix == LONG


def test_a_prefix_of_token_ids_is_continued_by_token_ids(tmp_path, base_model):
    document = base_model.prefill([5, 6, 7])
    document.save(tmp_path / "d")
    restored = base_model.restore_prefix(tmp_path / "d")
    assert restored.generate([8], **OPTIONS).token_ids == base_model.generate([5, 6, 7, 8], **OPTIONS).token_ids
    with pytest.raises(UsageError, match="this prefix is token ids"):
        restored.generate("tekst")
    with pytest.raises(UsageError, match="this prefix is a text"):
        base_model.prefill("tekst").generate([5])


def test_a_closed_prefix_is_computed_anew(base_model):
    document = base_model.prefill(LONG)
    expected = document.generate("Hva?", **OPTIONS)
    document.close()
    answer = document.generate("Hva?", **OPTIONS)
    assert answer.token_ids == expected.token_ids
    assert answer.timings.cached_tokens == 0


def test_a_prefix_does_one_thing_at_a_time(tmp_path, base_model):
    document = base_model.prefill("Hei")
    chunks, late = document.stream("du", **OPTIONS), document.stream("der", **OPTIONS)
    next(chunks)
    for use in (
        lambda: document.generate("x"),
        lambda: document.save(tmp_path / "d"),
        document.close,
        lambda: next(late),
    ):
        with pytest.raises(BusyError):
            use()
    chunks.close()
    assert document.generate("du", **OPTIONS).token_ids
