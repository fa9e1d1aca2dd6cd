"""Speed of speculative decoding: tokens a second with and without drafts, alternating on the same prompts.

    python benchmarks/drafting.py prompts ARTIFACT [--tokens 128] [--repeats 5] [--exact] [--json FILE]
    python benchmarks/drafting.py replay ARTIFACT --rate 0.8 [--rate 0.5 ...] [--tokens 128] [--json FILE]

`prompts`: ten prompts whose answers are in their text and ten free ones, to a chat model, greedy. Plain and drafted
answers alternate, so that what else the machine does hits both; the ratio is of medians, and its median over prompts
counts. A first answer on another prompt warms up, and lets drafting learn what steps cost, as any session does.

`replay`: for artifacts of any shape, random weights included. A plain run's tokens are forced on the loop and drafted,
each wrong with the probability 1 - rate; so drafting meets the stated acceptance, whatever the model says.

Last line: everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafting_prompts import FREE, GROUNDED

import normistral
from normistral import hardware
from normistral.runtime.chunks import Timings
from normistral.runtime.generate import Limits, generate_tokens
from normistral.runtime.options import GenerationConfig
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.speculative.decoder import Decoder, Draft
from normistral.runtime.speculative.draft_length import StepCosts

WARM_UP = "Repeat this three times: the quick brown fox jumps over the lazy dog and runs into the forest."


GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}


def measure(model: normistral.Model, message: str, tokens: int, draft: str) -> normistral.Completion:
    """One greedy answer, of `tokens` tokens at most, in a conversation of its own."""
    chat = model.chat()
    answer = chat.send(message, draft=draft, max_new_tokens=tokens, **GREEDY)
    chat.close()
    return answer


def margin_nats(model: normistral.Model, message: str, token_id: int, place: int) -> float:
    """How much less likely plain decoding finds this token there than the one that it takes; 99 if far from it."""
    chat = model.chat()
    chunks = list(chat.stream(message, draft="off", max_new_tokens=place + 1, logprobs=20, **GREEDY))
    chat.close()
    likely = dict(chunks[place].top_logprobs)
    return round(max(likely.values()) - likely[token_id], 4) if token_id in likely else 99.0


def compare(model: normistral.Model, message: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Median speeds on one prompt, and how far both answers are the same.

    Where they part, `margin_nats` says how near to each other both tokens were.
    """
    answers: dict[str, list[normistral.Completion]] = {"off": [], "auto": []}
    for repeat in range(repeats):
        for draft in ("off", "auto") if repeat % 2 == 0 else ("auto", "off"):
            answers[draft].append(measure(model, message, tokens, draft))
    speeds = {draft: statistics.median(a.timings.tokens_per_s for a in answers[draft]) for draft in answers}
    plain, drafted = answers["off"][0], answers["auto"][-1]
    pairs = zip(plain.token_ids, drafted.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain.token_ids), len(drafted.token_ids)))
    parted = same < len(drafted.token_ids)
    return {
        "prompt": message.partition("\n")[0],
        "prompt_tokens": plain.timings.prompt_tokens,
        "tokens": len(plain.token_ids),
        "same_tokens": same,
        "margin_nats": margin_nats(model, message, drafted.token_ids[same], same) if parted else None,
        "plain_tokens_per_s": round(speeds["off"], 2),
        "drafted_tokens_per_s": round(speeds["auto"], 2),
        "ratio": round(speeds["auto"] / speeds["off"], 3),
        "drafted": drafted.timings.drafted_tokens,
        "accepted": drafted.timings.accepted_tokens,
    }


def run_prompts(arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with normistral.load(arguments.artifact, exact=arguments.exact) as model:
        for draft in ("off", "auto", "auto"):
            measure(model, WARM_UP, arguments.tokens, draft)
        for kind, messages in (("grounded", GROUNDED), ("free", FREE)):
            rows = []
            for message in messages:
                rows.append(compare(model, message, arguments.tokens, arguments.repeats))
                print(kind, rows[-1], flush=True)
            ratio = statistics.median(row["ratio"] for row in rows)
            print(f"{kind}: median ratio {ratio:.2f}, least {min(row['ratio'] for row in rows):.2f}", flush=True)
            report[kind] = {"median_ratio": ratio, "rows": rows}
        report["step_costs_ms"] = step_costs(model._step_costs)
    return report


class Replay:
    """Drafts the tokens of an earlier run, each spoilt with the probability 1 - rate."""

    def __init__(self, token_ids: Sequence[int], rate: float, vocabulary: int) -> None:
        luck = random.Random(0)
        self._draft = [i if luck.random() < rate else (i + 1) % vocabulary for i in token_ids]
        self._at = 0

    def observe(self, token_id: int) -> None:
        self._at += 1

    def propose(self, most: int) -> Draft | None:
        token_ids = self._draft[self._at : self._at + most]
        return Draft(token_ids, "replay") if token_ids else None


def follow(
    model: normistral.Model, sequence: CachedSequence, prompt: list[int], token_ids: Sequence[int], decoder: Decoder
) -> Timings:
    """Go through the decode loop, and let it choose these tokens whatever the logits say."""
    config = GenerationConfig(max_new_tokens=len(token_ids), ignore_eos=True)
    limits = Limits((), model.context_length, lambda: False)
    *_, last = generate_tokens(sequence, prompt, config, limits, deque(token_ids), decoder)
    return last.timings


def run_replay(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    luck = random.Random(0)
    with normistral.load(arguments.artifact, exact=arguments.exact) as model:
        vocabulary = model.manifest.architecture.vocabulary
        prompt = [luck.randrange(100, vocabulary) for _ in range(arguments.prompt)]
        options = {"ignore_eos": True, "max_new_tokens": arguments.tokens, **GREEDY}
        expected = model.generate(prompt, draft="off", **options).token_ids
        costs = StepCosts()
        for rate in arguments.rate:
            sequence = model.create_sequence()
            plain, drafted = [], []
            for _ in range(arguments.repeats + 1):  # the first one learns what steps cost, and is left out
                plain.append(follow(model, sequence, prompt, expected, Decoder(sequence, costs, None)))
                decoder = Decoder(sequence, costs, Replay(expected, rate, vocabulary))
                drafted.append(follow(model, sequence, prompt, expected, decoder))
            speeds = [statistics.median(t.tokens_per_s for t in timings[1:]) for timings in (plain, drafted)]
            rows.append(
                {
                    "rate": rate,
                    "plain_tokens_per_s": round(speeds[0], 2),
                    "drafted_tokens_per_s": round(speeds[1], 2),
                    "ratio": round(speeds[1] / speeds[0], 3),
                    "drafted": drafted[-1].drafted_tokens,
                    "accepted": drafted[-1].accepted_tokens,
                }
            )
            print(rows[-1], flush=True)
            sequence.close()
    return {"prompt_tokens": arguments.prompt, "rows": rows, "step_costs_ms": step_costs(costs)}


def step_costs(costs: StepCosts) -> dict[int, dict[int, float]]:
    """Milliseconds of a step of n tokens by depth, as drafting learned them (without the steps of `draft="off"`)."""
    return {
        depth: {size: round(1e3 * statistics.median(times), 2) for size, times in sorted(seen.items()) if times}
        for depth, seen in sorted(costs._seen.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("prompts", "replay"))
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--rate", type=float, action="append", help="only with replay; default 0.9, 0.7, 0.5, 0.0")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of the prompt; only with replay")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "prompts" and arguments.rate:
        sys.exit("--rate is for replay")
    arguments.rate = arguments.rate or [0.9, 0.7, 0.5, 0.0]
    machine = hardware.read_machine()
    report = {"artifact": arguments.artifact.name, "mode": arguments.mode, "exact": arguments.exact}
    report |= {"cpu": machine.cpu, "threads": hardware.plan_threads(machine), "python": platform.python_version()}
    report |= {"tokens": arguments.tokens, "repeats": arguments.repeats}
    report |= (run_prompts if arguments.mode == "prompts" else run_replay)(arguments)
    line = json.dumps(report, ensure_ascii=False)
    if arguments.json:
        arguments.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
