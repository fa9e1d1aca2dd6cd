"""Several models, memory for one: is every answer that model's, what stays behind, and how long does a switch take?

    python benchmarks/serving/on_demand.py ARTIFACT ARTIFACT ARTIFACT [--clients 6] [--times 20] [--tokens 40]

First each model is asked alone; that is what its answers have to be (seeded, so the same to the last bit). Then so many
clients ask each model in turn, so many rounds; with --apart each client begins with another one, so that all are wanted
all the time. Worker processes and the memory of all processes (Pss, what they share counts once) are looked at ten
times a second; loads are from /metrics. After each round the first model is loaded, and the memory is noted. A switch
is from a question to its whole answer, for the first of the clients that ask a model which is not loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from statistics import median

import httpx

QUESTIONS = (
    "Hva er {n} pluss {n}? Forklar.",
    "Write a short story about {n} boats.",
    "Gi meg en huskeliste med {n} ting.",
)
CACHE_MIB = 512
PROCESS_MIB = 320  # as the server counts it


class Watch:
    """Processes of a server, looked at until it ends."""

    def __init__(self, pid: int) -> None:
        self.pid, self.workers, self.peak_mib, self.over = pid, 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def descriptors(self) -> int:
        """Open ones of the HTTP process."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def memory_mib(self, *, worker: bool = True) -> float:
        """Of the server, and of its workers."""
        return sum(_pss_mib(pid) for pid in (self.pid, *(_children(self.pid) if worker else ())))

    def end(self) -> None:
        """Look no more."""
        self.over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.over.wait(0.1):
            self.workers = max(self.workers, len(_children(self.pid)))
            self.peak_mib = max(self.peak_mib, self.memory_mib())


def _children(pid: int) -> list[int]:
    try:
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [one for one in children if Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[0] != "Z"]
    except OSError:
        return []


def _pss_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def _ask(client: httpx.Client, model: str, question: str, tokens: int) -> tuple[str, float]:
    began = time.perf_counter()
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "seed": 7,
        "ignore_eos": True,
    }
    answer = client.post("/v1/chat/completions", json=body)
    text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else f"HTTP {answer.text}"
    return text, time.perf_counter() - began


def _sum_of(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"normistral_{name}{{"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--apart", action="store_true")
    arguments = parser.parse_args()
    largest = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in arguments.artifacts) / 2**20
    memory = int(1.1 * largest + CACHE_MIB + PROCESS_MIB + 64)
    command = [sys.executable, "-m", "normistral", "serve", *map(str, arguments.artifacts), "--port", "0", "--json"]
    limits = ["--memory-mib", str(memory), "--cache-mib", str(CACHE_MIB), "--max-context", "1024"]
    server = subprocess.Popen(command + limits, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    start = json.loads(server.stdout.readline())
    models = start["models"]
    questions = [question.format(n=number) for question in QUESTIONS for number in (3, 8)]
    watch = None
    try:
        with httpx.Client(base_url=start["url"], timeout=600, limits=httpx.Limits()) as client:
            expected = {
                (model, question): _ask(client, model, question, arguments.tokens)[0]
                for model in models
                for question in questions
            }
            different = len({tuple(expected[model, question] for question in questions) for model in models})
            before = client.get("/metrics").text
            watch = Watch(server.pid)
            idle = watch.memory_mib(), watch.descriptors()

            def visit(number: int, turn: int, place: int) -> tuple[str, float]:
                model = models[(place + number * arguments.apart) % len(models)]
                question = questions[(turn + number) % len(questions)]
                text, seconds = _ask(client, model, question, arguments.tokens)
                if text == expected[model, question]:
                    return "right", seconds
                others = (expected[other, question] for other in models if other != model)
                return "another model's" if text in others else text if text.startswith("HTTP") else "changed", seconds

            def visit_all(number: int, turn: int) -> list[tuple[str, float]]:
                return [visit(number, turn, place) for place in range(len(models))]

            began, answers, switches, rounds = time.perf_counter(), [], [], []
            with ThreadPoolExecutor(arguments.clients) as pool:
                clients = range(arguments.clients)
                for turn in range(arguments.times):
                    if arguments.apart:
                        answers += [one for some in pool.map(visit_all, clients, repeat(turn)) for one in some]
                    for place in range(0 if arguments.apart else len(models)):
                        told = list(pool.map(visit, clients, repeat(turn), repeat(place)))
                        answers += told
                        if place:  # the first one is loaded since the end of the round before
                            switches.append(min(waited for _, waited in told))
                    switches.append(_ask(client, models[0], questions[0], 1)[1])
                    rounds.append((watch.memory_mib(worker=False), watch.memory_mib()))
                    print(f"round {turn + 1}: server {rounds[-1][0]:.1f} MiB, all {rounds[-1][1]:.1f} MiB", flush=True)
            seconds = time.perf_counter() - began
            after = client.get("/metrics").text
            _ask(client, models[0], questions[0], 1)
            time.sleep(1)
            left = watch.memory_mib(), watch.descriptors()
    finally:
        if watch is not None:
            watch.end()
        server.terminate()
        server.wait()
    names = ("model_loads_total", "model_load_seconds_sum")
    loads, load_s = (_sum_of(after, name) - _sum_of(before, name) for name in names)
    loaded_mib = [f"{rounds[turn][0]:.0f} and {rounds[turn][1]:.0f}" for turn in (min(2, len(rounds) - 1), -1)]
    waits = sorted(wait for _, wait in answers)
    p99 = waits[int(0.99 * len(waits))]
    (idle_mib, idle_files), (left_mib, left_files) = idle, left
    print(f"{len(models)} models, {different} of them with answers of their own; memory for {memory} MiB")
    print(f"{len(answers)} answers in {seconds:.0f} s: {dict(Counter(kind for kind, _ in answers))}")
    print(f"seconds of an answer: median {median(waits):.2f}, p99 {p99:.2f}, worst {waits[-1]:.2f}")
    print(f"{loads:.0f} loads, {load_s / max(loads, 1):.2f} s each; {len(answers) / max(loads, 1):.1f} answers a load")
    print(f"{len(switches)} switches, question to answer: median {median(switches):.2f} s, worst {max(switches):.2f}")
    print(
        f"memory of the server and of all, MiB, after 3 rounds: {loaded_mib[0]}; after {len(rounds)}: {loaded_mib[1]}"
    )
    print(f"worker processes at once: {watch.workers} at most; memory of all {watch.peak_mib:.0f} MiB at most")
    print(
        f"one model loaded, before: {idle_mib:.0f} MiB, {idle_files} descriptors; after: {left_mib:.0f}, {left_files}"
    )


if __name__ == "__main__":
    main()
