"""Time to first token of a second turn, after a short and after a long first turn.

    python benchmarks/second_turn.py ARTIFACT [--first 100 1500] [--json FILE]

The second turn is one of three short messages of equal length, taken back after each. If only its own tokens are
computed, its time to first token does not grow with the first turn (but for attention over a longer cache).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import normistral
from normistral import hardware

SECOND_MESSAGES = ("Og hva betyr det for oss?", "Når skal det være ferdig?", "Kan du si det kortere nå?")
FILLER = "Kommunen vedtok planen etter en lang debatt om skole, helse og veier. "


def message_of(tokens: int, model: normistral.Model) -> str:
    """A message of about this many tokens."""
    per_filler = len(model.tokenizer.encode(FILLER, add_special_tokens=False))
    return FILLER * max(1, round(tokens / per_filler))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--first", type=int, nargs="+", default=[100, 1500])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with normistral.load(arguments.artifact) as model:
        for wanted in arguments.first:
            chat = model.chat()
            options = {"max_new_tokens": 2, "temperature": 0.0, "ignore_eos": True}
            first = chat.send(message_of(wanted, model), **options).timings
            seconds, computed = [], []
            for message in SECOND_MESSAGES:
                second = chat.send(message, **options).timings
                seconds.append(second.ttft_s)
                computed.append(second.prompt_tokens - second.cached_tokens)
                chat.undo()
            rows.append(
                {
                    "first_turn_tokens": first.prompt_tokens,
                    "first_ttft_s": round(first.ttft_s, 2),
                    "second_turn_computed_tokens": computed,
                    "second_ttft_s": round(statistics.median(seconds), 3),
                    "second_ttft_range_s": [round(min(seconds), 3), round(max(seconds), 3)],
                }
            )
            print(rows[-1], flush=True)
            chat.close()
    machine = hardware.read_machine()
    report = {
        "artifact": arguments.artifact.name,
        "cpu": machine.cpu,
        "python": platform.python_version(),
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
