"""Requests without a key, and connections without a request, are answered and held outside the application."""

import asyncio
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack

import httpx
import pytest
from served_models import make_served, open_served, serving
from serving_clients import http, wait_until

from normistral.server import middleware
from normistral.server.acceptor import Acceptor
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.limits import ConnectionPlan, ServerLimits
from normistral.server.public_routes import parse_head

KEY = "key-of-ola-nordmann-1"
LIMITS = ServerLimits(grace_s=0.2, header_s=1.0)
PATHS = (
    "/",
    "/health",
    "/ready",
    "/openapi.json",
    "/nope",
    "/v1/models",
    "/v1/nope",
    "/metrics",
    "/v1/completions",
    "/health?x=[1]&y={2}|3",
    "/%68ealth",
    "/v1/models/a%3Fb:latest?z",
    "/v1/m%C3%A5l%ff%00",
)
CHANGING = ("date", "x-request-id")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m"), LIMITS, Keys({KEY: "ola"})) as url:
        http.get(f"{url}/openapi.json")  # from now on it is there
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def ask(url: str, head: str, more: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; a header that only h11 may judge brings the request to the application."""
    with connect(url) as connection:
        connection.sendall(f"{head}{more}\r\n".encode())
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(65536)
        start, _, body = received.partition(b"\r\n\r\n")
        lines = start.decode().split("\r\n")
        headers = {line.partition(":")[0]: line.partition(":")[2].strip() for line in lines[1:]}
        expected = 0 if head.startswith("HEAD") else int(headers["content-length"])
        while len(body) < expected:
            body += connection.recv(65536)
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert headers["date"].endswith("GMT")
    return int(lines[0].split()[1]), {name: headers[name] for name in headers if name not in CHANGING}, body


def count(url: str) -> Counter[str]:
    """Figures of requests that were answered and refused."""
    text = http.get(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    lines = [line.rpartition(" ") for line in text.splitlines() if re.match("normistral_(requests|rejected)", line)]
    own = 'route="/metrics",status="200"'
    return Counter({name: float(value) for name, _, value in lines if "_created" not in name and own not in name})


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"])
def test_answers_are_those_of_the_application(url, method) -> None:
    for path in PATHS:
        for key in ("", "Authorization: Bearer another-key-1234567\r\n", "Authorization: x\r\n"):
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{key}"
            counts = [count(url)]
            ours = ask(url, head, "")
            counts.append(count(url))
            theirs = ask(url, head, "X~: x\r\n")
            theirs[1].pop("connection", None)  # there is no further request after one that is not plain
            assert ours == theirs
            wait_until(lambda counts=counts: count(url) - counts[1] == counts[1] - counts[0])


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", PATHS)
def test_a_body_where_none_is_wanted_changes_no_answer(url, method, path) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n"
    for key in ("", f"Authorization: Bearer {KEY}\r\n"):
        status, headers, body = ask(url, head + key, "Content-Length: 2\r\n\r\n{}")
        assert headers.pop("connection") == "close"
        plain = ask(url, head + key, "")
        assert (status, headers) == plain[:2]
        assert path == "/metrics" or body == plain[2]


GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "raw",
    [
        GET.replace(b"1.1", b"1.0") + b"\r\n",
        GET.replace(b"GET", b"get") + b"\r\n",
        GET.replace(b"/health", b"/health#x") + b"\r\n",
        GET.replace(b"/health", b"/\\health") + b"\r\n",
        GET.replace(b"/health", b"http://x/health") + b"\r\n",
        GET.replace(b"Host", b"Hos\xc3") + b"\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA: b\r\n\r\n",
        GET + b"Host: y\r\n\r\n",
        GET + b"A: b\r\n c\r\n\r\n",
        GET + b"A: b\n\r\n",
        GET + b"A: b\rC: d\r\n\r\n",
        GET + b"A : b\r\n\r\n",
        GET + b"A: \x00\r\n\r\n",
        GET + b"Connection: close\r\nConnection: keep-alive\r\n\r\n",
        GET + b"X~: x\r\n\r\n",
        GET + b"A: b\r\n" * 100 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    ],
)
def test_heads_that_are_not_plain_are_left_to_h11(raw) -> None:
    assert parse_head(GET + b"\r\n") is not None
    assert parse_head(raw) is None


def test_silent_connections_take_nobodys_place(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("normistral.server.server.plan_connections", lambda wanted: ConnectionPlan(wanted, 2, 16))
    limits = ServerLimits(connections=4, header_s=30, grace_s=0.2)
    with serving(make_served(tmp_path / "m"), limits, Keys({KEY: "ola"})) as url, ExitStack() as stack:
        silent = [stack.enter_context(connect(url)) for _ in range(200)]
        for _ in range(5):
            assert httpx.get(f"{url}/health", timeout=2).status_code == 200
            answer = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"}, timeout=2)
            assert answer.status_code == 200
        ended = 0
        for connection in silent:
            connection.settimeout(0.001)
            try:
                ended += connection.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionResetError:
                ended += 1
        assert 180 <= ended < 200  # the oldest made room; the others are held


def test_a_request_that_came_in_time_is_answered_by_a_server_that_was_busy(tmp_path, monkeypatch) -> None:
    limits = ServerLimits(grace_s=0.2, header_s=0.2)
    with serving(make_served(tmp_path / "m"), limits, Keys({KEY: "ola"})) as url, connect(url) as connection:
        monkeypatch.setattr(Acceptor, "_serve_ready", lambda self: None)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_connection_that_ends_after_an_answer_says_so(url) -> None:
    assert ask(url, "GET /health HTTP/1.1\r\nHost: x\r\n", "X~: x\r\n")[1]["connection"] == "close"
    with httpx.Client(headers={"X~": "x"}) as client:  # that would use the connection again, and find it gone
        for _ in range(20):
            assert client.get(f"{url}/health").headers["connection"] == "close"


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        ("/v1/models?limit=20&x=[y]", ""),  # Anthropic's and Azure's packages ask with a query
        ("/v1/models/m%3Alatest", ""),
        ("/v1/models", "Expect: 100-continue\r\n"),  # curl before a large body
        ("/v1/models", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n"),  # Java
        ("/v1/models", "TE: trailers\r\nConnection: TE\r\n"),
        ("/health?x=1", ""),
    ],
)
def test_what_clients_write_in_a_head_ends_no_connection(url, target, headers) -> None:
    key = f"Authorization: Bearer {KEY}\r\n" if target.startswith("/v1") else ""
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\n{key}{headers}\r\n".encode()
    with connect(url) as connection:
        for _ in range(3):
            connection.sendall(request)
            received = b""
            while not received.endswith(b"}"):
                received += (piece := connection.recv(65536))
                assert piece, "it was closed"
            assert re.match(rb"HTTP/1\.1 (200|404) ", received)


@pytest.mark.parametrize("connection", ["close", "Close", "keep-alive, close", "close, TE"])
def test_close_is_found_among_other_tokens(url, connection) -> None:
    answer = ask(url, "GET /health HTTP/1.1\r\nHost: x\r\n", f"Connection: {connection}\r\n")
    assert answer[1]["connection"] == "close"


def test_a_connection_that_was_handed_over_is_not_read_again(tmp_path, monkeypatch) -> None:
    """A sweep serves a connection that waits for its turn; the turn that follows would take what comes next."""
    serve, read, foreign = Acceptor._serve_ready, Acceptor._read, []

    def sweep_between(self) -> None:
        for key, _ in self._selector.select(0):
            self._queue(key.data)
            key.data.deadline = 0.0
        self._sweep()
        serve(self)

    def watched_read(self, connection) -> None:
        if connection not in self._held.values():
            foreign.append(connection)
        read(self, connection)

    monkeypatch.setattr(Acceptor, "_serve_ready", sweep_between)
    monkeypatch.setattr(Acceptor, "_read", watched_read)
    with serving(make_served(tmp_path / "m"), LIMITS, Keys({KEY: "ola"})) as url:
        for _ in range(5):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert not foreign


FLOOD = """
import socket, sys, time
connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 10) for _ in range(16)]
answered, deadline = 0, time.monotonic() + 1
while time.monotonic() < deadline:
    for connection in connections:
        connection.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    for connection in connections:
        answered += connection.recv(65536).startswith(b"HTTP/1.1 401")
print(answered)
"""


def flood(url: str) -> int:
    """Requests without a key that are answered to 16 clients within a second; they ask again at once."""
    command = [sys.executable, "-c", FLOOD, url.rpartition(":")[2]]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_flood_without_a_key_has_its_share_while_others_are_answered(tmp_path, monkeypatch) -> None:
    turn, spent = Acceptor._turn, []

    def timed_turn(self) -> None:
        began = time.thread_time()
        turn(self)
        spent.append(time.thread_time() - began)

    monkeypatch.setattr(Acceptor, "_turn", timed_turn)
    folder = make_served(tmp_path / "m", pause_s=0.02, context_length=4000)
    with serving(folder, ServerLimits(grace_s=0.2), Keys({KEY: "ola"})) as url:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"model": "m", "prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=30) as answer:
            pieces = answer.iter_raw()  # the response is closed with it
            next(pieces)
            began = time.monotonic()
            spent.clear()
            assert flood(url) >= 16
            assert sum(spent) < 0.2 * (time.monotonic() - began)  # 0.9 without a share, on an idle machine


def test_a_large_body_is_decoded_once_and_the_next_one_after_a_rest(tmp_path, monkeypatch) -> None:
    app = create_app([open_served(make_served(tmp_path / "m"), LIMITS)], LIMITS)
    decoded = []
    decode = middleware.msgspec.json.decode

    def slowly(body: bytes):
        if len(body) > 32 * 1024:
            decoded.append(time.monotonic())
            time.sleep(0.01)
        return decode(body)

    monkeypatch.setattr(middleware.msgspec.json, "decode", slowly)
    monkeypatch.setattr("starlette.requests.json.loads", lambda body: pytest.fail("decoded again"))
    content = b'{"model": "m", "prompt": "' + b" " * 40_000 + b'"}'

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            headers = {"content-type": "application/json"}
            asked = (client.post("/v1/completions", content=content, headers=headers) for _ in range(3))
            answers = await asyncio.gather(*asked)
            return [*answers, await client.post("/v1/completions", content=content, headers=headers)]

    statuses = [answer.status_code for answer in asyncio.run(ask())]
    assert statuses == [400] * 4  # longer than the context
    assert len(decoded) == 4
    assert decoded[1] - decoded[0] > 0.1
    assert decoded[3] - decoded[2] < 0.16  # there are no others any more
