"""What a server refuses, and in which words; nothing of it reaches the worker."""

import json
import socket
import time

import httpx
import pytest
from served_models import CONTEXT, make_served, open_served, serving

from normistral.serving.app import create_app
from normistral.serving.auth import Keys
from normistral.serving.limits import ServerLimits
from normistral.serving.server import background_server

LIMITS = ServerLimits(
    body_bytes=64 * 1024, choices=4, new_tokens=100, messages=20, grace_s=0.2, body_s=0.5, header_s=0.5
)
http = httpx.Client()  # one: each would read the system's certificates
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hei"}]}
TEXT = {"model": "m", "prompt": "Hei"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m"), LIMITS) as url:
        yield url


def error_of(answer: httpx.Response) -> dict:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]
    return error


CHAT_REFUSALS = [
    ({"foo": 1}, "foo", "unknown field foo"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "unknown field"),
    (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages.0.role",
        "'system', 'developer', 'user' or 'assistant'",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        None,
        "text only",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "Ola"}]}, "messages.0.name", "knows no names"),
    ({"messages": CHAT["messages"] * 21}, "messages", "more than 20 messages"),
    ({"tools": [{"type": "function"}]}, "tools", "tools and functions are not supported"),
    ({"functions": [{}]}, "functions", "tools and functions are not supported"),
    ({"tool_choice": "required"}, "tool_choice", "'none' or 'auto'"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "repetition_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "cannot be biased"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "max_reasoning_tokens"),
    ({"n": 10**9}, "n", "more than this server writes"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 5}, "n", "more than this server writes for a request (4)"),
    ({"n": True}, "n", "valid integer"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"stop": ["a", "b", "c", "d", "e"]}, None, "at most 4 items"),
    ({"stop": ""}, None, "stop"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"max_tokens": 101}, None, "more than this server allows (100)"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "the same limit"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
    ({"max_reasoning_tokens": 5}, None, "no model that marks its reasoning"),
    ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object', 'json_schema'"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
        None,
        "json schema",
    ),
    ({"structured_outputs": {"regex": "("}}, None, "regex"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None, "only one form"),
    ({"store": True}, "store", "False"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
]


@pytest.mark.parametrize(("fields", "param", "words"), CHAT_REFUSALS)
def test_a_wrong_field_is_named(url, fields, param, words) -> None:
    answer = http.post(f"{url}/v1/chat/completions", json=CHAT | fields)
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [10**6]}, "outside the vocabulary"),
        ({"prompt": ["a"] * 3, "n": 2}, "6 answers are more"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "before a suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "less than or equal to 5"),
    ],
)
def test_a_wrong_field_of_a_text_completion_is_named(url, fields, words) -> None:
    answer = http.post(f"{url}/v1/completions", json=TEXT | fields)
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


def test_what_clients_always_send_is_let_through(url) -> None:
    harmless = {
        "user": "x", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "none", "functions": None, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "modalities": ["text"], "n": 1, "stop": None, "seed": None, "max_tokens": 2,
        "response_format": {"type": "text"}, "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    assert http.post(f"{url}/v1/chat/completions", json=CHAT | harmless).status_code == 200


@pytest.mark.parametrize("length", [CONTEXT, 25_000])
def test_what_does_not_fit_the_context_is_told_so(url, length) -> None:
    messages = [{"role": "user", "content": "å" * length}]
    chat = http.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": messages[:1]})
    text = http.post(f"{url}/v1/completions", json={"model": "m", "prompt": "å" * length})
    assert (chat.status_code, text.status_code) == (400, 400)
    assert error_of(chat)["code"] == error_of(text)["code"] == "context_length_exceeded"
    assert (error_of(chat)["param"], error_of(text)["param"]) == ("messages", "prompt")


def test_an_unknown_model_is_404_and_names_those_there_are(url) -> None:
    answer = http.post(f"{url}/v1/chat/completions", json=CHAT | {"model": "gpt-4"})
    assert answer.status_code == 404
    assert error_of(answer) | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip
    assert http.get(f"{url}/v1/models/gpt-4").status_code == 404


def test_models_are_listed(url) -> None:
    document = http.get(f"{url}/v1/models").json()
    assert [card["id"] for card in document["data"]] == ["m"]
    assert document["data"][0] == http.get(f"{url}/v1/models/m").json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/docs", 404),
    ],
)
def test_other_routes_and_methods(url, method, path, status) -> None:
    answer = http.request(method, url + path)
    assert answer.status_code == status
    error_of(answer)


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"", {}, 400, "not JSON"),
        (b"\xff\xfe", {}, 400, "not JSON"),
        (b'"text"', {}, 400, "valid dictionary"),
        (b'{"model": NaN}', {}, 400, "not JSON"),
        (b'{"model": "\\ud800"}', {}, 400, ""),
        (b"[" * 60_000, {}, 400, "nests"),
        (b'{"a":' * 10_000, {}, 400, "nests"),
        (b"[" * 65 + b"]" * 65, {}, 400, "nests more than 64 deep"),
        (b"{}", {"content-type": "text/plain"}, 415, "has to be JSON"),
        (b"x" * 70_000, {}, 413, "65536 bytes"),
    ],
)
def test_bodies_that_are_none(url, body, headers, status, words) -> None:
    start = time.perf_counter()
    answer = http.post(
        f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"} | headers
    )
    assert time.perf_counter() - start < 1.0
    assert answer.status_code == status
    assert words in error_of(answer)["message"]


def test_a_body_in_chunks_is_refused_when_it_is_too_large(url) -> None:
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(2000):
            sent += 8192
            yield b" " * 8192

    try:
        answer = http.post(f"{url}/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
    except httpx.TransportError:  # the connection ended before everything was sent
        pass
    assert http.get(f"{url}/health").status_code == 200


def raw(url: str, data: bytes, wait_s: float = 5.0) -> bytes:
    """What a connection answers until it ends."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        connection.sendall(data)
        got = b""
        while piece := connection.recv(65536):
            got += piece
        return got


def test_long_headers_are_431_and_nonsense_is_400(url) -> None:
    long = raw(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**16)
    nonsense = raw(url, b"\x16\x03\x01 hello\r\n\r\n")
    assert long.startswith(b"HTTP/1.1 431 ")
    assert nonsense.startswith(b"HTTP/1.1 400 ")
    for answer in (long, nonsense):
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_senders_that_dawdle_are_let_go(url) -> None:
    assert raw(url, b"GET /health HTTP/1.1\r\n") == b""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
    assert raw(url, head + b"Content-Type: application/json\r\n\r\n{").startswith(b"HTTP/1.1 408 ")


def test_another_host_name_is_refused_without_keys(tmp_path) -> None:
    app = create_app(
        [open_served(make_served(tmp_path / "m"), LIMITS)], LIMITS, hosts={"127.0.0.1"}, worker_module="served_models"
    )
    with background_server(app, wait_s=0) as url:
        assert http.get(f"{url}/health").status_code == 200
        answer = http.get(f"{url}/health", headers={"host": "evil.example:80"})
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "host_not_allowed"


def test_keys_are_asked_for_but_not_for_health(tmp_path) -> None:
    keys = Keys({"a-key-that-is-long": "ola", "another-long-key-here": "kari"})
    with serving(make_served(tmp_path / "m"), LIMITS, keys) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a-key-that-is-long"}):
            answer = http.post(f"{url}/v1/completions", json=TEXT, headers=headers)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get(f"{url}/metrics").status_code == 401
        assert http.get(f"{url}/health").status_code == 200
        right = {"authorization": "Bearer another-long-key-here"}
        assert http.post(f"{url}/v1/completions", json=TEXT | {"max_tokens": 1}, headers=right).status_code == 200
        described = http.get(f"{url}/openapi.json").json()
        assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


def test_rejections_are_counted_by_reason(url) -> None:
    http.post(f"{url}/v1/completions", json=TEXT | {"foo": 1})
    text = http.get(f"{url}/metrics").text
    assert 'normistral_rejected_requests_total{reason="unknown_field"}' in text
    assert 'normistral_requests_total{route="/v1/completions",status="400"}' in text


def test_the_description_names_models_and_limits(url) -> None:
    document = http.get(f"{url}/openapi.json").json()
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert properties["model"]["enum"] == ["m"]
    assert {"type": "integer", "minimum": 1, "maximum": 4} in properties["n"]["anyOf"]
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]
