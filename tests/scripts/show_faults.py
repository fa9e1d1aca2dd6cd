"""Do to a server what nobody should, and print what it answered, how fast, and what it cost.

    python tests/scripts/show_faults.py ARTIFACT

/health is asked all the while. Each line: the fault, what came of it, seconds, and by how much the server's memory
(HTTP process, without the worker) grew. Exits with 1 if one was not refused as it should, took longer or more than it
may, or if /health was slow.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from connection_faults import (
    ambiguous_requests,
    blanks_of_one_key,
    copied,
    crowd,
    exchanged_files,
    head_requests,
    silent_readers,
    stopped_worker,
)

MOST_S, MOST_BYTES = 0.1, 50 * 2**20
HEALTH_P99_S = 0.1
JSON = {"content-type": "application/json"}


class Server:
    """`normistral serve` of an artifact, with two keys."""

    keys = ("key-of-ola-nordmann-1", "key-of-kari-nordmann")

    def __init__(self, artifact: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "normistral", "serve", artifact, "--port", "0", "--json", "--grace-seconds", "2"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "NORMISTRAL_API_KEYS": ",".join(self.keys)},
        )
        assert self.process.stdout is not None
        start = json.loads(self.process.stdout.readline())
        self.url, (self.model,) = start["url"], start["models"]
        self.client = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {self.keys[0]}"}, timeout=60, limits=httpx.Limits()
        )
        self.wait_ready()

    def wait_ready(self) -> float:
        """Seconds until it was ready."""
        start = time.perf_counter()
        while self.client.get("/ready").status_code != 200:
            time.sleep(0.02)
        return time.perf_counter() - start

    def workers(self) -> list[int]:
        """Process ids."""
        return [
            int(name) for name in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def memory(self, pid: int | None = None) -> int:
        """Resident bytes of the HTTP process, or another."""
        status = Path(f"/proc/{pid or self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

    def peak_during(self, act: Callable[[], object]) -> int:
        """By how many bytes the HTTP process grew at most while something was done to it."""
        before, peak, done = self.memory(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, self.memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            act()
        finally:
            done.set()
            watcher.join()
        return max(0, peak - before)

    def ask(self, **fields: object) -> httpx.Response:
        body = {"model": self.model, "messages": [{"role": "user", "content": "Write a long story."}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def gauge(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"normistral_{name}{{")), 0.0)

    def raw(self, *pieces: bytes) -> bytes:
        """The first line that a connection answers, or what the system says."""
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            try:
                for piece in pieces:
                    if select.select([connection], [], [], 0)[0]:
                        break  # it has answered
                    connection.sendall(piece)
            except OSError:
                pass  # it refuses to read more; the answer may be there all the same
            try:
                return connection.recv(4096).partition(b"\r\n")[0]
            except OSError as exc:
                return str(exc).encode()


class Health:
    """Asks /health again and again in a process of its own, so that nothing here disturbs the clock."""

    script = (
        "import http.client, sys, time\n"
        "host, port = sys.argv[1].removeprefix('http://').split(':')\n"
        "connection = http.client.HTTPConnection(host, int(port), timeout=30)\n"
        "while True:\n"
        "    start = time.perf_counter()\n"
        "    connection.request('GET', '/health'); connection.getresponse().read()\n"
        "    print(time.perf_counter() - start, flush=True)\n"
        "    time.sleep(0.01)\n"
    )

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.script, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def end(self) -> list[float]:
        self.process.terminate()
        output, _ = self.process.communicate()
        return [float(line) for line in output.splitlines() if line.count(".") == 1]


class Report:
    """Prints a line for each fault, and remembers those that went wrong."""

    def __init__(self, server: Server) -> None:
        self.server, self.wrong = server, 0

    def refuse(self, name: str, wanted: int, act: Callable[[], object], grows: int = MOST_BYTES) -> None:
        """One request that has to be refused with this status, soon and cheaply."""
        got: list[tuple[object, float]] = []

        def timed() -> None:
            start = time.perf_counter()
            answer = act()
            got.append((answer, time.perf_counter() - start))

        grown = self.server.peak_during(timed)
        answer, seconds = got[0]
        status = answer.status_code if isinstance(answer, httpx.Response) else answer
        said = answer.json().get("error", {}).get("message", "")[:70] if isinstance(answer, httpx.Response) else ""
        right = str(wanted) in str(status) and seconds <= MOST_S and grown <= grows
        self.line(name, f"{status} {said}", right, seconds, grown)

    def endure(self, name: str, act: Callable[[], httpx.Response]) -> None:
        """One that is refused, or whose answer costs no more than others."""
        start, worker = time.perf_counter(), self.server.memory(self.server.workers()[0])
        got: list[httpx.Response] = []
        grown = self.server.peak_during(lambda: got.append(act()))
        grown += self.server.memory(self.server.workers()[0]) - worker
        seconds, refused = time.perf_counter() - start, got[0].status_code == 400
        said = got[0].json()["error"]["message"][:70] if refused else "followed"
        right = grown <= MOST_BYTES and (seconds <= MOST_S if refused else got[0].status_code == 200)
        self.line(name, f"{got[0].status_code} {said}", right, seconds, grown)

    def line(
        self, name: str, outcome: str, right: bool, seconds: float | None = None, grown: int | None = None
    ) -> None:
        self.wrong += not right
        cost = "" if seconds is None else f"{1000 * seconds:6.0f} ms"
        cost += "" if grown is None else f" {grown / 2**20:+5.1f} MiB"
        print(f"{'ok ' if right else 'BAD'} {name:<42} {outcome:<90} {cost}", flush=True)


def refusals(server: Server, report: Report) -> None:
    """Requests that must cost next to nothing."""
    post = server.client.post
    chat, text = "/v1/chat/completions", "/v1/completions"

    def deep(depth: int) -> bytes:
        return b'{"model":' + b"[" * depth

    report.refuse("n = 10^9", 400, lambda: server.ask(n=10**9))
    report.endure("max_tokens = 10^12", lambda: server.ask(max_tokens=10**12, structured_outputs={"choice": ["ja"]}))
    report.refuse("n = 10^400", 400, lambda: post(chat, content=b'{"n":1' + b"0" * 400 + b"}", headers=JSON))
    report.refuse(
        "a header of 1 MiB",
        431,
        lambda: server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"a" * 2**20, b"\r\n\r\n"),
    )
    report.refuse(
        "30,000 headers", 431, lambda: server.raw(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 30_000 + b"\r\n")
    )
    head = f"POST {text} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.keys[0]}\r\n"
    head += "Content-Type: application/json\r\n"
    announced = head.encode() + b"Content-Length: 104857600\r\n\r\n"
    chunked = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
    megabyte = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    report.refuse("a body of 100 MiB, announced", 413, lambda: server.raw(announced, *[b" " * 2**20] * 100))
    report.refuse("a body of 100 MiB, in chunks", 413, lambda: server.raw(chunked, *[megabyte] * 100))
    report.refuse("a body of 100 MiB without a key", 401, lambda: server.raw(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n", *[b" " * 2**20] * 100
    ))  # fmt: skip
    for depth in (100_000, 1_000_000):
        body = deep(depth)
        report.refuse(f"JSON {depth:,} deep", 400, lambda: post(chat, content=body, headers=JSON))  # noqa: B023
    keys = b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}"
    report.refuse("90,000 fields", 400, lambda: post(chat, content=keys, headers=JSON))
    numbers = b'{"model":"x","messages":[' + b",".join([b"1"] * 400_000) + b"]}"
    report.refuse("400,000 messages that are none", 400, lambda: post(chat, content=numbers, headers=JSON))
    report.refuse("JSON cut off", 400, lambda: post(chat, content=b'{"model": "', headers=JSON))
    report.refuse("no JSON at all", 400, lambda: post(chat, content=os.urandom(5000), headers=JSON))
    report.refuse("half a character", 400, lambda: post(chat, content=b'{"model":"\\ud800"}', headers=JSON))
    report.refuse("a form", 415, lambda: post(chat, data={"model": server.model}))
    report.refuse(
        "an unknown model", 404, lambda: post(chat, json={"model": "x", "messages": [{"role": "user", "content": ""}]})
    )
    report.refuse(
        "no HTTP", 400, lambda: server.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n")
    )
    long = "å" * 400_000
    report.refuse("a prompt of 400,000 letters", 400, lambda: post(text, json={"model": server.model, "prompt": long}))
    report.refuse("a message of 400,000 letters", 400, lambda: server.ask(messages=[{"role": "user", "content": long}]))
    report.refuse("5,000 messages", 400, lambda: server.ask(messages=[{"role": "user", "content": "x"}] * 5000))
    for name, structure in {
        "a catastrophic regular expression": {"regex": "(a{0,1000}){0,1000}b"},
        "a nested one": {"regex": "((((a+)+)+)+)+" + "(b|c){1,9999}" * 20},
        "one that nothing fits": {"regex": "[^\\s\\S]"},
        "a grammar that calls itself": {"grammar": "start: a\na: a a | a a a\n"},
        "a schema of 10,000 properties": {
            "json": {
                "type": "object",
                "properties": {f"p{i}": {"type": "string", "maxLength": 9999} for i in range(10_000)},
            }
        },
        "a schema that repeats without end": {
            "json": {"type": "array", "minItems": 10**9, "items": {"type": "string"}}
        },
    }.items():
        report.endure(name, lambda s=structure: server.ask(structured_outputs=s, max_tokens=4))  # type: ignore[misc]


def many_refusals(server: Server, report: Report) -> None:
    """A thousand requests, each refused."""
    before, start = server.memory(), time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(pool.map(lambda i: server.ask(n=10**9, seed=i).status_code, range(1000)))
    grown = server.memory() - before
    report.line(
        "1,000 refused requests", f"{dict(statuses)}", statuses == {400: 1000}, time.perf_counter() - start, grown
    )


def leavers(server: Server, report: Report) -> None:
    """Clients that vanish, in a stream and while they wait."""
    for streaming in (True, False):
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": "Tell me a story."}],
            "max_tokens": 2000,
        }

        def leave(_: int, body: dict[str, object] = body | {"stream": streaming, "ignore_eos": True}) -> None:
            try:
                with server.client.stream("POST", "/v1/chat/completions", json=body, timeout=1.0) as answer:
                    lines = answer.iter_lines()
                    next(lines)
            except httpx.TimeoutException:
                pass

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(leave, range(6)))
        start = time.perf_counter()
        while server.gauge("running_answers") + server.gauge("queued_answers") and time.perf_counter() - start < 20:
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        kind = "in a stream" if streaming else "while they wait"
        report.line(f"6 clients vanish {kind}", "all slots are free", seconds < 2, seconds)


def slow_reader(server: Server, report: Report) -> None:
    """A reader of a long stream who takes nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": server.model,
            "prompt": "x",
            "n": 6,
            "stream": True,
            "ignore_eos": True,
            "logprobs": 5,
            "max_tokens": 1000,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.keys[0]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    before = server.memory()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        start = time.perf_counter()
        connection.sendall(head.encode() + body)
        while not server.gauge("running_answers"):
            time.sleep(0.01)
        peak = before
        while server.gauge("running_answers") and time.perf_counter() - start < 200:
            peak = max(peak, server.memory())
            time.sleep(0.1)
    cancelled = server.gauge("running_answers") == 0
    report.line(
        "a reader who takes nothing", "cut off, slots free", cancelled, time.perf_counter() - start, peak - before
    )


def busy_key(server: Server, report: Report) -> None:
    """One key sends more than may wait; the other is still answered."""
    kari = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.keys[1]}"}, timeout=120)
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 24,
        "ignore_eos": True,
    }
    with ThreadPoolExecutor(90) as pool:
        many = [pool.submit(lambda: httpx.post(
            f"{server.url}/v1/chat/completions", json=body, timeout=300, headers=dict(server.client.headers)
        )) for _ in range(90)]  # fmt: skip
        while server.gauge("queued_answers") + server.gauge("running_answers") < 60:
            time.sleep(0.05)
        start = time.perf_counter()
        one = kari.post("/v1/chat/completions", json=body | {"max_tokens": 4})
        seconds, left = time.perf_counter() - start, sum(not answer.done() for answer in many)
        statuses = Counter(answer.result().status_code for answer in many)
        retry = {answer.result().headers.get("retry-after") for answer in many if answer.result().status_code == 429}
    right = set(statuses) == {200, 429} and one.status_code == 200 and left > 20 and None not in retry
    report.line("90 at once of one key", f"{dict(statuses)}, Retry-After {sorted(map(str, retry))}", right)
    report.line("another key meanwhile", f"{one.status_code}, {left} of the 90 were still waiting", right, seconds)


def canaries(server: Server, report: Report, count: int) -> None:
    """Prompts of one key that the other has just computed."""
    kari = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.keys[1]}"}, timeout=120)
    reused: dict[str, list[int]] = {"owner": [], "other": []}
    for i in range(count):
        # More tokens than are copied at least, and a beginning of its own: what either key has asked before is no help.
        secret = f"{i * 7919} is the password: " + " ".join(str((i + 3) * k * 7919 % 1000) for k in range(90))
        body = {"model": server.model, "prompt": secret, "max_tokens": 1}
        server.client.post("/v1/completions", json=body)
        for who, client in (("other", kari), ("owner", server.client)):
            usage = client.post("/v1/completions", json=body).json()["usage"]
            reused[who].append(usage["prompt_tokens_details"]["cached_tokens"])
    owner, other = max(reused["owner"]), max(reused["other"])
    report.line(
        f"{count} canaries across keys", f"{owner} tokens reused for the owner, {other} for the other", other == 0
    )


def killed_worker(server: Server, report: Report) -> None:
    """SIGKILL while four answers are written."""
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.ask, max_tokens=2000, ignore_eos=True) for _ in range(4)]
        while server.gauge("running_answers") < 4:
            time.sleep(0.01)
        os.kill(server.workers()[0], signal.SIGKILL)
        start = time.perf_counter()
        statuses = Counter(answer.result().status_code for answer in answers)
        told = time.perf_counter() - start
    again = server.wait_ready()
    fine = server.ask(max_tokens=4).status_code
    right = statuses == {503: 4} and fine == 200
    report.line("the worker is killed", f"{dict(statuses)}; ready again after {again:.1f} s, then {fine}", right, told)


def sigterm(server: Server, report: Report) -> None:
    """SIGTERM under load: short answers end, long ones get an error."""
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(server.ask, max_tokens=most, ignore_eos=True) for most in (4, 4, 3000, 3000)]
        while server.gauge("running_answers") < 4 and not answers[0].done():
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        start = time.perf_counter()
        statuses = [answer.result().status_code for answer in answers]
        code = server.process.wait(30)
    right = statuses == [200, 200, 503, 503] and code == 0
    report.line("SIGTERM under load", f"{statuses}, exit code {code}", right, time.perf_counter() - start)


def do_everything(server: Server, count: int, folder: Path) -> int:
    """Every fault in turn; 1 if something was not as it should be."""
    report = Report(server)
    server.ask(max_tokens=8, structured_outputs={"regex": "a+"})  # tables that are made once
    first = server.memory(), server.memory(server.workers()[0])
    health = Health(server.url)
    for act in (refusals, ambiguous_requests, head_requests, many_refusals, leavers, slow_reader, silent_readers):
        act(server, report)
    busy_key(server, report)
    blanks_of_one_key(server, report)
    canaries(server, report, count)
    last = server.memory(), server.memory(server.workers()[0])
    killed_worker(server, report)
    stopped_worker(server, report)
    exchanged_files(server, report, folder)
    sigterm(server, report)
    asked = sorted(health.end())
    p99 = asked[int(0.99 * len(asked))]
    report.line(
        "/health throughout",
        f"{len(asked)} times: median {1000 * statistics.median(asked):.1f} ms, worst {1000 * asked[-1]:.0f} ms, p99",
        p99 <= HEALTH_P99_S,
        p99,
    )
    for name, before, after in zip(("HTTP process", "worker"), first, last, strict=True):
        report.line(f"memory of the {name}", f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after", True)
    crowd(str(folder), report)
    return 1 if report.wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("artifact")
    parser.add_argument("--canaries", type=int, default=30)
    arguments = parser.parse_args()
    with copied(arguments.artifact) as folder:
        server = Server(str(folder))
        try:
            return do_everything(server, arguments.canaries, folder)
        finally:
            server.process.kill()


if __name__ == "__main__":
    sys.exit(main())
