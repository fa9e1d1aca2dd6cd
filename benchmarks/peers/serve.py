"""What every runner of onnx_peers.py shares: measure when told to, over a pipe. Needs numpy alone.

A runner process loads one model and answers every line `PROMPT DECODE` on stdin with one line of JSON on stdout, until
stdin ends: the first, which warms up, with what it is; each later one with the figures of a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

Settings = dict[str, str]
FIRST_ID, LAST_ID = 300, 3000  # ordinary tokens of every vocabulary that is compared


class Runner(Protocol):
    """One model in one library; `prefill` and `decode_step` leave the next token's logits computed."""

    def describe(self) -> Settings:
        """Library, version and settings in force."""
        ...

    def prefill(self, token_ids: list[int]) -> None:
        """Start a new sequence with these tokens, in the pieces that the library feeds by itself."""
        ...

    def decode_step(self) -> None:
        """Append the most likely token and compute its logits."""
        ...


def serve(load: Callable[[Path, Settings], Runner]) -> None:
    """Run as a process: `python run_X.py MODEL [key=value ...]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like; replies have their own pipe
    started = time.perf_counter()
    runner = load(arguments.model, dict(setting.split("=", 1) for setting in arguments.settings))
    load_s = time.perf_counter() - started
    warm = False
    for line in sys.stdin:
        figures = measure(runner, *map(int, line.split()))
        # Kernels are compiled and weights are paged in at first use: the first figures are not shown.
        reply = figures if warm else {"load_s": round(load_s, 2), **runner.describe()}
        print(json.dumps(reply), file=replies)
        warm = True


def measure(runner: Runner, prompt: int, decode: int) -> dict[str, float]:
    """Speeds in tokens/s of `prompt` random tokens and of `decode` greedy ones after them; cores are CPU s per s."""
    ids = np.random.default_rng(0).integers(FIRST_ID, LAST_ID, prompt).tolist()
    start, start_cpu = time.perf_counter(), time.process_time()
    runner.prefill(ids)
    middle, middle_cpu = time.perf_counter(), time.process_time()
    for _ in range(decode):
        runner.decode_step()
    end, end_cpu = time.perf_counter(), time.process_time()
    return {
        "prefill_tokens_per_s": prompt / (middle - start),
        "decode_tokens_per_s": decode / (end - middle),
        "prefill_cores": (middle_cpu - start_cpu) / (middle - start),
        "decode_cores": (end_cpu - middle_cpu) / (end - middle),
    }
