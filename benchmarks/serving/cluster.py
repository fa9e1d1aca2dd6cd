"""Replicas behind Ray Serve under load: throughput of one and two, and what a killed one costs. Needs the extra `ray`.

    python benchmarks/serving/cluster.py ARTIFACT [--clients 8] [--seconds 40] [--port 8123]

Every request is a session of its own, so that both replicas have their share. Every answer is compared with the one
that the library gives (greedy, exact arithmetic). A request counts as right, as wrong, as refused (an error in OpenAI's
shape, or an error event in its stream), or as lost: anything else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import normistral
from normistral.cluster.serve import serving
from normistral.errors import NormistralError
from normistral.hardware import plan_threads, read_machine

SUBJECTS = (
    "snow",
    "bread",
    "a river",
    "the sun",
    "a fish",
    "iron",
    "a fjord",
    "rain",
    "a bridge",
    "wool",
    "a boat",
    "ice",
)
_MARK = "NORMISTRAL_KILLS"


def known_answers(artifact: str, tokens: int) -> dict[str, str]:
    questions = [f"What is {subject}?" for subject in SUBJECTS]
    with normistral.load(artifact, exact=True) as model:
        return {
            question: model.chat().send(question, temperature=0.0, max_new_tokens=tokens).text for question in questions
        }


def ask(url: str, model: str, question: str, tokens: int, session: str, *, stream: bool) -> tuple[str, str]:
    """(what became of it, the answer's text or the error's code)."""
    document = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    }
    headers = {"Content-Type": "application/json", "X-Session-Id": session}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(document).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            raw = answer.read().decode()
    except urllib.error.HTTPError as error:
        try:
            return "refused", f"{error.code} {json.loads(error.read())['error']['code']}"
        except (ValueError, KeyError):
            return "lost", f"{error.code} without OpenAI's shape"
    except OSError as error:
        return "lost", type(error).__name__
    return read_stream(raw) if stream else ("answered", json.loads(raw)["choices"][0]["message"]["content"])


def read_stream(raw: str) -> tuple[str, str]:
    text = ""
    for line in raw.splitlines():
        if line == "data: [DONE]":
            return "answered", text
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return "refused", f"in the stream: {event['error']['code']}"
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return "lost", "the stream ended without an end"


class Load:
    """Clients that ask one question after the other until the time is over."""

    def __init__(self, url: str, model: str, known: dict[str, str], clients: int, tokens: int) -> None:
        self._url, self._model, self._known, self._tokens = url, model, list(known.items()), tokens
        self._lock = threading.Lock()
        self._clients = clients
        self.outcomes: Counter[str] = Counter()
        self.seconds: list[float] = []

    def run(self, seconds: float, halfway: Callable[[], None] = lambda: None) -> dict[str, Any]:
        started = time.monotonic()
        threads = [
            threading.Thread(target=self._ask_on, args=(number, started + seconds)) for number in range(self._clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        halfway()
        for thread in threads:
            thread.join()
        took = time.monotonic() - started
        right = self.outcomes["right"]
        return {
            "right_per_s": round(right / took, 2),
            "median_s": round(statistics.median(self.seconds), 2) if self.seconds else None,
            "outcomes": dict(self.outcomes),
        }

    def _ask_on(self, number: int, end: float) -> None:
        turn = number
        while time.monotonic() < end:
            question, wanted = self._known[turn % len(self._known)]
            began = time.monotonic()
            outcome, told = ask(
                self._url, self._model, question, self._tokens, f"{number}-{turn}", stream=bool(turn % 2)
            )
            if outcome == "answered":
                outcome = "right" if told == wanted else "wrong"
            with self._lock:
                self.outcomes[outcome if outcome == "right" else f"{outcome}: {told[:60]}"] += 1
                if outcome == "right":
                    self.seconds.append(time.monotonic() - began)
            if outcome != "right":
                time.sleep(0.5)  # as a client that heeds Retry-After would
            turn += self._clients + 1


def processes(name: bytes, mark: str) -> Iterator[int]:
    """Processes of this run that Ray calls so, or that run this code."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                told, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if name in told and f"{_MARK}={mark}".encode() in environment:
                yield int(folder.name)


def kill(name: bytes, what: str, mark: str) -> None:
    victim = next(processes(name, mark))
    os.kill(victim, signal.SIGKILL)
    print(f"  killed {what} {victim}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--port", type=int, default=8123)
    arguments = parser.parse_args()
    os.environ[_MARK] = mark = str(time.monotonic_ns())
    cores = plan_threads(read_machine())
    model = Path(arguments.artifact).resolve().name
    known = known_answers(arguments.artifact, arguments.tokens)
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    cases: list[tuple[str, int, int, Callable[[], None]]] = [
        ("one replica, half the cores", 1, cores // 2, nothing),
        ("one replica, all cores", 1, cores, nothing),
        ("two replicas, half the cores each", 2, cores // 2, nothing),
        ("two, one killed", 2, cores // 2, lambda: kill(b"ray::ServeReplica:normistral:models", "replica", mark)),
        ("two, a worker process killed", 2, cores // 2, lambda: kill(b"normistral.server.worker", "worker", mark)),
    ]
    results = {}
    for name, replicas, threads, halfway in cases:
        print(f"{name}:", flush=True)
        options = {
            "artifact": str(Path(arguments.artifact).resolve()),
            "replicas": replicas,
            "threads": max(1, threads),
            "no_api_key": True,
            "exact": True,
            "batching": "off",
        }
        try:
            with serving(options, arguments.port) as url:
                results[name] = Load(url, model, known, arguments.clients, arguments.tokens).run(
                    arguments.seconds, halfway
                )
        except NormistralError as error:
            raise SystemExit(f"{error.message} ({error.hint})") from None
        print(f"  {json.dumps(results[name])}", flush=True)
    print(json.dumps(results))
    bad = [key for result in results.values() for key in result["outcomes"] if key.startswith(("wrong", "lost"))]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
