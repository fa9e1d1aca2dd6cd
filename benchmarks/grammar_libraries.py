"""llguidance and xgrammar side by side on one tokenizer: vocabulary, compiling, masks, hard cases.

    python benchmarks/grammar_libraries.py TOKENIZER.json [--repeats 5]

Needs an environment of its own with both (xgrammar 0.2.8 brings torch, transformers and triton) and `tokenizers`; each
library in a process of its own. Times are of the processor, so a busy machine matters little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PERSON = {
    "type": "object",
    "properties": {
        "navn": {"type": "string"},
        "alder": {"type": "integer"},
        "adresse": {
            "type": "object",
            "properties": {"gate": {"type": "string"}, "postnummer": {"type": "string", "pattern": "^[0-9]{4}$"}},
            "required": ["gate", "postnummer"],
            "additionalProperties": False,
        },
        "språk": {"type": "array", "items": {"enum": ["bokmål", "nynorsk", "nordsamisk"]}},
    },
    "required": ["navn", "alder", "adresse", "språk"],
    "additionalProperties": False,
}
DOCUMENT = {
    "navn": "Åse Ødegård",
    "alder": 47,
    "adresse": {"gate": "Blåbærstien 12", "postnummer": "9008"},
    "språk": ["bokmål", "nordsamisk"],
}
TREE = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
WIDE = {"type": "object", "properties": {f"felt{i}": {"type": "string", "maxLength": 40} for i in range(200)}}
LINKS = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1200)}
CHAIN = {"$defs": {**LINKS, "d1200": {"type": "null"}}, "$ref": "#/$defs/d0"}
TEXTS: dict[str, tuple[str, Any, str]] = {
    "person": ("schema", PERSON, json.dumps(DOCUMENT, ensure_ascii=False)),
    "any object": ("schema", {"type": "object"}, json.dumps(DOCUMENT, ensure_ascii=False)),
    "tree": ("schema", TREE, "[[], [[], []], [[[]]]]"),
    "200 fields": ("schema", WIDE, json.dumps({f"felt{i}": "blåbær" for i in range(0, 200, 9)}, ensure_ascii=False)),
    "expression": ("regex", "([A-ZÆØÅ][a-zæøå]+ ?){2,5}, [0-9]{4} [A-ZÆØÅ]+", "Åse Ødegård Blåbær, 9008 TROMSØ"),
}
HARD: dict[str, tuple[str, Any]] = {
    "a{1000000000}": ("regex", "a{1000000000}"),
    "(.{1,500}b){1,500}": ("regex", "(.{1,500}b){1,500}"),
    ".{0,100000}x": ("regex", ".{0,100000}x"),
    "unsupported: uniqueItems": ("schema", {"type": "array", "uniqueItems": True}),
    "unsupported: not": ("schema", {"not": {"type": "string"}}),
    "unsupported: if/then": ("schema", {"if": {"type": "string"}, "then": {"minLength": 3}}),
    "multipleOf": ("schema", {"type": "integer", "multipleOf": 7}),
    "recursion to nothing": ("schema", {"$ref": "#"}),
    "look-ahead": ("regex", "(?=a)b"),
    "chain of 1,200 references": ("schema", CHAIN),
}


class Llguidance:
    def __init__(self, path: Path) -> None:
        import llguidance

        self.library = llguidance
        self.tokenizer = llguidance.LLTokenizer(path.read_text(), eos_token=[2])
        self.limits = llguidance.LLParserLimits(
            initial_lexer_fuel=100_000, step_lexer_fuel=100_000, max_lexer_states=25_000, verbose_errors=False
        )

    def compile(self, kind: str, what: Any) -> Any:
        matcher = self.library.LLMatcher
        options: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
        grammar = (
            matcher.grammar_from_json_schema(what, overrides=options)
            if kind == "schema"
            else matcher.grammar_from_regex(what)
        )
        made = matcher(self.tokenizer, grammar, log_level=0, limits=self.limits)
        made.compute_bitmask()
        if made.is_error():
            raise ValueError(made.get_error())
        return made

    def step(self, made: Any, token_id: int) -> bool:
        made.compute_bitmask()
        return bool(made.consume_token(token_id))


class Xgrammar:
    def __init__(self, path: Path) -> None:
        import tokenizers
        import torch
        import xgrammar

        torch.set_num_threads(1)
        self.library = xgrammar
        backend = tokenizers.Tokenizer.from_file(str(path))
        pieces = [backend.id_to_token(i) or "" for i in range(backend.get_vocab_size())]
        kind = xgrammar.VocabType.BYTE_LEVEL if "Ġ" in "".join(pieces[:2000]) else xgrammar.VocabType.BYTE_FALLBACK
        info = xgrammar.TokenizerInfo(pieces, kind, stop_token_ids=[2])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.bitmask = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    def compile(self, kind: str, what: Any) -> Any:
        if kind == "schema":
            made = self.compiler.compile_json_schema(json.dumps(what), any_whitespace=False, separators=(", ", ": "))
        else:
            made = self.compiler.compile_regex(what)
        matcher = self.library.GrammarMatcher(made)
        matcher.fill_next_token_bitmask(self.bitmask)
        return matcher

    def step(self, made: Any, token_id: int) -> bool:
        made.fill_next_token_bitmask(self.bitmask)
        return bool(made.accept_token(token_id))


def measure(library: Callable[[Path], Any], path: Path, repeats: int, name: str, results: Any) -> None:
    import tokenizers

    results.put(("peak without anything, MB", peak_mb()))
    start = time.process_time()
    engine = library(path)
    results.put(("import and vocabulary", f"{time.process_time() - start:.2f} s, {peak_mb():.0f} MB"))
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    for title, (kind, what, text) in TEXTS.items() if name == "texts" else ():
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        compiling, steps = [], []
        for _ in range(repeats):
            start = time.process_time()
            made = engine.compile(kind, what)
            compiling.append(time.process_time() - start)
            for token_id in token_ids:
                start = time.perf_counter()
                if not engine.step(made, token_id):
                    results.put((title, "the text is refused"))
                    break
                steps.append(time.perf_counter() - start)
        steps.sort()
        first, rest = compiling[0], statistics.median(compiling)
        results.put(
            (
                title,
                f"compile {first * 1e3:.1f} ms first, {rest * 1e3:.1f} median; mask and commit "
                f"{statistics.median(steps) * 1e6:.0f} us median, {steps[int(0.99 * len(steps))] * 1e6:.0f} p99",
            )
        )
    if name in HARD:
        before, start = peak_mb(), time.process_time()
        try:
            engine.compile(*HARD[name])
            outcome = "taken"
        except Exception as exc:
            outcome = f"refused: {str(exc).strip().splitlines()[-1][:70]}"
        took = f"{(time.process_time() - start) * 1e3:.0f} ms, {peak_mb() - before:.0f} MB"
        results.put((name, f"{outcome} ({took})"))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each hard case")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for library in (Llguidance, Xgrammar):
        print(f"\n{library.__name__}")
        for name in ("texts", *HARD):
            results = spawn.SimpleQueue()
            worker = spawn.Process(
                target=measure, args=(library, arguments.tokenizer, arguments.repeats, name, results)
            )
            worker.start()
            worker.join(600 if name == "texts" else arguments.seconds + 30)
            if worker.is_alive():
                worker.kill()
                worker.join()
                print(f"  {name}: not done in {arguments.seconds + 30:.0f} s")
            shown = []
            while not results.empty():
                shown.append(results.get())
            for title, figures in shown if name == "texts" else [row for row in shown if row[0] == name]:
                print(f"  {title}: {figures}")
            if worker.exitcode not in (0, -9):
                print(f"  {name}: the process died ({worker.exitcode})")


if __name__ == "__main__":
    main()
