"""Builds a draft table from text files, and says how it went."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from normistral.artifact import store
from normistral.artifact.manifest import check_files, read_manifest
from normistral.artifact.tokenizer import TOKENIZER_NAME, Tokenizer
from normistral.commands.console import say
from normistral.commands.progress import format_bytes
from normistral.errors import NormistralError, UsageError
from normistral.evaluation.text import read_text
from normistral.files import explain, require_place, sha256_file
from normistral.runtime.drafting.options import TableOptions
from normistral.runtime.drafting.table import build_table

_PIECE_CHARACTERS = 2**20  # given to the tokenizer at once; a border costs a few n-grams


def make_table(artifact: str, output: Path, texts: Sequence[Path], options: TableOptions, *, force: bool) -> None:
    """Tokenise the texts with the artifact's tokenizer, count, and write OUTPUT.

    Raises:
        UsageError: OUTPUT exists and `force` is off, or no file can be written there; a text cannot be read, is
            empty or not UTF-8; or nothing in them comes often enough.
        NormistralError: it cannot be written after all.
        ModelNotFoundError: no such artifact.
        ArtifactError: it is damaged.
    """
    require_place(output)
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output} exists already", "choose another OUTPUT, or replace it with --force")
    folder = store.resolve_artifact(artifact)
    check_files(folder, read_manifest(folder), thorough=False)
    tokenizer = Tokenizer.from_folder(folder)
    pieces = [tokenizer.encode(piece, add_special_tokens=False) for path in texts for piece in _pieces(read_text(path))]
    tokens = sum(map(len, pieces))
    table = build_table(pieces, sha256_file(folder / TOKENIZER_NAME), options)
    if not len(table):
        raise UsageError(
            f"in {tokens:,} tokens nothing follows the same tokens {options.min_count} times", "give it more text"
        )
    try:
        table.write(output)
    except OSError as exc:
        reason, hint = explain(exc)
        raise NormistralError(f"cannot write {output}: {reason}", hint) from exc
    say(f"wrote {output}: {len(table):,} entries from {tokens:,} tokens, {format_bytes(output.stat().st_size)}")


def _pieces(text: str) -> Iterator[str]:
    """The text in parts, cut at ends of lines where there are any."""
    start = 0
    while start < len(text):
        end = min(len(text), start + _PIECE_CHARACTERS)
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end
