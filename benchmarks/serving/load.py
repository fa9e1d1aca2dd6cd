"""Load on a server: many clients that ask for a while, and each answer checked.

    python benchmarks/serving/load.py artifacts/demo-openvino --exact --clients 1 4 8 32 --seconds 120 --json out.json

First one client asks every question alone: that is what the answers have to be. Then so many clients ask the same
questions in an order of their own, as fast as they get answers. An answer is

- same: word for word;
- mixed: word for word the answer to another question;
- changed: neither. With --exact there must be none. Without, rounding depends on who is computed together, and a greedy
  answer may take another turn where two tokens are nearly as likely (docs/decisions.md);
- lost: a stream that ended without a reason; or an error, counted by kind.

The server's memory (Pss of its processes, so what they share counts once) is read once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles

import httpx

QUESTIONS = (
    "What is {n} plus {m}? Explain.",
    "Hva er {n} pluss {m}? Forklar hvordan du regner.",
    "Kva er {n} pluss {m}? Forklar korleis du reknar.",
    "Write a short story about {n} boats and {m} seagulls.",
    "Skriv en kort historie om {n} båter og {m} måker.",
    "Skriv ei kort historie om {n} båtar og {m} måkar.",
    "List {n} things one can buy for {m} crowns.",
    "Gi meg en huskeliste med nummer {n} og {m}.",
)
_READY_S = 300.0


@dataclass(slots=True)
class Answer:
    """What came of one question: `problem` is "" for an answer that is whole."""

    question: int
    text: str = ""
    tokens: int = 0
    first_s: float = 0.0
    whole_s: float = 0.0
    problem: str = ""


@dataclass(slots=True)
class Round:
    """One number of clients."""

    clients: int
    seconds: float
    answers: int
    tokens_per_s: float
    first_p50_s: float
    first_p99_s: float
    verdicts: dict[str, int]
    memory_mib: list[float] = field(default_factory=list)


class Server:
    """Where to ask, and whose memory to watch."""

    def __init__(self, url: str, model: str, key: str | None, pid: int | None) -> None:
        self.url, self.model, self.pid = url.rstrip("/"), model, pid
        self.headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def memory_mib(self) -> float:
        """Pss of the process and those it started."""
        return sum(map(_pss_kib, _family(self.pid))) / 2**10 if self.pid else 0.0


@contextmanager
def started(artifact: str, options: list[str], key: str | None) -> Iterator[Server]:
    """A server of our own for one artifact, ended at the end."""
    command = [sys.executable, "-m", "normistral", "serve", artifact, "--port", "0", "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        server = Server(said["url"], said["models"][0], key, said["pid"])
        deadline = time.monotonic() + _READY_S
        while httpx.get(f"{server.url}/ready").status_code != 200:
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("the server did not become ready")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def make_questions(count: int) -> list[str]:
    """Questions of which no two are alike."""
    return [QUESTIONS[n % len(QUESTIONS)].format(n=n + 2, m=3 * n + 5) for n in range(count)]


def keep_distinct(expected: dict[int, str]) -> dict[int, str]:
    """Of the questions that have one answer, the first."""
    first = {text: number for number, text in reversed(expected.items())}
    return {number: text for number, text in expected.items() if first[text] == number}


async def ask(client: httpx.AsyncClient, server: Server, number: int, question: str, tokens: int) -> Answer:
    """One greedy answer, streamed."""
    answer = Answer(number)
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    ended = False
    try:
        async with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                answer.problem = f"status {response.status_code}"
                return answer
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.problem = f"error event {event['error'].get('code') or event['error'].get('type')}"
                    return answer
                if event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        answer.first_s = answer.first_s or time.perf_counter() - began
                        answer.text += choice["delta"]["content"]
                    ended = ended or choice["finish_reason"] is not None
    except httpx.HTTPError as exc:
        answer.problem = type(exc).__name__
        return answer
    answer.whole_s = time.perf_counter() - began
    answer.first_s = answer.first_s or answer.whole_s
    if not ended:
        answer.problem = "lost"
    return answer


async def run_round(
    server: Server, questions: list[str], expected: dict[int, str], clients: int, seconds: float, tokens: int
) -> Round:
    """So many clients for so long; answers that were begun are waited for."""
    answers: list[Answer] = []
    memory: list[float] = []
    began = time.perf_counter()
    deadline = began + seconds

    async def one_client(name: int) -> None:
        chooser = random.Random(name)
        async with httpx.AsyncClient(headers=server.headers, timeout=900) as client:
            while time.perf_counter() < deadline:
                number = chooser.choice(list(expected))
                answers.append(await ask(client, server, number, questions[number], tokens))

    async def watch_memory() -> None:
        while True:
            memory.append(round(server.memory_mib(), 1))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch_memory())
    await asyncio.gather(*map(one_client, range(clients)))
    took = time.perf_counter() - began
    watching.cancel()
    whole = [answer for answer in answers if not answer.problem]
    first = quantiles([answer.first_s for answer in whole] * 2 or [0.0, 0.0], n=100, method="inclusive")
    return Round(
        clients,
        round(took, 1),
        len(answers),
        round(sum(answer.tokens for answer in whole) / took, 1),
        round(first[49], 3),
        round(first[98], 3),
        dict(Counter(judge(answer, expected) for answer in answers)),
        memory,
    )


def judge(answer: Answer, expected: dict[int, str]) -> str:
    """Same, mixed, changed, or what else became of it."""
    if answer.problem:
        return answer.problem
    if answer.text == expected[answer.question]:
        return "same"
    return "mixed" if answer.text in expected.values() else "changed"


async def measure(server: Server, arguments: argparse.Namespace) -> list[Round]:
    """Ask alone, then with each number of clients."""
    questions = make_questions(arguments.questions)
    expected: dict[int, str] = {}
    async with httpx.AsyncClient(headers=server.headers, timeout=900) as client:
        for number, question in enumerate(questions):
            answer = await ask(client, server, number, question, arguments.tokens)
            if answer.problem:
                raise SystemExit(f"asked alone, question {number} got: {answer.problem}")
            expected[number] = answer.text
    expected = keep_distinct(expected)
    print(f"{len(expected)} of {len(questions)} questions have answers that can be told apart", file=sys.stderr)
    rounds = []
    for clients in arguments.clients:
        rounds.append(await run_round(server, questions, expected, clients, arguments.seconds, arguments.tokens))
        print_round(rounds[-1], rounds[0])
    return rounds


def print_round(one: Round, first: Round) -> None:
    """One line of the table; before the first its head."""
    if one is first:
        print("clients  answers  tok/s  times   first token p50 / p99   memory MiB first / most / last   answers are")
    memory = one.memory_mib or [0.0]
    times = one.tokens_per_s / first.tokens_per_s if first.tokens_per_s else 0.0
    verdicts = ", ".join(f"{count} {name}" for name, count in sorted(one.verdicts.items()))
    print(
        f"{one.clients:7}  {one.answers:7}  {one.tokens_per_s:5.1f}  {times:5.2f}   "
        f"{one.first_p50_s:9.3f} / {one.first_p99_s:.3f} s   "
        f"{memory[0]:12.0f} / {max(memory):.0f} / {memory[-1]:.0f}             {verdicts}",
        flush=True,
    )


def _family(pid: int) -> list[int]:
    """A process and all that came of it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_and_rest = stat.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        children.setdefault(int(name_and_rest[2].split()[1]), []).append(int(stat.parent.name))
    family = [pid]
    for member in family:
        family.extend(children.get(member, ()))
    return family


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", help="an artifact to serve, or the address of a server that runs")
    parser.add_argument("--model", help="what to ask for at that address")
    parser.add_argument("--pid", type=int, help="of that server, to watch its memory")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each number of clients")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48, help="most of an answer")
    parser.add_argument("--exact", action="store_true", help="reference arithmetic: no answer may change")
    parser.add_argument("--serve", nargs="*", default=[], metavar="OPTION", help="more options of serve, without --")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    key = os.environ.get("NORMISTRAL_API_KEY")
    if arguments.target.startswith("http"):
        server = Server(arguments.target, arguments.model or "", key, arguments.pid)
        rounds = asyncio.run(measure(server, arguments))
    else:
        options = [*(["--exact"] if arguments.exact else []), *(f"--{option}" for option in arguments.serve)]
        with started(arguments.target, options, key) as server:
            rounds = asyncio.run(measure(server, arguments))
    if arguments.json is not None:
        document = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "load": os.getloadavg()},
            "target": Path(arguments.target).name,
            "options": {name: getattr(arguments, name) for name in ("exact", "questions", "tokens", "serve")},
            "rounds": [asdict(one) for one in rounds],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
