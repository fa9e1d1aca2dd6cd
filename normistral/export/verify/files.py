"""Configuration, tokenizer and template of an artifact: section by section what the checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import Manifest
from normistral.errors import ExportError
from normistral.export.checkpoint.fields import shorten
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tokenizer_check import first_difference
from normistral.export.verify import CAUSE

# Compared by its two long lists apart: those are where something goes missing unnoticed.
_MODEL_LISTS = ("vocab", "merges")


def check_config(folder: Path, checkpoint: Path) -> None:
    """config.json has the checkpoint's fields, with the checkpoint's values.

    Raises:
        ExportError: naming the first field that differs.
    """
    _compare("config.json", read_json(checkpoint / "config.json"), read_json(folder / "config.json"))


def check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The artifact has the tokenizer's files whose ids were compared with transformers', unchanged.

    Args:
        folder: of the artifact.

    Raises:
        ExportError: naming the part of tokenizer.json or the file that differs.
    """
    expected, found = read_json(checkpoint.folder / "tokenizer.json"), read_json(folder / "tokenizer.json")
    for name in _MODEL_LISTS:
        _compare_list(name, expected.get("model", {}).get(name), found.get("model", {}).get(name))
    _compare("tokenizer.json", expected, found)
    for file in checkpoint.tokenizer_files:
        if file.read_bytes() != (folder / file.name).read_bytes():
            raise ExportError(f"the artifact's {file.name} is not the checkpoint's", CAUSE)


def check_template(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """The manifest has the template that was compared with transformers'.

    Raises:
        ExportError: quoting where they part.
    """
    if manifest.template == checkpoint.template:
        return
    ours, theirs = ("" if one is None else one.text for one in (manifest.template, checkpoint.template))
    raise ExportError(f"the artifact's chat template is not the checkpoint's: {first_difference(ours, theirs)}", CAUSE)


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
