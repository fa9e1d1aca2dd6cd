"""An attack on a server of our own, and what it does to those who have nothing to do with it.

    python benchmarks/serving/attack.py artifacts/demo-openvino --seconds 60 --json out.json
    python benchmarks/serving/attack.py artifacts/demo-openvino --crowd 5000 --files 256

The first way attacks with four kinds of clients at once: 64 that ask for /openapi.json and read nothing,
64 that flood every route without a key, one key that sends bodies of a megabyte, 100 at a time, and one client that
vanishes and comes again. Another key asks for short answers all the while, and /health is asked over new connections.
The same is measured without an attack, and with the same generators against a server that only accepts: they have the
least weight that the scheduler gives (nice 19, SCHED_IDLE), and still take processor time.

The second way holds a crowd of connections against a server whose limit of open files is low.

/health waits for nothing but the event loop: its time over a connection that is there already is the lag of the loop,
and over a new one the wait to be accepted is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

KEYS = ("key-of-the-attacker-1", "key-of-somebody-else")
ROUTES = ("/", "/health", "/ready", "/openapi.json", "/docs", "/nope", "/v1/models", "/metrics", "/v1/chat/completions")
HEADERS = f"Host: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEYS[0]}\r\n"
LIBRARY = "import sys; sys.path.insert(0, {here!r}); import attack; attack.{name}({port}, {seconds})"


def connect(port: int, receive_buffer: int = 0) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(5)
    connection.connect(("127.0.0.1", port))
    return connection


def in_threads(count: int, seconds: float, act: Any) -> None:
    """So many threads that do something again and again; what the server does about it is of no matter."""
    deadline = time.monotonic() + seconds

    def run(number: int) -> None:
        while time.monotonic() < deadline:
            try:
                act(number)
            except OSError:
                time.sleep(0.01)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline + 5 - time.monotonic()))


def read_nothing(port: int, seconds: float) -> None:
    """64 clients that pipeline requests and read no answer."""

    def act(_: int) -> None:
        with connect(port, 2048) as connection:
            for _ in range(20):
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
                time.sleep(0.5)

    in_threads(64, seconds, act)


def flood(port: int, seconds: float) -> None:
    """64 clients without a key, on every route and with every method."""

    def act(number: int) -> None:
        with connect(port) as connection:
            for turn in range(200):
                path = ROUTES[(number + turn) % len(ROUTES)]
                method = ("GET", "HEAD", "OPTIONS", "POST")[turn % 4]
                headers = "".join(f"X-{i}: {'a' * 300}\r\n" for i in range(90 if turn % 8 == 0 else 1))
                connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
                if not connection.recv(65536):
                    return

    in_threads(64, seconds, act)


def send_much(port: int, seconds: float) -> None:
    """One key that sends bodies of a megabyte, 100 at a time: blanks, token ids, messages."""
    bodies = [
        json.dumps({"model": "m", "prompt": " " * 1_000_000}).encode(),
        json.dumps({"model": "m", "prompt": [1] * 99_000, "max_tokens": 1}).encode(),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 900}] * 1000}).encode(),
        json.dumps({"model": "m", "prompt": "word " * 6000, "max_tokens": 1, "user": "x" * 900_000}).encode(),
    ]

    def act(number: int) -> None:
        body = bodies[number % len(bodies)]
        path = "/v1/chat/completions" if number % len(bodies) == 2 else "/v1/completions"
        with connect(port) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            connection.recv(65536)

    in_threads(100, seconds, act)


def vanish(port: int, seconds: float) -> None:
    """One client that asks for a long stream, leaves after the first piece, and comes again."""
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 500, "stream": True, "ignore_eos": True}).encode()

    def act(_: int) -> None:
        with connect(port) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\n{HEADERS}Content-Length: {len(body)}\r\n\r\n".encode() + body
            )
            connection.recv(1000)

    in_threads(1, seconds, act)


GENERATORS = ("read_nothing", "flood", "send_much", "vanish")


def step_back() -> None:
    """Take the least weight that the scheduler gives."""
    os.nice(19)
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def start_generators(port: int, seconds: float) -> list[subprocess.Popen[bytes]]:
    """Each in a process of least weight."""
    here = str(Path(__file__).parent)
    return [
        subprocess.Popen(
            [sys.executable, "-c", LIBRARY.format(here=here, name=name, port=port, seconds=seconds)],
            preexec_fn=step_back,
            stderr=subprocess.DEVNULL,
        )
        for name in GENERATORS
    ]


class Server:
    """`normistral serve` with two keys; its log is a file."""

    def __init__(self, artifact: str, files: int | None = None) -> None:
        self.log = tempfile.NamedTemporaryFile(prefix="attack-", suffix=".log")  # noqa: SIM115

        def limit_files() -> None:
            if files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        self.folder = Path(tempfile.mkdtemp(prefix="attack-"))
        folder = self.folder / "m"
        shutil.copytree(artifact, folder)  # the server calls a link by the name of what it leads to
        self.process = subprocess.Popen(
            [sys.executable, "-m", "normistral", "serve", str(folder), "--port", "0", "--json", "--grace-seconds", "1"],
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "NORMISTRAL_API_KEYS": ",".join(KEYS)},
            preexec_fn=limit_files,
        )
        assert self.process.stdout is not None
        start = json.loads(self.process.stdout.readline())
        self.url, self.model = start["url"], start["models"][0]
        self.port = int(self.url.rpartition(":")[2])
        while httpx.get(f"{self.url}/ready").status_code != 200:
            time.sleep(0.1)

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.folder)


def accept_only(seconds: float) -> tuple[int, threading.Thread]:
    """A server that accepts connections and reads, and never answers."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.settimeout(0.5)
    deadline, kept = time.monotonic() + seconds, []

    def run() -> None:
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                kept.append(listener.accept()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return listener.getsockname()[1], thread


def watch(server: Server, seconds: float) -> dict[str, Any]:
    """What /health and the other key meet."""
    deadline = time.monotonic() + seconds
    health: list[float] = []
    fresh: list[float] = []
    answers: list[float] = []
    failures: list[str] = []

    def ask_health(times: list[float], anew: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        while time.monotonic() < deadline:
            begun = time.perf_counter()
            try:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    failures.append(f"/health {answer.status}")
            except (OSError, http.client.HTTPException) as exc:
                failures.append(f"/health {type(exc).__name__}")
                connection.close()
            times.append(time.perf_counter() - begun)
            if anew:
                connection.close()
            time.sleep(0.02)

    def ask_answers() -> None:
        body = {"model": server.model, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
        with httpx.Client(headers={"authorization": f"Bearer {KEYS[1]}"}, timeout=120) as client:
            while time.monotonic() < deadline:
                begun = time.perf_counter()
                try:
                    answer = client.post(f"{server.url}/v1/completions", json=body)
                    if answer.status_code != 200:
                        failures.append(f"answer {answer.status_code}")
                except httpx.HTTPError as exc:
                    failures.append(f"answer {type(exc).__name__}")
                answers.append(time.perf_counter() - begun)

    threads = [
        threading.Thread(target=ask_health, args=(health, False)),
        threading.Thread(target=ask_health, args=(fresh, True)),
        threading.Thread(target=ask_answers),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        "health_ms": spread(health),
        "health_on_a_new_connection_ms": spread(fresh),
        "answer_ms": spread(answers),
        "failures": {failure: failures.count(failure) for failure in sorted(set(failures))},
    }


def spread(seconds: list[float]) -> dict[str, float]:
    times = sorted(seconds)
    at = {"median": median(times), "p90": times[int(0.9 * len(times))], "p99": times[int(0.99 * len(times))]}
    return {"count": len(times)} | {name: round(1000 * value, 1) for name, value in (at | {"worst": times[-1]}).items()}


def attack(artifact: str, seconds: float) -> dict[str, Any]:
    server = Server(artifact)
    try:
        found: dict[str, Any] = {"load_before": os.getloadavg()[0], "alone": watch(server, min(15.0, seconds))}
        for name in ("beside", "attacked"):
            port = server.port if name == "attacked" else accept_only(seconds + 10)[0]
            generators = start_generators(port, seconds + 5)
            time.sleep(3)
            found[name] = watch(server, seconds)
            for generator in generators:
                generator.kill()
                generator.wait()
        found["answers_later"] = found["attacked"]["answer_ms"]["median"] / found["beside"]["answer_ms"]["median"]
        time.sleep(5)
        found["descriptors_afterwards"] = server.descriptors
        found["log_bytes"] = Path(server.log.name).stat().st_size
        return found
    finally:
        server.end()


def hold(port: int, seconds: float, count: int) -> None:
    """So many connections that say nothing, each made anew when it is ended; tells how many were made."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    held: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    made = 0
    while time.monotonic() < deadline:
        for number in range(count):
            if number in held and not is_ended(held[number]):
                continue
            if number in held:
                held.pop(number).close()
            connection = socket.socket()
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(("127.0.0.1", port))
            held[number] = connection
            made += 1
    print(made)


def crowd(artifact: str, count: int, files: int, seconds: float) -> dict[str, Any]:
    """What /health meets beside such a crowd, and what is left afterwards."""
    server = Server(artifact, files)
    try:
        before = server.descriptors
        code = LIBRARY.format(here=str(Path(__file__).parent), name="hold", port=server.port, seconds=seconds)
        command = [sys.executable, "-c", f"{code[:-1]}, {count})"]
        holding = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=step_back)
        times: list[float] = []
        statuses: dict[str, int] = {}
        peak = 0
        while holding.poll() is None:
            peak = max(peak, server.descriptors)
            begun = time.monotonic()
            try:
                status = str(httpx.get(f"{server.url}/health", timeout=10).status_code)
            except httpx.HTTPError as exc:
                status = type(exc).__name__
            statuses[status] = statuses.get(status, 0) + 1
            times.append(time.monotonic() - begun)
            time.sleep(0.2)
        log_bytes = Path(server.log.name).stat().st_size
        time.sleep(15)
        body = {"model": server.model, "prompt": "x", "max_tokens": 2}
        answer = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"authorization": f"Bearer {KEYS[1]}"}, timeout=60
        )
        return {
            "load_before": os.getloadavg()[0],
            "connections_made": int(holding.communicate()[0]),
            "health": statuses,
            "health_ms": spread(times),
            "log_bytes": log_bytes,
            "descriptors": {"before": before, "most": peak, "afterwards": server.descriptors},
            "answer_afterwards": answer.status_code,
        }
    finally:
        server.end()


def is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(65536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("artifact")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--crowd", type=int, help="Hold so many connections instead.")
    parser.add_argument("--files", type=int, default=256, help="Limit of open files, for --crowd.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.crowd:
        found = crowd(arguments.artifact, arguments.crowd, arguments.files, arguments.seconds)
    else:
        found = attack(arguments.artifact, arguments.seconds)
    text = json.dumps(found, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
