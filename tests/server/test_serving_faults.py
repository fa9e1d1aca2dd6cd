"""Clients that leave, workers that die, queues that are full, signals: what each request gets."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from served_models import make_served, serving
from serving_clients import ask, gauge, http, stream, wait_until

from normistral.errors import EngineError
from normistral.runtime.engines.settings import EngineConfig
from normistral.server import completions
from normistral.server.auth import Keys
from normistral.server.backends.base import BatchSettings
from normistral.server.ipc import Load
from normistral.server.limits import ServerLimits
from normistral.server.metrics import Metrics
from normistral.server.middleware import RequestMiddleware
from normistral.server.worker_client import WorkerClient

MESSAGES = [{"role": "user", "content": "Hei"}]
LOAD = Load(b"m", EngineConfig(), BatchSettings("auto", 0, 0))
QUICK = ServerLimits(grace_s=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random text, 5 ms a token."""
    return make_served(tmp_path_factory.mktemp("served") / "m", pause_s=0.005, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder, QUICK) as url:
        yield url


def test_a_stream_that_is_left_frees_its_slot(url) -> None:
    with stream(url, max_tokens=300) as answer:
        lines = answer.iter_lines()  # the response is closed with it
        next(lines)
        assert gauge(url, "running_answers") == 1
    wait_until(lambda: gauge(url, "running_answers") == 0, 1.0)  # 300 tokens would take 1.5 s
    assert gauge(url, "cancelled_answers_total") >= 1


def test_a_whole_answer_that_nobody_waits_for_frees_its_slot(url) -> None:
    with pytest.raises(httpx.ReadTimeout):
        http.post(
            f"{url}/v1/chat/completions",
            json={"model": "m", "messages": MESSAGES, "max_tokens": 300, "n": 8, "ignore_eos": True},
            timeout=0.2,
        )
    wait_until(lambda: gauge(url, "running_answers") == 0, 1.0)
    assert gauge(url, "queued_answers") == 0


def test_health_answers_while_the_engine_computes(url) -> None:
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, url, max_tokens=50) for _ in range(4)]
        while not all(answer.done() for answer in answers):
            assert http.get(f"{url}/health", timeout=1).json() == {"status": "ok"}
    assert {answer.result().status_code for answer in answers} == {200}


def test_many_at_once_get_their_own_answers(folder, url) -> None:
    asked = [f"spørsmål {i}" for i in range(24)]
    alone = [ask(url, content=text, max_tokens=6).json()["choices"][0]["message"]["content"] for text in asked]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda text: ask(url, content=text, max_tokens=6).json(), asked))
    assert [document["choices"][0]["message"]["content"] for document in together] == alone


def test_too_many_are_told_when_to_come_again(folder) -> None:
    keys = Keys({"key-of-ola-nordmann": "ola", "key-of-kari-nordmann": "kari"})
    limits = ServerLimits(jobs=4, tenant_jobs=3, grace_s=0.2)
    with serving(folder, limits, keys, slots=1) as url, ThreadPoolExecutor() as pool:
        ola = [pool.submit(ask, url, key="key-of-ola-nordmann", max_tokens=100) for _ in range(3)]
        known = {"authorization": "Bearer key-of-ola-nordmann"}
        wait_until(lambda: 'queued_answers{model="m"} 2.0' in http.get(f"{url}/metrics", headers=known).text)
        refused = ask(url, key="key-of-ola-nordmann", max_tokens=1)
        kari = pool.submit(ask, url, key="key-of-kari-nordmann", max_tokens=1)
        wait_until(lambda: 'queued_answers{model="m"} 3.0' in http.get(f"{url}/metrics", headers=known).text)
        full = ask(url, key="key-of-kari-nordmann", max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_queue_full")
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        assert kari.result().status_code == 200
        assert not all(answer.done() for answer in ola)  # she came last, and did not wait for all of them
        assert {answer.result().status_code for answer in ola} == {200}


def test_waiting_and_computing_end_in_time(folder) -> None:
    with (
        serving(folder, ServerLimits(queue_s=0.2, request_s=0.6, grace_s=0.2), slots=1) as url,
        ThreadPoolExecutor() as pool,
    ):
        long, waiting = (pool.submit(ask, url, max_tokens=300) for _ in range(2))
        answers = {answer.json()["error"]["code"]: answer for answer in (long.result(), waiting.result())}
        assert set(answers) == {"request_timeout", "queue_timeout"}
        assert {answer.status_code for answer in answers.values()} == {503}
        assert "retry-after" in answers["queue_timeout"].headers
        with stream(url, max_tokens=300) as answer:
            last = [line for line in answer.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"


def test_a_killed_worker_is_replaced_and_nobody_is_forgotten(tmp_path) -> None:
    folder = make_served(tmp_path / "m", fault="crash DREP", pause_s=0.005)
    with serving(folder, QUICK) as url, ThreadPoolExecutor() as pool:
        whole = pool.submit(ask, url, max_tokens=200)
        with stream(url, max_tokens=200) as answer:
            lines = answer.iter_lines()
            next(lines)
            killer = pool.submit(ask, url, content="DREP", max_tokens=1)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert {whole.result().status_code, killer.result().status_code} == {503}
        assert http.get(f"{url}/health").status_code == 200
        wait_until(lambda: http.get(f"{url}/ready").status_code == 200)
        assert ask(url, max_tokens=1).status_code == 200
        assert gauge(url, "worker_restarts_total") == 1


@pytest.mark.parametrize(("name", "told"), [("", "status 7"), ("SIGSEGV", "SIGSEGV")])
def test_what_a_worker_died_of_is_its_own_end_and_not_ours(name, told, monkeypatch, caplog) -> None:
    monkeypatch.setenv("DYING_WORKER_SIGNAL", name)
    died = asyncio.Event()

    async def run() -> None:
        client = WorkerClient("m", LOAD, "dying_worker", on_change=died.set)
        client.start()
        await asyncio.wait_for(died.wait(), 20)
        await client.close()

    asyncio.run(run())
    assert caplog.messages == [f"m: its worker process ended ({told}); 0 answers are lost"]


def test_requests_wait_for_a_model_that_loads(tmp_path) -> None:
    folder = make_served(tmp_path / "m")
    with serving(folder, QUICK, wait_s=0) as url:
        assert http.get(f"{url}/ready").status_code == 503
        assert ask(url, max_tokens=1).status_code == 200
        assert http.get(f"{url}/ready").status_code == 200
    with serving(folder, ServerLimits(queue_s=0.01, grace_s=0.2), wait_s=0) as url:
        answer = ask(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
        assert "was not loaded within 0.01 s" in answer.json()["error"]["message"]


def test_an_engine_s_error_is_that_request_s(tmp_path) -> None:
    folder = make_served(tmp_path / "m", fault="engine FEIL")
    with serving(folder, QUICK) as url:
        answer = ask(url, content="FEIL", max_tokens=1)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert ask(url, max_tokens=1).status_code == 200
        assert gauge(url, "worker_restarts_total") == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path) -> None:
    folder = make_served(tmp_path / "m", fault="load")
    with pytest.raises(EngineError, match="it would not load"), serving(folder, QUICK):
        pass


def test_a_reader_that_reads_nothing_is_cut_off(tmp_path) -> None:
    folder = make_served(tmp_path / "m", pause_s=0.0002, context_length=3000)
    limits = ServerLimits(stall_s=0.2, backlog=200, grace_s=0.2)
    with serving(folder, limits) as url:
        import socket

        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            body = json.dumps(
                {
                    "model": "m",
                    "prompt": "x",
                    "n": 8,
                    "stream": True,
                    "ignore_eos": True,
                    "logprobs": 5,
                    "max_tokens": 2900,
                }
            ).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            wait_until(lambda: gauge(url, "running_answers") == 8)
            wait_until(lambda: gauge(url, "running_answers") == 0, 20)
            assert gauge(url, "cancelled_answers_total") == 8
            assert gauge(url, "generated_tokens_total") < 8 * 2900


def test_a_bug_in_the_middle_of_a_stream_is_told_in_it(folder, monkeypatch, caplog):
    calls, event = [], completions._chat_event

    def fail_late(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise ZeroDivisionError("hemme" + "lig")  # not as a whole in the line that the log shows
        return event(*arguments)

    monkeypatch.setattr(completions, "_chat_event", fail_late)
    with serving(folder, QUICK) as url:
        with stream(url, max_tokens=100) as answer:
            *begun, last = [line for line in answer.iter_lines() if line]
        assert len(begun) == 3
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "bug"
        wait_until(lambda: "ZeroDivisionError" in caplog.text)  # logged once it has been told
        assert "hemmelig" not in caplog.text + last
        wait_until(lambda: gauge(url, "running_answers") == 0)
        assert ask(url, max_tokens=2).status_code == 200


def test_a_bug_is_told_without_its_words_whatever_it_is_made_of(caplog):
    """Some exceptions cannot be made without arguments; making one again would hide the answer."""

    async def broken(scope, receive, send):
        b"hemmelig \xff".decode()

    gate = RequestMiddleware(broken, keys=Keys({}), limits=ServerLimits(), metrics=Metrics(), hosts=None)
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], "query_string": b""}
    asyncio.run(gate(scope, receive, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["code"] == "bug"
    assert "UnicodeDecodeError" in caplog.text
    assert "can't decode" not in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "code", "hint"),
    [(b'{"model": "', 400, "not_json", "send one object in UTF-8"), (None, 408, "body_timeout", "send it in one go")],
)
def test_a_body_that_is_no_json_or_comes_too_late_is_refused_with_a_hint(body, status, code, hint):
    limits = ServerLimits(body_s=0.05)
    gate = RequestMiddleware(None, keys=Keys({}), limits=limits, metrics=Metrics(), hosts=None)
    sent = []

    async def receive():
        if body is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
    asyncio.run(gate({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send))
    error = json.loads(sent[1]["body"])["error"]
    assert (sent[0]["status"], error["code"]) == (status, code)
    assert hint in error["message"]
