"""What every stack's process shares: it loads a model and measures when it is told to, over a pipe. Needs no package.

`python run_X.py MODEL [key=value ...]` answers each line of JSON on stdin with one on stdout, until stdin ends:

    {"do": "load"}                               → {"load_s": …, "library": …, "settings": {…}}
    {"do": "prefill", "ids": [...]}              → {"prefill_s": …, "prefill_cpu_s": …, "answer": [one id]}
    {"do": "decode", "ids": [...], "tokens": N}  → the same, and {"decode_s": …, "decode_cpu_s": …} of N further tokens

`prefill_s` ends when the first new token is known: it is the time to the first token. Every token is the likeliest one,
and none ends the answer. cpu_s is processor time of all threads, so cpu_s / s is how many cores were busy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Settings = dict[str, str]


class Trace:
    """The tokens of one answer, and when each was known."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.stamps = [stamp()]  # the first is the beginning

    def add(self, token_id: int) -> None:
        self.ids.append(int(token_id))
        self.stamps.append(stamp())


class Runner(Protocol):
    """One model in one library."""

    def describe(self) -> Settings:
        """Versions under "library", and every setting that was given or can be asked for."""
        ...

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        """Answer a new prompt with `count` greedy tokens, each added to the trace as soon as it is known."""
        ...


def stamp() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def step_by_step(feed: Callable[[list[int]], int], token_ids: list[int], count: int, trace: Trace) -> None:
    """Generate with a library that takes tokens and gives the likeliest next one."""
    trace.add(feed(token_ids))
    while len(trace.ids) < count:
        trace.add(feed([trace.ids[-1]]))


def serve(load: Callable[[Path, Settings], Runner]) -> None:
    """Run as a process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like; replies have their own pipe
    runner: Runner | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            started = time.perf_counter()
            runner = load(arguments.model, settings)
            reply: dict[str, Any] = {"load_s": time.perf_counter() - started}
            described = runner.describe()
            reply |= {"library": described.pop("library"), "settings": described}
        else:
            assert runner is not None
            reply = measure(runner, request["ids"], request.get("tokens", 0))
        print(json.dumps(reply), file=replies)


def measure(runner: Runner, token_ids: list[int], tokens: int) -> dict[str, Any]:
    trace = Trace()
    runner.generate(token_ids, tokens + 1, trace)
    if len(trace.ids) != tokens + 1:
        sys.exit(f"error: asked for {tokens + 1} tokens, the library gave {len(trace.ids)}")
    began, first, last = trace.stamps[0], trace.stamps[1], trace.stamps[-1]
    reply = {"prefill_s": first[0] - began[0], "prefill_cpu_s": first[1] - began[1], "answer": trace.ids}
    if tokens:
        reply |= {"decode_s": last[0] - first[0], "decode_cpu_s": last[1] - first[1]}
    return reply
