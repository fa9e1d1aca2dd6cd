"""Does the KV cache of one tenant ever save another one work?

    python benchmarks/serving/prefix_canaries.py ARTIFACT [--canaries 10000] [--one-tenant]

For each canary, one tenant asks with a secret prompt of 96 tokens, and then another with the very same. Prompts are fed
in pieces of 32 tokens, so a prompt that is computed takes three steps until its first token, and one that was found in
a cache takes one: steps are counted, which is sharper than any clock. With --one-tenant both are the same tenant, and
nearly every second prompt has to be found: that shows that the counting works.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np

from normistral.artifact.manifest import read_manifest
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.options import GenerationConfig
from normistral.server.backends.base import BatchBackend, BatchSettings, Job
from normistral.server.backends.create import create_backend

PROMPT, PIECE = 96, 32


def count_steps(batch: BatchBackend, name: str, prompt_ids: list[int], tenant: str) -> int:
    """Steps until the first token of an answer of one token."""
    batch.add(Job(name, prompt_ids, GenerationConfig(max_new_tokens=1), tenant))
    steps = 1
    while not batch.step():
        steps += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--canaries", type=int, default=10_000)
    parser.add_argument("--one-tenant", action="store_true")
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.artifact)
    settings = BatchSettings("auto", 2**30, 256, slots=1)
    batch = create_backend(arguments.artifact, settings, EngineConfig(settings={"prefill_chunk": str(PIECE)})).batch
    random = np.random.default_rng(1)
    first, second = Counter[int](), Counter[int]()
    began = time.perf_counter()
    for canary in range(arguments.canaries):
        secret = random.integers(5, min(manifest.architecture.vocabulary, 32_000), PROMPT).tolist()
        first[count_steps(batch, f"{canary} owner", secret, "one")] += 1
        second[count_steps(batch, f"{canary} other", secret, "one" if arguments.one_tenant else "another")] += 1
    batch.close()
    print(
        f"{arguments.canaries} canaries in {time.perf_counter() - began:.0f} s; a prompt takes {PROMPT // PIECE} steps"
    )
    print(f"steps of those who asked first: {dict(first)}; of those who asked the same after them: {dict(second)}")


if __name__ == "__main__":
    main()
