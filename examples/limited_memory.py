"""A model inside an application that must not be harmed by it: in a process of its own, under a memory limit.

    python examples/limited_memory.py ARTIFACT --limit-mib 600
    python examples/limited_memory.py ARTIFACT --limit-mib 200 --anyway     # what happens when it is too little

The estimate comes from the artifact's manifest, before anything is loaded. The limit is RLIMIT_DATA (getrlimit(2)),
which counts what Linux cannot drop: not the mapped weight files, but all that is computed from them. In a container or
a systemd unit with MemoryMax the same estimate holds against that limit, which `available_memory_bytes` knows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import normistral
from normistral.artifact.manifest import Manifest, read_manifest
from normistral.artifact.store import resolve_artifact
from normistral.errors import ResourceError
from normistral.hardware import available_memory_bytes

MIB = 2**20
RUNTIME_BYTES = 200 * MIB  # Python, numpy, the engine's code, its threads' stacks; 150 to 190 were measured
# The engines keep weights in an order of their own: 1.2 to 1.5 times the files with AVX512. With AVX2 1.6 is too
# little: there OpenVINO has one order for prompts and another for single tokens.
WEIGHTS_SHARE = 2.5
CACHE_ELEMENT_BYTES = 4  # float32, at most


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a model will take, the parts apart."""

    runtime: int
    weights: int
    cache: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.runtime + self.weights + self.cache


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model's process has to say: the answer, or the error; and the most memory that was resident."""

    text: str = ""
    error: str = ""
    hint: str = ""
    peak_bytes: int = 0


def estimate(manifest: Manifest, tokens: int) -> Estimate:
    """What an artifact will take with a prompt and answer of so many tokens together."""
    shape = manifest.architecture
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * CACHE_ELEMENT_BYTES  # keys and values
    return Estimate(RUNTIME_BYTES, int(manifest.total_bytes * WEIGHTS_SHARE), per_token * tokens)


def require_room(needed: Estimate, limit_bytes: int) -> None:
    """Raise ResourceError if it does not fit under the limit, or into what the machine or container has left."""
    room = min(limit_bytes, available_memory_bytes())
    if needed.total > room:
        raise ResourceError(
            f"the model needs about {needed.total / MIB:.0f} MiB; there are {room / MIB:.0f} MiB",
            "raise the limit, take a smaller artifact (int4), or fewer --tokens",
        )


def answer_under_limit(report: Connection, artifact: str, prompt: str, tokens: int, limit_bytes: int) -> None:
    """The model's process: limit itself, then load and answer."""
    import resource

    from normistral.evaluation.bench.machine import read_process_memory

    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    try:
        with normistral.load(artifact) as model:
            room = tokens - len(model.encode(prompt))
            completion = model.generate(prompt, temperature=0, max_new_tokens=max(1, room), stop="\n")
            report.send(Answer(completion.text, peak_bytes=read_process_memory().peak or 0))
    except normistral.NormistralError as exc:
        report.send(Answer(error=exc.message, hint=exc.hint))
    except MemoryError:
        report.send(Answer(error="Python itself ran out of memory", hint="raise the limit"))


def run(artifact: str, prompt: str, tokens: int, limit_bytes: int) -> Answer:
    """Start the process and wait for what it says; one that died without a word is reported all the same."""
    processes = multiprocessing.get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=answer_under_limit, args=(sender, artifact, prompt, tokens, limit_bytes))
    process.start()
    sender.close()  # so that `recv` notices when the process is gone
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return Answer(error=f"the model's process ended ({how}) before it could say why", hint="raise the limit")
    finally:
        process.join()


def main(arguments: list[str] | None = None) -> None:
    """Estimate, then answer under the limit."""
    parser = argparse.ArgumentParser(description="Answer under a memory limit.")
    parser.add_argument("artifact")
    parser.add_argument("--limit-mib", type=int, required=True)
    parser.add_argument("--prompt", default="The three largest cities of Norway are")
    parser.add_argument("--tokens", type=int, default=64, help="of prompt and answer together")
    parser.add_argument("--anyway", action="store_true", help="try it even if the estimate says that it will not do")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        raise ResourceError("this example needs Linux", "elsewhere RLIMIT_DATA does not count what is mapped")
    folder = resolve_artifact(options.artifact)
    limit_bytes = options.limit_mib * MIB
    needed = estimate(read_manifest(Path(folder)), options.tokens)
    parts = ", ".join(f"{name} {getattr(needed, name) / MIB:.0f}" for name in ("runtime", "weights", "cache"))
    print(f"limit      {options.limit_mib} MiB\nestimate   {needed.total / MIB:.0f} MiB ({parts})")
    if not options.anyway:
        require_room(needed, limit_bytes)
    answer = run(options.artifact, options.prompt, options.tokens, limit_bytes)
    if answer.error:
        raise ResourceError(answer.error, answer.hint)
    print(f"answer     {options.prompt}{answer.text.rstrip()}")
    print(f"peak       {answer.peak_bytes / MIB:.0f} MiB resident, mapped files included")


if __name__ == "__main__":
    try:
        main()
    except normistral.NormistralError as exc:
        sys.exit(f"error: {exc.message}\nhint: {exc.hint}")
