"""Faults of `show_faults.py` that keep connections, workers or artifacts from being what a server takes them for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from show_faults import Report, Server

ATTACK = Path(__file__).parents[2] / "benchmarks/serving/attack.py"


@contextmanager
def copied(artifact: str) -> Iterator[Path]:
    """A copy, whose files can be exchanged."""
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = Path(scratch) / Path(artifact).name
        folder.mkdir()
        for file in Path(artifact).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        yield folder


def wait_for(condition: Callable[[], bool], most_s: float) -> float:
    """Seconds until it holds, or infinity."""
    start = time.perf_counter()
    while time.perf_counter() - start < most_s:
        with suppress(httpx.HTTPError):
            if condition():
                return time.perf_counter() - start
        time.sleep(0.05)
    return float("inf")


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))  # noqa: PTH208


def ambiguous_requests(server: Server, report: Report) -> None:
    """What a proxy could read in another way, and what costs more than it says."""
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    post += f"Authorization: Bearer {server.keys[0]}\r\n".encode()
    for name, status, raw in (
        ("a length beside chunks", 400, post + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("a length twice", 400, post + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
        ("a folded header", 400, b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n"),
        ("lines without CR", 400, b"GET / HTTP/1.1\nHost: x\n\n"),
        ("3,000 short headers", 431, b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * 3000 + b"\r\n"),
        ("chunks of one byte", 413, post + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 1500),
        (
            "5,000 trailers",
            400,
            post + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n" + b"a:b\n" * 5000 + b"\r\n",
        ),
    ):
        report.refuse(name, status, lambda raw=raw: server.raw(raw))  # type: ignore[misc]


def head_requests(server: Server, report: Report) -> None:
    """Monitors ask so."""
    statuses = [server.client.head(path).status_code for path in ("/", "/health", "/ready", "/v1/models")]
    report.line("HEAD of what can be looked at", f"{statuses}", statuses == [200] * 4)


def silent_readers(server: Server, report: Report) -> None:
    """Clients without a key that ask again and again and read nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    before = descriptors(server)
    with ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect((host, int(port)))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
        seconds = wait_for(lambda: descriptors(server) <= before + 4, 60)
    report.line("200 × 60 requests, nothing read", "their connections are gone", seconds < 40, seconds)


def blanks_of_one_key(server: Server, report: Report) -> None:
    """30 bodies of 900 kB of blanks, whose sender has left: what another key waits."""
    kari = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.keys[1]}"}, timeout=60)
    asked = {"model": server.model, "prompt": "Hello", "max_tokens": 4}

    def ask() -> float:
        start = time.perf_counter()
        assert kari.post("/v1/completions", json=asked).status_code == 200
        return time.perf_counter() - start

    alone = min(ask() for _ in range(3))
    outcomes: Counter[object] = Counter()

    def leave(_: int) -> None:
        try:
            body = {"model": server.model, "prompt": " " * 900_000}
            outcomes[server.client.post("/v1/completions", json=body, timeout=0.5).status_code] += 1
        except httpx.TimeoutException:
            outcomes["left"] += 1

    with ThreadPoolExecutor(30) as pool:
        leaving = [pool.submit(leave, i) for i in range(30)]
        time.sleep(0.2)
        beside = ask()
        for one in leaving:
            one.result()
    report.line(
        "30 × 900 kB of blanks of one key", f"{dict(outcomes)}; another key waits", beside < alone + 1.5, beside
    )


def stopped_worker(server: Server, report: Report) -> None:
    """SIGSTOP: it neither answers nor ends."""
    os.kill(server.workers()[0], signal.SIGSTOP)
    noticed = wait_for(lambda: server.client.get("/ready").status_code == 503, 20)
    again = server.wait_ready()
    fine = server.ask(max_tokens=4).status_code
    right = noticed < 10 and fine == 200
    report.line("the worker is stopped", f"noticed; ready again after {again:.1f} s, then {fine}", right, noticed)


def exchanged_files(server: Server, report: Report, folder: Path) -> None:
    """A worker that starts anew and finds other files."""
    for name in ("openvino_model.xml", "normistral.json", "tokenizer.json"):
        file = folder / name
        kept = file.read_bytes()
        file.write_bytes(kept.replace(b"0", b"1", 1) if name != "normistral.json" else b"{}")
        os.kill(server.workers()[0], signal.SIGKILL)
        message = ""

        def told() -> bool:
            nonlocal message
            answer = server.client.get("/ready")
            message = "" if answer.status_code == 200 else answer.json()["error"]["message"]
            return "could not be loaded again" in message

        seconds = wait_for(told, 40)
        status = server.ask(max_tokens=1).status_code
        file.write_bytes(kept)
        server.wait_ready()
        report.line(f"another {name}", f"{status}; {message[-70:]}", status == 503 and seconds < 40, seconds)


def crowd(artifact: str, report: Report) -> None:
    """Thousands of connections against a server with 256 descriptors."""
    with tempfile.NamedTemporaryFile(suffix=".json") as told:
        command = [sys.executable, str(ATTACK), artifact, "--crowd", "3000", "--files", "256", "--seconds", "15"]
        subprocess.run([*command, "--json", told.name], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(told.name).read_text(encoding="utf-8"))
    files = found["descriptors"]
    right = set(found["health"]) == {"200"} and found["log_bytes"] < 100_000 and found["answer_afterwards"] == 200
    right = right and files["afterwards"] <= files["before"] + 4
    report.line(
        f"3,000 at once, {found['connections_made']} in all, 256 files",
        f"/health {found['health']}, log {found['log_bytes']} bytes, descriptors {files}",
        right,
        found["health_ms"]["p99"] / 1000,
    )
