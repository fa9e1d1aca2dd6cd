"""Connections that read nothing, send slowly, come in crowds, or say what can be read in two ways."""

import asyncio
import errno
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from served_models import HELPERS, make_served, open_served, serving
from serving_clients import http, stream, wait_until

from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.limits import ConnectionPool, ServerLimits
from normistral.server.server import ApiServer

LIMITS = ServerLimits(body_s=0.5, header_s=0.5, stall_s=0.5, keep_alive_s=1.0, grace_s=0.2)
_NOBODYS = ("05", "06")  # in /proc/net/tcp: FIN_WAIT2 and TIME_WAIT, which the system ends by itself
KEY = "key-of-ola-nordmann-1"
ASKED = json.dumps({"model": "m", "prompt": "Hei", "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m"), LIMITS) as url:
        yield url


def connect(url: str, receive_buffer: int = 0) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    return connection


def is_cut(connection: socket.socket, wait_s: float) -> bool:
    """Whether the server, and its system, hold no end of a connection any more; nothing is read of it."""
    deadline = time.monotonic() + wait_s
    try:
        ends = [f":{name[1]:04X}" for name in (connection.getpeername(), connection.getsockname())]
    except OSError:  # it was reset
        return True
    while time.monotonic() < deadline:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if not any(row[1].endswith(ends[0]) and row[2].endswith(ends[1]) and row[3] not in _NOBODYS for row in rows):
            return True
        time.sleep(0.02)
    return False


def answers(url: str, raw: bytes, wait_s: float = 5.0) -> list[bytes]:
    """The first lines of all answers on one connection, until the server ends it or is silent."""
    with connect(url) as connection:
        connection.settimeout(wait_s)
        got = b""
        try:
            connection.sendall(raw)
            while piece := connection.recv(65536):
                got += piece
        except (TimeoutError, ConnectionResetError):
            pass
    return re.findall(rb"HTTP/1\.1 \d{3} [^\r]*", got)


@pytest.mark.parametrize("times", [60, 2000])
def test_whoever_asks_for_much_and_reads_nothing_is_cut_off(url, times) -> None:
    with connect(url, 2048) as connection:
        asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * times
        connection.sendall(asked)
        assert is_cut(connection, 5)


def test_a_whole_answer_that_nobody_reads_ends_too(tmp_path) -> None:
    """Not a stream, and larger than all buffers."""
    with serving(make_served(tmp_path / "m"), LIMITS) as url:
        body = json.dumps(
            {"model": "m", "prompt": "x", "max_tokens": 390, "n": 8, "logprobs": 5, "ignore_eos": True}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with connect(url, 2048) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            assert is_cut(connection, 60)


def test_requests_are_not_pipelined(url) -> None:
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert answers(url, get * 3) == [b"HTTP/1.1 200 OK"]


def test_a_client_that_pipelines_and_leaves_is_noticed(tmp_path) -> None:
    with serving(make_served(tmp_path / "m", pause_s=0.01), LIMITS) as url:
        body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 390, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with connect(url) as connection:
            connection.sendall(
                head.encode() + b"Content-Type: application/json\r\n\r\n" + body + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            wait_until(lambda: 'running_answers{model="m"} 1.0' in http.get(f"{url}/metrics").text)
        wait_until(lambda: 'running_answers{model="m"} 0.0' in http.get(f"{url}/metrics").text, 1.5)


def test_each_slow_sender_meets_a_limit(url) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    slow = {
        "nothing": b"",
        "half a head": b"GET /health HTT",
        "half a body": head + b"Content-Length: 50\r\n\r\n{",
        "half a chunk": head + b"Transfer-Encoding: chunked\r\n\r\n50\r\n{",
        "no trailers": head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\na: b\r\n",
        "a body that a route does not take": b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
        "idle": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        "refused": b"no HTTP\r\n\r\n",
        "waits to go on": head + b"Content-Length: 50\r\nExpect: 100-continue\r\n\r\n",
    }
    with ExitStack() as stack:
        connections = {name: stack.enter_context(connect(url)) for name in slow}
        for name, connection in connections.items():
            connection.sendall(slow[name])
        assert [name for name, connection in connections.items() if not is_cut(connection, 8)] == []


def test_a_body_that_comes_a_byte_at_a_time_behind_its_answer_is_not_waited_for(url) -> None:
    with connect(url) as connection:
        connection.sendall(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        began = time.monotonic()
        try:
            while time.monotonic() - began < 8:
                connection.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        assert time.monotonic() - began < 6


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(ASKED)
CHUNK = b"%x\r\n%s\r\n" % (len(ASKED), ASKED)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
GET = b"GET /health HTTP/1.1\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (POST + LENGTH + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n", b"400"),
        (POST + CHUNKED + LENGTH + b"\r\n" + CHUNK + b"0\r\n\r\n", b"400"),
        (POST + LENGTH + LENGTH + b"\r\n" + ASKED, b"400"),
        (POST + b"Content-Length: 3\r\n" + LENGTH + b"\r\n" + ASKED, b"400"),
        (POST + b"Content-Length: +%d\r\n" % len(ASKED) + b"\r\n" + ASKED, b"400"),
        (POST + CHUNKED + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n", b"501"),
        (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n", b"501"),
        (POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n", b"400"),
        (POST + CHUNKED + b"\r\n-1\r\n" + ASKED, b"400"),
        (POST + CHUNKED + b"\r\n0x5\r\nabcde\r\n0\r\n\r\n", b"400"),
        (POST + CHUNKED + b"\r\n" + b"1\r\n \r\n" * 1100 + CHUNK + b"0\r\n\r\n", b"413"),
        (POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\n" + b"a:b\n" * 5000 + b"\r\n", b"400"),
        (GET + b"\r\n", b"400"),
        (GET + b"Host: x\r\nHost: y\r\n\r\n", b"400"),
        (GET + b"Host: x\nA: b\r\n\r\n", b"400"),
        (GET + b"Host: x\r\nA: b\r\n c\r\n\r\n", b"400"),
        (GET + b"Host: x\r\nA: b\rC: d\r\n\r\n", b"400"),
        (GET + b"Host : x\r\n\r\n", b"400"),
        (GET + b"Host: x\r\nContent-Length: 5\r\n\r\nabcde", b"200"),  # as if it had none, which others may believe
        (GET + b"Host: x\r\n" + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n", b"200"),
        (b"DELETE /api/delete HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde", b"404"),
        (b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde", b"405"),
        (GET + b"Host: x\r\n" + b"a: b\r\n" * 101 + b"\r\n", b"431"),
        (GET.replace(b"1.1", b"2.0") + b"Host: x\r\n\r\n", b"505"),
        (GET.replace(b"/health", b"http://y/health") + b"Host: x\r\n\r\n", b"400"),
        (b"CONNECT y:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
    ],
)
def test_what_can_be_read_in_two_ways_is_answered_once_and_the_connection_ends(url, raw, status) -> None:
    lines = answers(url, raw + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert [line.split()[1] for line in lines] == [status]


@pytest.mark.parametrize(
    "raw",
    [
        POST + LENGTH + b"\r\n" + ASKED,
        POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
        POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\na: b\r\n\r\n",
        GET + b"Host: x\r\n" + b"a: b\r\n" * 90 + b"\r\n",
        GET + b"Host: x\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_what_is_plain_is_answered(url, raw) -> None:
    assert answers(url, raw.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n", 1)) == [b"HTTP/1.1 200 OK"]


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/v1/models/m", "/openapi.json", "/metrics"])
def test_head_is_get_without_the_body(url, path) -> None:
    head, get = http.head(url + path), http.get(url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert http.head(f"{url}/v1/completions").status_code == 405


def test_the_description_is_written_once(tmp_path, monkeypatch) -> None:
    app = create_app([open_served(make_served(tmp_path / "m"), LIMITS)], LIMITS)
    written = []
    describe = app.openapi
    monkeypatch.setattr(app, "openapi", lambda: written.append(1) or describe())

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await asyncio.gather(*(client.get("/openapi.json") for _ in range(5)))

    documents = [answer.json() for answer in asyncio.run(ask())]
    assert documents == [describe()] * 5
    assert len(written) == 1


def test_no_body_is_read_without_a_key_or_where_none_is_taken(tmp_path) -> None:
    with serving(make_served(tmp_path / "m"), LIMITS, Keys({KEY: "ola"}), wait_s=0) as url:
        for path, status in (("/v1/completions", b"401"), ("/nope", b"404"), ("/health", b"405")):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode()
            (line,) = answers(url, head + b"{", wait_s=0.5)
            assert line.split()[1] == status


class PoolMember:
    def __init__(self) -> None:
        self.left = False

    def leave(self) -> None:
        self.left = True


def test_whoever_has_kept_the_server_waiting_longest_makes_room(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr("normistral.server.limits.time.monotonic", lambda: now)
    pool, guests = ConnectionPool(3, 2), [PoolMember() for _ in range(8)]
    for count, guest in enumerate(guests[:3], 1):
        assert pool.admit(guest, count)
        pool.mark_waiting(guest)
    assert [pool.admit(guest, 4 + i) for i, guest in enumerate(guests[3:5])] == [False, False]  # nobody waited long
    assert not pool.admit(guests[5], 6)
    assert guests[3].left  # of those that are too many, the first
    pool.remove(guests[3])
    pool.mark_busy(guests[0])
    pool.mark_waiting(guests[1])
    now = 2.0
    assert pool.admit(guests[6], 6)
    assert [guest.left for guest in guests[:3]] == [False, False, True]


def test_health_is_answered_where_all_connections_are_taken(tmp_path) -> None:
    limits = ServerLimits(connections=4, header_s=30, grace_s=0.2)
    with serving(make_served(tmp_path / "m", pause_s=0.01, context_length=4000), limits) as url, ExitStack() as stack:
        leaver = stack.enter_context(stream(url, max_tokens=3900))  # it may not be sent away
        pieces = leaver.iter_raw()  # the response is closed with it
        next(pieces)
        for _ in range(40):
            asker = stack.enter_context(connect(url))
            asker.sendall(GET.replace(b"/health", b"/v1/models") + b"Host: x\r\n\r\n")
            asker.recv(65536)
        assert httpx.get(f"{url}/health").status_code == 200
        assert answers(url, GET.replace(b"/health", b"/v1/models") + b"Host: x\r\n\r\n") == [
            b"HTTP/1.1 503 Service Unavailable"
        ]
        time.sleep(1.1)
        assert httpx.get(f"{url}/v1/models").status_code == 200  # in the place of one who said nothing
        assert gauge_of(url) == 1


def gauge_of(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("normistral_running_answers{"))


def test_connections_that_cannot_be_accepted_are_one_line_a_minute(tmp_path, caplog) -> None:
    server = ApiServer(create_app([open_served(make_served(tmp_path / "m"), LIMITS)], LIMITS))
    for _ in range(1000):
        server._on_loop_error(None, {"exception": OSError(errno.EMFILE, "Too many open files")})
    assert caplog.messages == ["connections cannot be accepted: Too many open files"]


def test_connections_follow_from_the_limit_of_open_files() -> None:
    script = (
        "import resource, sys\n"
        "from normistral.server.limits import plan_connections\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))\n"
        "try: plan = plan_connections(256)\n"
        "except Exception as error: print(error.message)\n"
        "else: print(*plan, resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )

    def plan(soft: int, hard: int) -> str:
        command = [sys.executable, "-c", script, str(soft), str(hard)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HELPERS).stdout.strip()

    assert plan(64, 1024) == "256 64 672 1024"
    assert plan(256, 256) == "128 32 64 256"
    assert "leaves no room for connections" in plan(48, 48)
