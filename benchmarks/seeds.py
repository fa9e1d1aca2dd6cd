"""Repeatability of a seeded request between other traffic: number of distinct texts, and cost.

    python benchmarks/seeds.py ARTIFACT... --repeats 100 --output benchmarks/results/DATE-seeds.json

For each artifact: the library (default and exact), the server with answers in turns (`--batching off`), and where the
artifact is computed together, the server's batched route. Between two repetitions comes one of: another prompt, one
with the same beginning, with and without a seed, a stream that is given up, a conversation, a prefix, a saved and
restored session, an answer with drafts. The request is a prompt of several chunks; the last rounds are in a process
that was started anew. The price is the time to first token of a conversation's second turn, with and without a seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import httpx

import normistral
from normistral.artifact.manifest import read_manifest
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.model import Model

TEXT = (
    "Kommunen vedtok tirsdag å bygge ny skole på Åsen. Den skal stå ferdig i 2029, og den gamle rives. "
    "Rådmannen sier at elevene får plass i brakker så lenge, og at ingen mister skyssen. "
)
ASKED = TEXT * 3 + "Hva mener rektor?"
SEEDED = {"seed": 7, "temperature": 1.3}
TOKENS = 24
SETTINGS = {"prefill_chunk": "64"}  # so that a short prompt has several chunks


def traffic(model: Model, folder: Path) -> list[Callable[[int], None]]:
    """What other people do with the model between two repetitions; each takes a number."""
    plain: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0.8}

    def given_up(number: int) -> None:
        stream = model.stream(ASKED + f" Nei, {number}.", **plain)
        next(stream)
        stream.close()

    def conversation(number: int) -> None:
        chat = model.chat(system=TEXT * 2)
        chat.send(f"Hei {number}", **plain)
        chat.fork().send("Og?", **plain)

    def session(number: int) -> None:
        prefix = model.prefill(ASKED)
        prefix.save(folder / "prefix.session")
        restored = model.restore_prefix(folder / "prefix.session")
        restored.generate(f" {number}", **plain)
        restored.generate(f" {number}", **plain, seed=number)

    ways: list[Callable[[int], Any]] = [
        lambda n: model.generate(f"Noe helt annet, nummer {n}", **plain),
        lambda n: model.generate(ASKED[: 200 + 20 * (n % 20)] + f" {n}", **plain),
        lambda n: model.generate(ASKED + f" {n}", **plain, seed=n),
        lambda n: model.generate(ASKED, **plain),
        given_up,
        session,
        lambda n: model.generate(ASKED + " 1 2 3 4 1 2 3 4 1 2 3", **plain | {"temperature": 0}),
    ]
    return [*ways, conversation] if model.manifest.template is not None else ways


def repeat_in_library(artifact: Path, repeats: int, *, exact: bool) -> dict[str, Any]:
    """Texts of the request in two processes' worth of models, and how many were there."""
    texts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for rounds in (repeats - repeats // 10, repeats // 10):
            with normistral.load(artifact, exact=exact, settings=SETTINGS) as model:
                others = traffic(model, Path(scratch))
                for number in range(rounds):
                    found = model.generate(ASKED, max_new_tokens=TOKENS, ignore_eos=True, **SEEDED)
                    texts[found.text] += 1
                    others[number % len(others)](number)
    return {"repetitions": texts.total(), "texts": len(texts)}


def measure_second_turn(artifact: Path, rounds: int = 5) -> dict[str, float]:
    """Medians of the time to first token of a second turn, in seconds, and of the tokens computed for it."""
    found: dict[str, float] = {}
    with normistral.load(artifact) as model:
        for name, options in (("plain", {"temperature": 0.8}), ("seeded", SEEDED)):
            firsts, tokens = [], []
            for number in range(rounds):
                chat = model.chat(system=f"{number}. {TEXT * 6}")
                chat.send("Hva skal bygges?", max_new_tokens=100, ignore_eos=True, draft="off", **options)
                timings = chat.send("Og når?", max_new_tokens=2, draft="off", **options).timings
                firsts.append(timings.ttft_s)
                tokens.append(timings.prompt_tokens - timings.cached_tokens)
            found[f"{name}_ttft_s"] = round(statistics.median(firsts), 3)
            found[f"{name}_computed_tokens"] = statistics.median(tokens)
    return found


async def repeat_on_server(url: str, name: str, repeats: int) -> dict[str, Any]:
    """Texts and fingerprints of the request while others ask, three at a time."""
    texts: Counter[str] = Counter()
    choices: list[Counter[str]] = [Counter(), Counter()]
    prints: Counter[str | None] = Counter()
    numbers = count()
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(**changes: Any) -> Any:
            body = {"model": name, "prompt": ASKED, "max_tokens": TOKENS, "ignore_eos": True} | changes
            answer = await client.post("/completions", json=body)
            answer.raise_for_status()
            return answer.json()

        async def bother() -> None:
            while not done.is_set():
                number = next(numbers)
                ways: list[dict[str, Any]] = [
                    {"prompt": f"Noe annet {number}", "max_tokens": 9},
                    {"prompt": ASKED[: 200 + 20 * (number % 20)] + f" {number}", "max_tokens": 9},
                    {"max_tokens": 5, "temperature": 0.8},
                    {"prompt": ASKED + f" {number}", "max_tokens": 5, "seed": number},
                ]
                if number % 5 == 4:  # a client that leaves
                    body = {"model": name, "prompt": ASKED, "max_tokens": 50, "stream": True}
                    async with client.stream("POST", "/completions", json=body) as stream:
                        async for _ in stream.aiter_lines():
                            break
                else:
                    await ask(**ways[number % 4])

        others = [asyncio.create_task(bother()) for _ in range(3)]
        for number in range(repeats):
            answer = await ask(**SEEDED, n=2 if number % 5 == 0 else 1)
            prints[answer["system_fingerprint"]] += 1
            texts[answer["choices"][0]["text"]] += 1
            for choice, found in zip(answer["choices"], choices, strict=False):
                found[choice["text"]] += 1
        done.set()
        await asyncio.gather(*others)
    return {
        "repetitions": texts.total(),
        "texts": len(texts),
        "texts_of_the_second_choice": len(choices[1]),
        "system_fingerprint": [found and "given" for found in prints],
    }


def serve_and_repeat(artifact: Path, repeats: int, batching: str) -> dict[str, Any]:
    """The same over HTTP."""
    from normistral.server.app import create_app
    from normistral.server.backends.base import BatchSettings, plan_cache_bytes
    from normistral.server.limits import ServerLimits
    from normistral.server.model_handler import ModelHandler
    from normistral.server.server import background_server

    manifest = read_manifest(artifact)
    context = min(2048, manifest.context_length)
    batch = BatchSettings(batching, plan_cache_bytes(manifest, context, 1), context)  # type: ignore[arg-type]
    handler = ModelHandler.open(artifact, batch, config=EngineConfig(settings=SETTINGS))
    with background_server(create_app([handler], ServerLimits()), 300) as url:
        return asyncio.run(repeat_on_server(f"{url}/v1", artifact.name, repeats))


def ways_of(artifact: Path, repeats: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "library": lambda: repeat_in_library(artifact, repeats, exact=False),
        "exact": lambda: repeat_in_library(artifact, repeats, exact=True),
        "in turns": lambda: serve_and_repeat(artifact, repeats, "off"),
        "together": lambda: serve_and_repeat(artifact, repeats, "auto"),
        "price": lambda: measure_second_turn(artifact),
    }
    if read_manifest(artifact).format != "openvino":
        del ways["together"]
    return ways


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", choices=["library", "exact", "in turns", "together", "price"], action="append")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for artifact in options.artifacts:
        for way, measure in ways_of(artifact, options.repeats).items():
            if way in (options.only or [way]):
                found.setdefault(artifact.name, {})[way] = measure()
                print(artifact.name, way, found[artifact.name][way], flush=True)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
