"""`--prefix NAME=FILE`: beginnings of prompts that are in the KV cache from the start, for all keys."""

import numpy as np
import pytest
from served_models import make_served, open_served
from serving_clients import ask
from tiny_models import make_llama

import normistral
from normistral.errors import NormistralError, SessionError, UsageError
from normistral.runtime.chunks import Completion
from normistral.runtime.engines.block_pool import BLOCK_TOKENS
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.backends.base import BatchSettings, Job
from normistral.server.backends.create import create_backend
from normistral.server.backends.prefixes import NamedPrefix
from normistral.server.limits import ServerLimits
from normistral.server.prefixes import add_prefixes, read_prefixes
from normistral.server.server import background_server

CONTEXT = 256
TOKENS = tuple(np.random.default_rng(3).integers(5, 200, 150).tolist())
WHOLE = len(TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
LIMITS = ServerLimits(grace_s=0.2)
DOCUMENT = "Kommunen vedtok tirsdag å bygge ny skole på Åsen, som skal stå ferdig i 2029. " * 3


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    checkpoint = make_llama(tmp_path_factory.mktemp("checkpoint") / "llama", positions=CONTEXT)
    output = tmp_path_factory.mktemp("artifacts") / "tiny-llama"
    normistral.export_model(str(checkpoint), output, weights="fp16")
    return output


def create(artifact, *prefixes, batching="auto", slots=4):
    settings = BatchSettings(batching, 64 * 2**20, CONTEXT, slots)
    return create_backend(artifact, settings, EngineConfig(exact=True), prefixes=prefixes)


def answer(batch, prompt_ids, tenant, **options) -> Completion:
    config = GenerationConfig(max_new_tokens=8, temperature=0.0, **options)
    batch.add(Job(f"{tenant}-{len(prompt_ids)}", list(prompt_ids), config, tenant))
    chunks = []
    while not batch.idle:
        for _, output in batch.step():
            assert not isinstance(output, NormistralError), output
            chunks.append(output)
    return Completion.from_chunks(chunks)


@pytest.mark.parametrize("batching", ["auto", "off"])
def test_every_key_begins_with_it_and_with_nothing_of_another(artifact, batching) -> None:
    with normistral.load(artifact, exact=True) as model:
        question = [*TOKENS, *range(10, 60)]
        expected = model.generate(question, max_new_tokens=8, temperature=0.0, draft="off").token_ids
    created = create(artifact, NamedPrefix("p", TOKENS), batching=batching)
    batch, found = created.batch, WHOLE if batching == "auto" else len(TOKENS)
    try:
        for tenant in ("ola", "kari"):
            got = answer(batch, question, tenant)
            assert got.token_ids == expected
            assert got.timings.cached_tokens == found, tenant
        assert answer(batch, question, "kari").timings.cached_tokens > found  # her own goes on from there
        assert answer(batch, question, "per").timings.cached_tokens == found
        changed = [*TOKENS[: WHOLE - 1], 4, *range(10, 60)]
        assert answer(batch, changed, "per").timings.cached_tokens < WHOLE  # at most what is his own
        assert answer(batch, changed, "anne").timings.cached_tokens == 0
        (prefix,) = created.prefixes
        assert not prefix.restored
        assert prefix.describe().startswith("prefix p: 150 tokens, computed in ")
    finally:
        batch.close()


def test_it_is_not_evicted(artifact) -> None:
    batch = create(artifact, NamedPrefix("p", TOKENS), slots=1).batch
    try:
        for number in range(12):
            other = [5 + number, *TOKENS[1:], *range(10, 60)]
            assert answer(batch, other, f"tenant-{number}").timings.cached_tokens == 0
        assert answer(batch, [*TOKENS, 7, 8], "ola").timings.cached_tokens == WHOLE
    finally:
        batch.close()


def test_the_longest_of_several_is_taken(artifact) -> None:
    prefixes = NamedPrefix("short", TOKENS[:70]), NamedPrefix("long", TOKENS), NamedPrefix("other", TOKENS[::-1])
    batch = create(artifact, *prefixes).batch
    try:
        assert answer(batch, [*TOKENS, 7], "ola").timings.cached_tokens == WHOLE
        assert answer(batch, [*TOKENS[:100], 4, 5], "ola").timings.cached_tokens == 64
        assert answer(batch, [*TOKENS[::-1], 7], "ola").timings.cached_tokens == WHOLE
    finally:
        batch.close()


def test_it_is_kept_for_the_next_start(artifact, tmp_path, caplog) -> None:
    place = tmp_path / "cache" / "p"

    def start(token_ids=TOKENS) -> bool:
        created = create(artifact, NamedPrefix("p", token_ids, kept=str(place)))
        (prefix,) = created.prefixes
        assert answer(created.batch, [*token_ids, 7], "ola").timings.cached_tokens == WHOLE
        created.batch.close()
        return prefix.restored

    assert not start()
    assert place.stat().st_mode & 0o77 == 0
    assert start()
    assert not start(TOKENS[::-1])  # the text has changed
    assert start(TOKENS[::-1])
    place.write_bytes(place.read_bytes()[:-100])
    assert not start(TOKENS[::-1])
    assert start(TOKENS[::-1])
    assert not caplog.text
    place.unlink()
    place.mkdir()
    assert not start()
    assert "the prefix p is not kept for the next start" in caplog.text


def test_one_that_the_library_saved(artifact, tmp_path) -> None:
    file, chat = tmp_path / "p.session", tmp_path / "chat.session"
    with normistral.load(artifact, exact=True) as model:
        model.prefill(DOCUMENT).save(file)
        conversation = model.chat()
        conversation.send("Hei", max_new_tokens=2)
        conversation.save(chat)
    handler = open_served(artifact, LIMITS)
    (one,) = add_prefixes([handler], read_prefixes([f"p={file}"]))
    assert one.memory_bytes > handler.memory_bytes
    (named,) = one.load.prefixes
    created = create(artifact, named)
    assert created.prefixes[0].restored
    prompt = handler.tokenizer.encode(DOCUMENT + "\nHva?")
    assert answer(created.batch, prompt, "ola").timings.cached_tokens >= BLOCK_TOKENS
    created.batch.close()
    with pytest.raises(SessionError, match="holds another prefix"):
        create(artifact, NamedPrefix("p", TOKENS, saved=str(file)))
    with pytest.raises(UsageError, match="is a saved chat, not a prefix"):
        read_prefixes([f"p={chat}"])
    other = open_served(make_served(tmp_path / "other"), LIMITS)
    with pytest.raises(UsageError, match="was saved with another artifact"):
        add_prefixes([other], read_prefixes([f"p={file}"]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("p", "is no NAME=FILE"),
        ("=text", "is no NAME=FILE"),
        ("../p=text", "is no NAME=FILE"),
        ("p=", "is no NAME=FILE"),
        ("p=missing", "cannot read missing"),
        ("p=latin", "is not UTF-8"),
        ("p=.", "cannot read ."),
    ],
)
def test_wrong_values(value, words, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("Hei")
    (tmp_path / "latin").write_bytes("blåbær".encode("latin1"))
    with pytest.raises(UsageError, match=words):
        read_prefixes([value])
    with pytest.raises(UsageError, match="two prefixes are called p"):
        read_prefixes(["p=text", "p=text"])


@pytest.mark.parametrize(("text", "hint"), [("Hei", "leave it out"), (DOCUMENT * 20, "shorten it")])
def test_too_short_and_too_long(text, hint, tmp_path) -> None:
    handler = open_served(make_served(tmp_path / "m"), LIMITS)
    (tmp_path / "text").write_text(text)
    with pytest.raises(UsageError, match=r"the prefix p has \d+ tokens; m can keep from 33 to 399") as caught:
        add_prefixes([handler], read_prefixes([f"p={tmp_path / 'text'}"]))
    assert caught.value.hint == hint


def test_conversations_with_it_as_their_system_message(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "home"))
    folder = make_served(tmp_path / "m", answers=["Hei!"] * 50)
    (tmp_path / "text").write_text(DOCUMENT + "\n")
    keys = Keys({"k" * 20: "ola", "l" * 20: "kari"})

    def start():
        files = read_prefixes([f"vedtak={tmp_path / 'text'}"])
        handlers = add_prefixes([open_served(folder, LIMITS)], files)
        return background_server(create_app(handlers, LIMITS, keys, worker_module="served_models"))

    def cached(url: str, key: str, system: str) -> int:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hva?"}]
        got = ask(url, key=key, messages=messages, ignore_eos=False)
        assert got.status_code == 200, got.text
        return got.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    for _ in range(2):
        with start() as url:
            for key in ("k" * 20, "l" * 20):
                assert cached(url, key, DOCUMENT.strip()) > 128
                assert cached(url, key, DOCUMENT + "\n\nSvar kort.") > 128
            assert cached(url, "l" * 20, DOCUMENT[1:]) == 0
        (kept,) = (tmp_path / "home" / "cache" / "prefixes").iterdir()
        assert kept.name.startswith("vedtak-")
