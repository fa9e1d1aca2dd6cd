"""Structured output: validity of the answers, and the cost of token masks.

    python benchmarks/structured.py ARTIFACT [--answers 200] [--most 256] [--seed 1] [--json FILE]

Every answer has a schema in turn, a random seed and a temperature of its own, and is checked with `jsonschema`. What a
mask and its commit take is measured by following the answer's tokens again. Tokens a second are of every fifth answer,
next to plain decoding of as many tokens behind the same prompt, each pair in turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import normistral
from normistral import Structure, hardware
from normistral.runtime.reasoning import ReasoningSplitter

TEXT = {"type": "string", "minLength": 1, "maxLength": 60}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object",
        "properties": {
            "navn": {"type": "string", "pattern": "^[A-ZÆØÅ][a-zæøå]+( [A-ZÆØÅ][a-zæøå]+){1,2}$", "maxLength": 40},
            "alder": {"type": "integer", "minimum": 0, "maximum": 120},
            "fylke": {"enum": ["Møre og Romsdal", "Sør-Trøndelag", "Østfold", "Troms", "Rogaland"]},
            "født": {"type": "string", "format": "date"},
        },
        "required": ["navn", "alder", "fylke", "født"],
        "additionalProperties": False,
    },
    "free text": {
        "type": "object",
        "properties": {"sammendrag": {"type": "string", "maxLength": 200}, "språk": {"const": "bokmål"}},
        "required": ["sammendrag", "språk"],
        "additionalProperties": False,
    },
    "list": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"vare": TEXT, "pris": {"type": "number", "minimum": 0, "maximum": 9999.5}},
            "required": ["vare", "pris"],
            "additionalProperties": False,
        },
        "minItems": 2,
        "maxItems": 4,
    },
    "class": {"enum": ["positiv", "nøytral", "negativ"]},
    "one of two": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"slag": {"const": "møte"}, "sted": TEXT},
                "required": ["slag", "sted"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"slag": {"const": "gjøremål"}, "frist": {"type": "string", "format": "date-time"}},
                "required": ["slag"],
                "additionalProperties": False,
            },
        ]
    },
    "tree": {
        "$defs": {
            "gren": {
                "type": "object",
                "properties": {
                    "navn": TEXT,
                    "barn": {"type": "array", "items": {"$ref": "#/$defs/gren"}, "maxItems": 2},
                },
                "required": ["navn"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/gren",
    },
    "open": {
        "type": "object",
        "properties": {"id": {"type": "integer", "multipleOf": 5}},
        "required": ["id"],
        "additionalProperties": {"type": ["string", "boolean", "null"]},
        "maxProperties": 4,
    },
    "anything": {"type": "object"},
}
COMPARED = 5  # every so many answers; the schemas are 8, so each has its turn
PROMPTS = (
    "Gi meg et eksempel som JSON. Skriv på norsk, om blåbær, ærfugl eller Ålesund.",
    "Make up one example as JSON.",
    "Kari Ødegård (34) fra Tromsø kjøpte to brød og ett glass blåbærsyltetøy. Svar som JSON.",
)


def write_one(model: normistral.Model, number: int, chance: random.Random, most: int) -> dict[str, Any]:
    """One answer, what became of it, and its times."""
    name = list(SCHEMAS)[number % len(SCHEMAS)]
    structure = Structure.json_schema(SCHEMAS[name])
    options = {"temperature": chance.choice((0.5, 0.8, 1.0, 1.3)), "seed": chance.randrange(2**32)}
    prompt = PROMPTS[number % len(PROMPTS)]
    compared = number % COMPARED == 0
    answer = model.chat().send(prompt, structure=structure, max_new_tokens=most, **options)
    return {
        "schema": name,
        **options,
        "outcome": judge(answer, SCHEMAS[name]),
        "tokens": len(answer.token_ids),
        "decode_s": answer.timings.decode_s,
        "steps_us": follow(model, structure, answer.token_ids),
        "plain_decode_s": decode_plainly(model, prompt, len(answer.token_ids), options) if compared else None,
        "text": answer.text,
    }


def judge(answer: normistral.Completion, schema: dict[str, Any]) -> str:
    """valid, cut off (and marked so), or invalid."""
    if answer.finish_reason != "stop":
        return "cut off"
    try:
        jsonschema.validate(json.loads(answer.text), schema)
    except (ValueError, jsonschema.ValidationError):
        return "invalid"
    return "valid"


def follow(model: normistral.Model, structure: Structure, token_ids: tuple[int, ...]) -> list[float]:
    """Microseconds of each token's mask, its use and its commit."""
    constraint, _ = model.structures.begin(structure, None, ReasoningSplitter(None))
    assert constraint is not None
    logits = np.zeros(model.manifest.architecture.vocabulary, np.float32)
    steps = []
    for token_id in token_ids:
        start = time.perf_counter()
        np.where(constraint.allowed_mask(), logits, np.float32(-np.inf))
        constraint.commit(token_id)
        constraint.jump_forward_tokens()
        steps.append((time.perf_counter() - start) * 1e6)
        if constraint.complete:
            break
    return steps


def decode_plainly(model: normistral.Model, prompt: str, tokens: int, options: dict[str, Any]) -> float:
    prompt_ids = model.encode(prompt)
    return model.generate(prompt_ids, max_new_tokens=tokens, ignore_eos=True, **options).timings.decode_s


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    steps = sorted(step for row in rows for step in row["steps_us"])
    compared = [row for row in rows if row["plain_decode_s"] is not None]
    tokens = sum(row["tokens"] - 1 for row in compared)
    structured_s = sum(row["decode_s"] for row in compared)
    plain_s = sum(row["plain_decode_s"] for row in compared)
    return {
        "answers": len(rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "by_schema": {name: dict(Counter(r["outcome"] for r in rows if r["schema"] == name)) for name in SCHEMAS},
        "tokens": sum(row["tokens"] for row in rows),
        "mask_and_commit_us": {
            "median": round(statistics.median(steps), 1),
            "mean": round(statistics.fmean(steps), 1),
            "p99": round(steps[int(0.99 * len(steps))], 1),
            "most": round(steps[-1], 1),
        },
        "tokens_per_s": {"structured": round(tokens / structured_s, 2), "plain": round(tokens / plain_s, 2)},
        "time_of_plain": round(structured_s / plain_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--most", type=int, default=256, help="new tokens of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with normistral.load(arguments.artifact) as model:
        start = time.perf_counter()
        engine = model.structures.vocabulary.engine
        vocabulary_s = time.perf_counter() - start
        rows = [write_one(model, number, chance, arguments.most) for number in range(arguments.answers)]
        document = {
            "benchmark": "structured",
            "artifact": model.name,
            "engine": model.capabilities.name,
            "settings": model.capabilities.settings,
            "vocabulary": engine.vocab_size,
            "vocabulary_s": round(vocabulary_s, 3),
            **summarise(rows),
            "machine": f"{hardware.read_machine().cpu}, {platform.platform()}",
            "versions": {name: version(name) for name in ("normistral", "llguidance", "numpy", "jsonschema")},
            "rows": [{**row, "steps_us": [round(step, 1) for step in row["steps_us"]]} for row in rows],
        }
    print(json.dumps({key: value for key, value in document.items() if key != "rows"}, ensure_ascii=False, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
