"""Bodies, headers and senders that are too large, too deep or too slow."""

import dataclasses
import json
import socket
import time

import httpx
import pytest
from processor_speed import within
from served_models import make_served, serving
from serving_clients import error_of, http

from normistral.artifact.manifest import read_manifest, write_manifest
from normistral.errors import UsageError
from normistral.runtime.engines.settings import EngineConfig
from normistral.server.backends.base import cache_token_bytes
from normistral.server.limits import MIB, ServerLimits
from normistral.server.startup import EngineOptions, open_artifacts

LIMITS = ServerLimits(body_bytes=64 * 1024, grace_s=0.2, body_s=0.5, header_s=0.5, json_values=3000)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m"), LIMITS) as url:
        yield url


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"", {}, 400, "not JSON"),
        (b"\xff\xfe", {}, 400, "not JSON"),
        (b'"text"', {}, 400, "valid dictionary"),
        (b'{"model": NaN}', {}, 400, "not JSON"),
        (b'{"model": "\\ud800"}', {}, 400, ""),
        (b"[" * 30_000 + b"]" * 30_000, {}, 400, "nests"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, {}, 400, "nests"),
        (b"[" * 60_000, {}, 400, ""),  # too deep, or cut off where Python has a deeper stack
        (b"[" * 65 + b"]" * 65, {}, 400, "nests more than 64 deep"),
        (b"[" * 64 + b"]" * 64, {}, 400, "valid dictionary"),
        (b"{" + b",".join(b'"%d":1' % i for i in range(1025)) + b"}", {}, 400, "more than 1024 members"),
        (b"[[" + b"1," * 3000 + b"1]]", {}, 400, "more than 3000 values"),
        (b"{}", {"content-type": "text/plain"}, 415, "has to be JSON"),
        (b"x" * 70_000, {}, 413, "65536 bytes"),
    ],
)
def test_bodies_that_are_none(url, body, headers, status, words) -> None:
    start = time.process_time()  # the server is in this process
    answer = http.post(
        f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"} | headers
    )
    assert within(time.process_time() - start, 1.0)
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


def test_one_connection_too_many_is_told_so(tmp_path) -> None:
    with serving(make_served(tmp_path / "m"), ServerLimits(connections=2, grace_s=0.2), wait_s=0) as url:
        host, port = url.removeprefix("http://").split(":")
        asked = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
        with socket.create_connection((host, int(port))) as one, socket.create_connection((host, int(port))) as other:
            for connection in (one, other):
                connection.sendall(asked)
                connection.recv(65536)
            answer = raw(url, asked)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after" in answer
        deadline = time.monotonic() + 5
        while not raw(url, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200"):
            assert time.monotonic() < deadline


def test_a_cache_too_small_for_one_context_is_refused_where_its_bytes_are_known(tmp_path) -> None:
    """Answers in turns have caches of 32 bits a value; what is computed together has the engine's, mostly 8."""
    folder = make_served(tmp_path / "m")
    manifest = read_manifest(folder)
    long = dataclasses.replace(manifest, context_length=2 * MIB // cache_token_bytes(manifest))

    def open_one(format, **options):
        write_manifest(folder, dataclasses.replace(long, format=format))
        return open_artifacts([str(folder)], EngineOptions(cache_mib=1, **options), ServerLimits())

    assert open_one("openvino")
    for format, options in (
        ("onnx", {}),
        ("openvino", {"batching": "off"}),
        ("openvino", {"config": EngineConfig("GPU")}),
    ):
        with pytest.raises(UsageError, match=r"1 MiB does not hold one context of 4096 tokens \(2 MiB\)"):
            open_one(format, **options)
