"""Tokens per second of answers computed together, in process and without HTTP.

    python benchmarks/serving/streams.py ARTIFACT [--streams 1 8] [--batching auto off] [--seeds] [--rounds 5]

Each round computes so many answers of random prompts at once, for each number of streams and kind of batching in turn.
A figure is the median over rounds of the tokens that come after every answer has its first, per second: prompts do not
count. "off" is the server's way where an engine cannot compute together, a token of each in turn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np

from normistral.artifact.manifest import read_manifest
from normistral.errors import NormistralError
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import BatchBackend, BatchSettings, Job
from normistral.server.backends.create import create_backend

CONTEXT = 1024


def measure(batch: BatchBackend, prompts: list[list[int]], tokens: int, seed: int | None) -> float:
    """Tokens/s of these answers, from the last first token on."""
    for index, ids in enumerate(prompts):
        config = GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, seed=seed, **({} if seed is not None else {"temperature": 0.0})
        )
        batch.add(Job(str(index), ids, config, "somebody"))
    begun: set[str] = set()
    counted, since = 0, 0.0
    while not batch.idle:
        for job_id, output in batch.step():
            if isinstance(output, NormistralError):
                raise output
            begun.add(job_id)
            counted += since > 0
        if not since and len(begun) == len(prompts):
            since = time.perf_counter()
    return counted / (time.perf_counter() - since)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batching", nargs="+", choices=["auto", "off"], default=["auto"])
    parser.add_argument("--seeds", action="store_true", help="sample with a seed instead of greedy answers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    vocabulary = read_manifest(arguments.artifact).architecture.vocabulary
    random = np.random.default_rng(1)
    batches = {
        kind: create_backend(
            arguments.artifact, BatchSettings(kind, 2**30, CONTEXT, 32), EngineConfig(exact=arguments.exact)
        ).batch
        for kind in arguments.batching
    }
    figures: dict[tuple[str, int], list[float]] = {}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for kind, batch in batches.items():
            for streams in arguments.streams:
                prompts = random.integers(0, vocabulary, (streams, arguments.prompt)).tolist()
                figure = measure(batch, prompts, arguments.tokens, number if arguments.seeds else None)
                if number:
                    figures.setdefault((kind, streams), []).append(figure)
    for (kind, streams), each in figures.items():
        one = median(figures[kind, arguments.streams[0]])
        print(
            f"{kind:5} {streams:3} streams {median(each):8.1f} tokens/s  {median(each) / one:5.2f} x  "
            f"({min(each):.1f} to {max(each):.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
