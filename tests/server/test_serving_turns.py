"""Prompts are prepared by tenant, counted, and not at all for those who have left."""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from processor_speed import within
from served_models import make_served, open_served, serving
from serving_clients import ask, error_of, gauge, http, wait_until

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ContextLengthError
from normistral.server import service
from normistral.server.admission import RoundRobinSemaphore
from normistral.server.auth import Keys
from normistral.server.limits import ServerLimits
from normistral.server.model_handler import ModelHandler

OLA, KARI = "key-of-ola-nordmann-1", "key-of-kari-nordmann"
KEYS = Keys({OLA: "ola", KARI: "kari"})


def test_places_go_round_the_tenants() -> None:
    async def run() -> list[str]:
        turns, got = RoundRobinSemaphore(2, 1), []

        async def work(tenant: str, number: int) -> None:
            async with turns.turn(tenant):
                got.append(f"{tenant}{number}")
                await asyncio.sleep(0.001)

        await asyncio.gather(*(work("a", i) for i in range(4)), *(work("b", i) for i in range(2)), work("c", 0))
        return got

    assert asyncio.run(run()) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]


def test_whoever_gives_up_waiting_leaves_no_gap() -> None:
    async def run() -> None:
        turns = RoundRobinSemaphore(1)
        await turns.acquire("a")
        waiting = [asyncio.ensure_future(turns.acquire("a")) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        turns.release("a")
        waiting[1].cancel()  # it has its place, and does not know yet
        await asyncio.wait_for(waiting[2], 1)
        turns.release("a")
        await asyncio.wait_for(turns.acquire("b"), 1)
        assert list(turns._waiting) == []

    asyncio.run(run())


@pytest.fixture
def slow(monkeypatch):
    """Preparing takes a quarter of a second; the prompts that were begun."""
    begun, encode = [], ModelHandler.encode_text

    def slowly(self, prompt):
        begun.append(prompt)
        time.sleep(0.25)
        return encode(self, prompt)

    monkeypatch.setattr(ModelHandler, "encode_text", slowly)
    return begun


def test_another_key_does_not_wait_for_the_prompts_of_one_that_has_left(tmp_path, slow) -> None:
    limits = ServerLimits(grace_s=0.2)
    with serving(make_served(tmp_path / "m"), limits, KEYS) as url:
        client = httpx.Client(timeout=0.4, limits=httpx.Limits(max_connections=None))

        def ask_and_leave(i: int) -> None:
            body = {"model": "m", "prompt": f"x{i}", "max_tokens": 1}
            with suppress(httpx.TimeoutException):
                client.post(f"{url}/v1/completions", json=body, headers={"authorization": f"Bearer {OLA}"})

        with ThreadPoolExecutor(40) as pool:
            sent = [pool.submit(ask_and_leave, i) for i in range(40)]
            wait_until(lambda: slow)
            began = time.monotonic()
            answer = http.post(
                f"{url}/v1/completions",
                json={"model": "m", "prompt": "y", "max_tokens": 1},
                headers={"authorization": f"Bearer {KARI}"},
                timeout=30,
            )
            waited = time.monotonic() - began
            for one in sent:
                one.result()
        assert answer.status_code == 200
        assert waited < 2.0  # 40 prompts, one after the other, take 10 s
        time.sleep(0.6)
        assert len(slow) < 15  # those whose senders had left were not begun


def test_nothing_is_printed_of_a_prompt_that_failed_after_its_sender_had_left(tmp_path, slow, capfd, caplog) -> None:
    with serving(make_served(tmp_path / "m"), ServerLimits(grace_s=0.2)) as url:
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x" * 20_000}, timeout=0.15)
        wait_until(lambda: slow)
        time.sleep(0.5)
        gc.collect()
    assert caplog.text == ""
    assert "Traceback" not in capfd.readouterr().err


def test_preparing_ends_in_time_and_frees_what_it_had(tmp_path, slow, monkeypatch) -> None:
    monkeypatch.setattr(service, "_PREPARING_THREADS", 1)
    with serving(make_served(tmp_path / "m"), ServerLimits(queue_s=0.1, jobs=2, grace_s=0.2)) as url:
        body = {"model": "m", "prompt": "x", "max_tokens": 1}
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: http.post(f"{url}/v1/completions", json=body, timeout=30), range(3)))
        assert sorted(answer.status_code for answer in answers) == [200, 429, 503]
        assert {error_of(answer)["code"] for answer in answers if answer.is_error} == {"queue_full", "queue_timeout"}
        assert ask(url, max_tokens=1).status_code == 200
        assert gauge(url, "queued_answers") == 0


def test_a_text_that_is_far_too_long_costs_next_to_nothing(tmp_path) -> None:
    """Tokenizers take up to two seconds for a megabyte, whatever it holds."""
    handler = open_served(make_served(tmp_path / "m"), ServerLimits())
    for text in (" ", "a", "\n", "\u200d", "e\u0301", "漢", "7", "-"):
        began = time.process_time()
        for encode in (
            handler.encode_text,
            lambda content: handler.fit_chat([{"role": "user", "content": content}], "error", {}),
        ):
            with pytest.raises(ContextLengthError):
                encode(text * (900_000 // len(text.encode())))
        assert within(time.process_time() - began, 0.1)


def test_others_run_while_a_long_text_is_made_into_tokens(tmp_path) -> None:
    """`tokenizers` holds the interpreter for a single text, and not for a list of them."""
    tokenizer = Tokenizer.from_folder(make_served(Path(tmp_path) / "m"))
    text = "the quick brown fox " * 40_000
    gaps, done = [], threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not done.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    token_ids = tokenizer.encode(text)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    assert token_ids == [i for piece in [tokenizer._backend.encode(text).ids] for i in piece]
    assert max(gaps) < 0.7 * seconds
