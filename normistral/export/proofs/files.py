"""Configuration and tokenizer of an artifact: section by section what the checkpoint has, and the same ids for text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normistral.errors import ArtifactError, ExportError
from normistral.export.config import read_json
from normistral.export.fields import shorten
from normistral.export.proofs import CAUSE
from normistral.export.texts import load_texts
from normistral.runtime.tokenizer import Tokenizer

# Compared by its two long lists apart: those are where something goes missing unnoticed.
_MODEL_LISTS = ("vocab", "merges")


def check_config(folder: Path, checkpoint: Path) -> None:
    """config.json has the checkpoint's fields, with the checkpoint's values.

    Raises:
        ExportError: naming the first field that differs.
    """
    _compare("config.json", read_json(checkpoint / "config.json"), read_json(folder / "config.json"))


def check_tokenizer(folder: Path, checkpoint: Path, reference: Any) -> int:
    """tokenizer.json, section by section; then the ids of our texts, line by line, with transformers' own.

    Args:
        folder: of the artifact.
        checkpoint: folder of the opened checkpoint.
        reference: its tokenizer in transformers.

    Returns:
        how many tokens were compared.

    Raises:
        ExportError: naming what differs.
    """
    expected, found = read_json(checkpoint / "tokenizer.json"), read_json(folder / "tokenizer.json")
    for name in _MODEL_LISTS:
        _compare_list(name, expected.get("model", {}).get(name), found.get("model", {}).get(name))
    _compare("tokenizer.json", expected, found)
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ArtifactError as exc:
        raise ExportError(f"the artifact's tokenizer cannot be opened: {exc.message}", CAUSE) from exc
    compared = 0
    for name, text in load_texts().items():
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            ours, theirs = tokenizer.encode(line), list(reference(line)["input_ids"])
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
                at = min(len(ours), len(theirs)) if at is None else at
                raise ExportError(
                    f"the artifact's tokenizer gives other ids than the checkpoint's for line {number} of our text "
                    f"{name}, from token {at} on: {ours[at : at + 4]} instead of {theirs[at : at + 4]}",
                    CAUSE,
                )
            compared += len(ours)
    return compared


def _compare_list(name: str, expected: Any, found: Any) -> None:
    """The vocabulary (token to id, or pairs with scores), or the merges."""
    left, right = _entries(expected), _entries(found)
    if left == right:
        return
    missing = next((entry for entry in left if entry not in right), None)
    extra = next((entry for entry in right if entry not in left), None)
    if missing is not None:
        what = f"lacks {shorten(missing)}"
    elif extra is not None:
        what = f"also has {shorten(extra)}"
    else:
        entry = next(entry for entry in left if left[entry] != right[entry])
        what = f"has {shorten(entry)} at {shorten(right[entry])} instead of {shorten(left[entry])}"
    raise ExportError(
        f"tokenizer.json: the artifact's {name} {what} ({len(right)} entries, the checkpoint has {len(left)})", CAUSE
    )


def _entries(content: Any) -> dict[Any, Any]:
    """Entry -> its place: an id, or the position in the list."""
    if isinstance(content, Mapping):
        return dict(content)
    items: Iterable[Any] = content if isinstance(content, list) else ()
    return {tuple(item) if isinstance(item, list) else item: place for place, item in enumerate(items)}


def _compare(where: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for field in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(field) != found.get(field) or (field in expected) != (field in found):
            raise ExportError(
                f"{where}: the artifact's {field} is {shorten(found.get(field))}, "
                f"the checkpoint's {shorten(expected.get(field))}",
                CAUSE,
            )
