"""What every stack's process shares: it loads a model and measures when it is told to, over a pipe. Needs no package.

`python run_X.py MODEL [key=value ...]` answers each line of JSON on stdin with one on stdout, until stdin ends:

    {"do": "load"}                  → {"load_s": …, "library": …, "settings": {…}}
    {"do": "decode", "ids": [...], "tokens": N, "segments": S}
                                    → {"prefill_s": …, "prefill_cpu_s": …, "answer": [ids],
                                       "segments": [{"decode_s": …, "decode_cpu_s": …}, …]}

`prefill_s` ends when the first new token is known: it is the time to the first token. S segments of N further tokens
follow. Before each of them the process says {"mark": i} and stops itself, with all its threads, until the driver lets
it go on (SIGCONT); that time is not counted. Every token is the likeliest one, and none ends the answer. cpu_s
is processor time of all threads, so cpu_s / s is how many cores were busy.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TextIO

Settings = dict[str, str]


class Trace:
    """The tokens of one answer, and when each was known, without the time that the process stood still.

    Args:
        tokens: of a segment. The first token is the prompt's, the others are in segments.
        mark: called at the beginning of each segment with its number.
    """

    def __init__(self, tokens: int = 1, segments: int = 0, mark: Callable[[int], None] = lambda number: None) -> None:
        self.ids: list[int] = []
        self._tokens, self._segments, self._mark, self._still_s = tokens, segments, mark, 0.0
        self.stamps = [self._stamp()]  # the first is the beginning

    def add(self, token_id: int) -> None:
        self.ids.append(int(token_id))
        self.stamps.append(self._stamp())
        segment, within = divmod(len(self.ids) - 1, self._tokens)
        if within == 0 and segment < self._segments:
            started = time.perf_counter()
            self._mark(segment)
            self._still_s += time.perf_counter() - started

    def _stamp(self) -> tuple[float, float]:
        return time.perf_counter() - self._still_s, time.process_time()


class Runner(Protocol):
    """One model in one library."""

    def describe(self) -> Settings:
        """Versions under "library", and every setting that was given or can be asked for."""
        ...

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        """Answer a new prompt with `count` greedy tokens, each added to the trace as soon as it is known."""
        ...


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
            reply = measure(runner, request["ids"], request["tokens"], request["segments"], replies)
        print(json.dumps(reply), file=replies)


def measure(runner: Runner, token_ids: list[int], tokens: int, segments: int, replies: TextIO) -> dict[str, Any]:
    def mark(number: int) -> None:
        print(json.dumps({"mark": number}), file=replies)
        # To this very thread, which may be a library's: it would run on for a while if another one got the signal.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    trace = Trace(tokens, segments, mark)
    count = 1 + tokens * segments
    runner.generate(token_ids, count, trace)
    if len(trace.ids) != count:
        sys.exit(f"error: asked for {count} tokens, the library gave {len(trace.ids)}")
    began, *bounds = trace.stamps[0], *trace.stamps[1::tokens]
    return {
        "prefill_s": bounds[0][0] - began[0],
        "prefill_cpu_s": bounds[0][1] - began[1],
        "answer": trace.ids,
        "segments": [
            {"decode_s": end[0] - start[0], "decode_cpu_s": end[1] - start[1]} for start, end in pairwise(bounds)
        ],
    }
