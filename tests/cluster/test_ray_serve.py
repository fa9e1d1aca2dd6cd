"""Replicas behind Ray Serve, as far as it goes without Ray: routing, options, a request through a replica."""

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager

import pytest
from served_models import make_served, open_served

from normistral.cluster.replica import run_application, wait_until_loaded
from normistral.cluster.request import SHARED_CHARACTERS, ResponseStart, ServeRequest, join_metrics, routing_key
from normistral.cluster.serve import ServeOptions, plan_deployment, read_options, retry_after_s
from normistral.errors import EngineError, UsageError
from normistral.server.app import create_app
from normistral.server.limits import ServerLimits


def chat_key(*contents, tenant="kari", model="norsk", session=None):
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    headers = {} if session is None else {"x-session-id": session}
    return routing_key(tenant, headers, json.dumps({"model": model, "messages": messages}).encode())


def completion_key(prompt):
    return routing_key("kari", {}, json.dumps({"model": "norsk", "prompt": prompt}).encode())


# routing


def test_all_turns_of_a_conversation_have_one_key():
    assert chat_key("Vær kort.", "Hei") == chat_key("Vær kort.", "Hei", "Hallo", "Hva heter du?")
    assert chat_key("Vær kort.", "Hei") != chat_key("Vær kort.", "God dag")


def test_questions_about_one_long_text_have_one_key():
    text = "x" * SHARED_CHARACTERS
    assert chat_key("", text + "Hvem?") == chat_key("", text + "Hva?")
    assert chat_key(text, "Hvem?") == chat_key(text, "Hva?")
    assert chat_key("", text[:100] + "Hvem?") != chat_key("", text[:100] + "Hva?")
    assert completion_key(text + "a") == completion_key(text + "b")
    assert completion_key([1, 2, 3]) != completion_key([1, 2, 4])


def test_a_session_decides_alone():
    assert chat_key("", "Hei", session="a") == chat_key("", "God dag", session="a")
    assert chat_key("", "Hei", session="a") != chat_key("", "Hei", session="b")


def test_no_tenant_and_no_model_shares_a_key_with_another():
    assert len({chat_key("", "Hei", tenant=tenant) for tenant in ("a", "b", "")}) == 3
    assert len({chat_key("", "Hei", tenant=tenant, session="s") for tenant in ("a", "b")}) == 2
    assert chat_key("", "Hei", model="a") != chat_key("", "Hei", model="b")


@pytest.mark.parametrize(
    ("first", "later", "other"),
    [
        (
            {"instructions": "Vær kort.", "input": "Hei"},
            {"instructions": "Vær kort.", "input": "Hei", "stream": True},
            {"instructions": "Vær grundig.", "input": "Hei"},
        ),
        (
            {"input": [{"role": "user", "content": "Hei"}]},
            {"input": [{"role": "user", "content": "Hei"}, {"role": "assistant", "content": "Hei!"}]},
            {"input": [{"role": "user", "content": "Hvor er Bergen?"}]},
        ),
        ({"input": "Hei"}, {"input": "Hei", "top_p": 1}, {"input": "Hvor er Bergen?"}),
        (
            {"system": "Vær kort.", "messages": [{"role": "user", "content": "Hei"}]},
            {"system": "Vær kort.", "messages": [{"role": "user", "content": "Hei"}], "max_tokens": 5},
            {"system": "Vær grundig.", "messages": [{"role": "user", "content": "Hei"}]},
        ),
        ({"system": "Vær kort.", "prompt": "Hei"}, {"prompt": "Hei", "system": "Vær kort."}, {"prompt": "Hei"}),
    ],
)
def test_conversations_of_the_other_apis_have_keys_of_their_own_beginnings(first, later, other):
    keys = [routing_key("kari", {}, json.dumps({"model": "norsk"} | body).encode()) for body in (first, later, other)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff",
        b"[" * 50_000,
        b'{"messages": [1, null, {"role": "user", "content": [{"type": "text"}]}]}',
        b'{"messages": {}}',
        b'{"prompt": 3}',
    ],
)
def test_any_body_has_a_key_that_stays(body):
    assert routing_key("kari", {}, body) == routing_key("kari", {}, body)


# options


def test_texts_of_the_command_line_become_options():
    options = read_options(
        {"artifact": "a", "replicas": "2", "threads": "4", "no_api_key": "true", "queue_seconds": "9"}
    )
    assert options == ServeOptions(artifact="a", replicas=2, threads=4, no_api_key=True, queue_seconds=9.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"artifact": "a", "nonsense": 1},
        {"artifact": "a", "replicas": 0},
        {"artifact": "a", "threads": "many"},
        {"artifact": "a", "replicas": 3, "max_replicas": 2},
        {"artifact": "a", "batching": "maybe"},
    ],
)
def test_wrong_options_are_refused(arguments):
    with pytest.raises(UsageError):
        read_options(arguments)


def test_a_fixed_number_of_replicas_and_one_that_follows_the_queue():
    fixed = plan_deployment(ServeOptions(artifact="a", replicas=3, slots=4, max_queue=9, grace_seconds=7.0), threads=2)
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 2}
    assert (fixed["max_ongoing_requests"], fixed["max_queued_requests"]) == (4, 9)
    assert fixed["graceful_shutdown_timeout_s"] == 7.0
    scaled = plan_deployment(ServeOptions(artifact="a", replicas=1, max_replicas=6, slots=4), threads=2)
    assert scaled["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 6, "target_ongoing_requests": 4}
    assert "num_replicas" not in scaled


def test_a_refused_client_waits_longer_the_longer_the_queue():
    assert retry_after_s(ServeOptions(artifact="a", max_queue=64, slots=8, replicas=2)) == 4
    assert retry_after_s(ServeOptions(artifact="a", max_queue=1, slots=8)) == 1


# a request through a replica


CALL = ServeRequest("POST", "/v1/chat/completions", b"a=b", [(b"content-type", b"application/json")], b'{"hei": 1}')


def gather(app, *, at_most=None):
    """What comes through, up to so many pieces."""

    async def run():
        pieces, found = run_application(app, CALL), []
        async for piece in pieces:
            found.append(piece)
            if len(found) == at_most:
                break
        await pieces.aclose()
        return found

    return asyncio.run(asyncio.wait_for(run(), 10))


async def echo(scope, receive, send):
    body = (await receive())["body"]
    told = f"{scope['method']} {scope['path']} {scope['query_string'].decode()} ".encode()
    await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": told, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": True})
    await send({"type": "http.response.body", "body": body})


def test_status_headers_and_body_come_through():
    told = b"POST /v1/chat/completions a=b "
    assert gather(echo) == [ResponseStart(201, [(b"a", b"b")]), told, b'{"hei": 1}']


def test_who_stops_listening_is_a_client_who_has_left():
    heard = []

    async def writes_on(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        leaving = asyncio.ensure_future(receive())
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0)
        heard.append((await leaving)["type"])

    assert gather(writes_on, at_most=3) == [ResponseStart(200, []), b"x", b"x"]
    assert heard == ["http.disconnect"]


def test_nobody_writes_ahead_of_a_reader_without_end():
    written = []

    async def writes(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            written.append(number)

    async def run():
        pieces = run_application(writes, CALL)
        await anext(pieces)
        for _ in range(100):
            await asyncio.sleep(0)
        ahead = len(written)
        await pieces.aclose()
        return ahead

    assert 0 < asyncio.run(asyncio.wait_for(run(), 10)) < 20


def test_a_bug_in_the_application_is_not_swallowed():
    async def fails(scope, receive, send):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gather(fails)


# metrics


def test_figures_of_all_replicas_come_in_one_text():
    text = (
        "# HELP normistral_tokens_total Tokens.\n# TYPE normistral_tokens_total counter\n"
        'normistral_tokens_total{model="a"} %s\n'
        "# HELP normistral_wait_s Wait.\n# TYPE normistral_wait_s histogram\n"
        'normistral_wait_s_bucket{le="1.0"} 2\nnormistral_wait_s_bucket{le="+Inf"} 3\n'
        "normistral_wait_s_count 3\nnormistral_wait_s_sum 4.5\n"
    )
    joined = join_metrics({"one": text % 5, "two": text % 7})
    assert 'normistral_tokens_total{model="a",replica="one"} 5.0' in joined
    assert 'normistral_tokens_total{model="a",replica="two"} 7.0' in joined
    assert 'normistral_wait_s_bucket{le="+Inf",replica="two"} 3.0' in joined
    assert joined.count("# TYPE normistral_tokens_total counter") == 1


# a worker process that is started anew


@asynccontextmanager
async def loading_service(folder):
    """The service of a server for this folder, whose worker has just been started."""
    limits = ServerLimits(grace_s=0.2)
    app = create_app([open_served(folder, limits)], limits, worker_module="served_models")
    async with app.router.lifespan_context(app):
        yield app.state.service


def test_requests_wait_for_a_worker_that_is_started_anew_but_not_for_ever(tmp_path):
    folder = make_served(tmp_path / "m")

    async def run():
        async with loading_service(folder) as service:
            await wait_until_loaded(service, 60)
            os.kill(service.models["m"].worker.pid, signal.SIGKILL)
            while service.ready:
                await asyncio.sleep(0.01)
            with pytest.raises(TimeoutError):
                await wait_until_loaded(service, 0.01)
            await wait_until_loaded(service, 60)
            assert service.ready
            service.stopping = True
            await wait_until_loaded(service, 0.01)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_not_waited_for(tmp_path):
    folder = make_served(tmp_path / "m", fault="load")

    async def run():
        async with loading_service(folder) as service:
            await wait_until_loaded(service, None)

    with pytest.raises(EngineError, match="would not load"):
        asyncio.run(asyncio.wait_for(run(), 60))
