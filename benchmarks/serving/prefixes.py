"""Long system prompts, several keys, many clients: time to the first token with and without a shared beginning.

    python benchmarks/serving/prefixes.py ARTIFACT [--keys 4] [--clients 8] [--words 1200]

Rounds: no prompt shares anything; each key has a system prompt of its own, which is new; the same again with other
questions; and, on a server that was started with `--prefix`, one system prompt of all keys, which nobody asked before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import httpx

WORDS = (
    "kommunen",
    "vedtok",
    "skole",
    "veien",
    "barn",
    "ansatte",
    "møte",
    "plan",
    "budsjett",
    "lærere",
    "frist",
    "vinter",
)


def _text(seed: str, words: int) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) for _ in range(words))


@contextmanager
def _serving(artifact: Path, keys: Sequence[str], *options: str) -> Iterator[tuple[str, str, float]]:
    """URL, model, and seconds until it was ready."""
    began = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "normistral", "serve", str(artifact), "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NORMISTRAL_API_KEYS": ",".join(keys)},
    )
    assert server.stdout is not None
    try:
        start = json.loads(server.stdout.readline())
        while httpx.get(f"{start['url']}/ready").status_code != 200:
            time.sleep(0.1)
        yield start["url"], start["models"][0], time.perf_counter() - began
    finally:
        server.terminate()
        server.wait()


def _first_token(url: str, model: str, key: str, system: str, question: str) -> tuple[float, int, int]:
    """Seconds, cached tokens, and tokens of the prompt."""
    body = {
        "model": model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": question}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage = time.perf_counter(), 0.0, {}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                first = first or time.perf_counter() - began
                usage = event.get("usage") or usage
    return first, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--words", type=int, default=1200)
    arguments = parser.parse_args()
    keys = [f"key-of-benchmark-{number:04d}" for number in range(arguments.keys)]

    def round_of(name: str, url: str, model: str, system_of: str) -> None:
        def ask(client: int) -> tuple[float, int, int]:
            system = _text(system_of.format(client=client, key=client % len(keys)), arguments.words)
            return _first_token(url, model, keys[client % len(keys)], system, f"{name}: hva står det? Svar {client}.")

        with ThreadPoolExecutor(arguments.clients) as pool:
            found = list(pool.map(ask, range(arguments.clients)))
        seconds = sorted(one[0] for one in found)
        cached = sorted({one[1] for one in found})
        print(
            f"{name:32} first token p50 {median(seconds):6.2f} s, worst {seconds[-1]:6.2f} s; "
            f"cached {cached} of {max(one[2] for one in found)} tokens",
            flush=True,
        )

    with _serving(arguments.artifact, keys) as (url, model, _):
        round_of("nothing shared", url, model, "alone {client}")
        round_of("a system prompt a key, new", url, model, "key {key}")
        round_of("the same again", url, model, "key {key}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "system.txt"
        file.write_text(_text("operator", arguments.words) + "\n", encoding="utf-8")
        for start in ("first", "second"):
            with _serving(arguments.artifact, keys, "--prefix", f"benchmark={file}") as (url, model, ready_s):
                round_of(f"--prefix, {start} start", url, model, "operator")
            print(f"{'':32} ready after {ready_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
