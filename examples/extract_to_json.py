"""Facts out of many texts, as lines of JSON that always fit a schema; what was done is not done again.

    python examples/extract_to_json.py ARTIFACT examples/texts/reports.jsonl facts.jsonl

Reads lines such as {"id": "2026-0412", "text": "…"} and writes {"id": "2026-0412", "complete": true, "facts": {…}}. An
answer that the token limit cut off is marked as such: {"id": …, "complete": false, "cut_off": "…"}. Stopped and started
again, it goes on where it was; what was cut off is tried again, so give a higher --max-new-tokens then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import normistral

INSTRUCTION = (
    "A citizen writes to the municipality. Answer in JSON: topic, place (empty if none is named), whether it is "
    "urgent, and a summary of one short sentence."
)
SCHEMA = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["roads", "lighting", "water", "noise", "other"]},
        "place": {"type": "string", "maxLength": 60},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string", "maxLength": 160},
    },
    "required": ["topic", "place", "urgent", "summary"],
    "additionalProperties": False,
}


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """Names and texts, one after the other: the file may be larger than the memory."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    entry = json.loads(line)
                    yield str(entry["id"]), str(entry["text"])
                except (ValueError, KeyError, TypeError):
                    sys.exit(f'error: line {number} of {path.name} is not of the form {{"id": …, "text": …}}')


def keep_complete(path: Path) -> set[str]:
    """Drop what was cut off, and half a line of a run that was killed; return the names that are done."""
    if not path.exists():
        return set()
    kept = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["complete"]:
            kept[entry["id"]] = line
    shorter = path.with_name(path.name + ".new")
    with open_private(shorter, "w") as file:
        file.writelines(line + "\n" for line in kept.values())
    shorter.replace(path)
    return set(kept)


def open_private(path: Path, mode: str) -> TextIO:
    """Open for writing; a new file can be read by its owner only, because it says what people wrote."""
    return open(path, mode, encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))


def extract(chat: normistral.Chat, text: str, max_new_tokens: int) -> dict[str, Any]:
    """The facts of one text. The chat is left as it was, so the instruction is computed once for all texts."""
    structure = normistral.Structure.json_schema(SCHEMA)
    completion = chat.send(text, structure=structure, temperature=0, max_new_tokens=max_new_tokens)
    chat.undo()
    if completion.finish_reason != "stop":
        return {"complete": False, "cut_off": completion.text}
    return {"complete": True, "facts": json.loads(completion.text)}


def main(arguments: list[str] | None = None) -> None:
    """Extract from all texts that are not done."""
    parser = argparse.ArgumentParser(description="Extract facts from texts.")
    parser.add_argument("artifact")
    parser.add_argument("texts", type=Path, help="lines of JSON with id and text")
    parser.add_argument("output", type=Path, help="lines of JSON; appended to")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args(arguments)
    done = keep_complete(options.output)
    written = cut_off = skipped = 0
    with normistral.load(options.artifact) as model, open_private(options.output, "a") as output:
        chat = model.chat(system=INSTRUCTION)
        for name, text in read_texts(options.texts):
            if name in done:
                skipped += 1
                continue
            result = {"id": name, **extract(chat, text, options.max_new_tokens)}
            output.write(json.dumps(result, ensure_ascii=False) + "\n")
            output.flush()  # a killed run loses the text it was at, and no other
            done.add(name)
            written += 1
            cut_off += not result["complete"]
    print(f"{written} written, {cut_off} of them cut off; {skipped} were done before", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except normistral.NormistralError as exc:
        sys.exit(f"error: {exc.message}\nhint: {exc.hint}")
    except KeyboardInterrupt:
        sys.exit("stopped; run it again to go on")
