"""The structure that options of the command line ask for."""

from __future__ import annotations

from pathlib import Path

from normistral.commands.answer import WHY_IT_ENDED
from normistral.commands.console import decode_argument
from normistral.errors import NormistralError, UsageError
from normistral.files import explain, read_input
from normistral.runtime.chunks import Completion
from normistral.runtime.structured.structure import MOST_BYTES, Structure
from normistral.text_input import decode_text


def read_structure(
    json_schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None
) -> Structure | None:
    """What --json-schema, --regex, --choice and --grammar ask for; at most one may be given.

    Raises:
        UsageError: several are given, a file cannot be read, or no model could follow it.
    """
    given = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} cannot be given together", "leave one of them out")
    structure = _make(json_schema, regex, choice, grammar)
    from normistral.runtime.structured.compile import check_structure

    check_structure(structure)
    return structure


def require_whole(completion: Completion, structure: Structure | None) -> None:
    """Have a structured answer that was cut off end in an error: no script may read half of it.

    Raises:
        NormistralError: it was.
    """
    if structure is not None and completion.finish_reason != "stop":
        raise NormistralError(
            f"the answer is cut off before it was whole: {WHY_IT_ENDED[completion.finish_reason]}",
            "raise --max-new-tokens, or bound lengths and numbers of items in what you ask for",
        )


def _make(json_schema: Path | None, regex: str | None, choice: list[str] | None, grammar: Path | None) -> Structure:
    if json_schema is not None:
        return Structure.json_schema(_read("--json-schema", json_schema))
    if regex is not None:
        return Structure.regex(decode_argument(regex))
    if grammar is not None:
        return Structure.grammar(_read("--grammar", grammar))
    return Structure.choice([decode_argument(text) for text in choice or ()])


def _read(option: str, path: Path) -> str:
    try:
        raw = read_input(path, MOST_BYTES)
    except OSError as exc:
        raise UsageError(f"cannot read {option} {path}: {explain(exc)[0]}", "give a file that is there") from exc
    return decode_text(raw, f"{option} {path}")
