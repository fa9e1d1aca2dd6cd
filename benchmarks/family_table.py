"""The family's table: every preset's tiny random checkpoint × format × weights, compared with transformers.

    python benchmarks/family_table.py [--mutations] [--json FILE] > TABLE.md

Cells and checks are those of test_family.py: the largest difference of a logit from transformers in float32 with
the artifact's own matrices, as a share of the logits' spread, over 48 tokens fed in several ways. With --mutations also
what each quirk's mutation does to its cell (test_family_mutations.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "export"))

import pytest
from family_cells import FORMATS, ROUNDING, TOLERANCE, WAYS, WEIGHTS, make_cell
from test_family_mutations import CASES, MUTATIONS, problems
from tiny_family import ROWS, as_gguf, make_tiny, shape_of, source_of

from normistral.errors import NormistralError

Row = dict[str, Any]


def cells(scratch: Path) -> Iterator[Row]:
    for row, preset in ROWS.items():
        given = make_tiny(preset, scratch / row)
        for format in FORMATS:
            for weights in WEIGHTS:
                cell = make_cell(given, scratch / f"{row}-{format}-{weights}", format, weights)
                errors = cell.errors() | {"matrices": cell.rounding_error()}
                yield {"preset": row, "format": format, "weights": weights, **errors}


def mutants(scratch: Path) -> Iterator[Row]:
    for number, (quirk, row, format) in enumerate(CASES):
        original = source_of(make_tiny(ROWS[row], scratch / f"{number}-original" / row))
        mutant = scratch / f"{number}-mutant" / row
        shutil.copytree(original, mutant)
        with pytest.MonkeyPatch.context() as patch:
            MUTATIONS[quirk][1](mutant, patch)
            given = as_gguf(mutant) if shape_of(ROWS[row]).weight_files[1] == "gguf" else mutant
            try:
                cell = make_cell(given, scratch / f"{number}-artifact", format, "int8")
            except NormistralError as error:
                yield {"quirk": quirk, "preset": row, "format": format, "red": f"refused: {error.message}"}
                continue
        cell.source = original
        yield {"quirk": quirk, "preset": row, "format": format, "red": "; ".join(problems(cell, row))}


def print_table(rows: list[Row], columns: list[str]) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = (f"{row[name]:.1e}" if isinstance(row[name], float) else str(row[name]) for name in columns)
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="family-") as scratch:
        report: dict[str, Any] = {"tolerance": TOLERANCE, "rounding": ROUNDING, "cells": list(cells(Path(scratch)))}
        print_table(report["cells"], ["preset", "format", "weights", *WAYS, "matrices"])
        if arguments.mutations:
            report["mutations"] = list(mutants(Path(scratch)))
            print()
            print_table(report["mutations"], ["quirk", "preset", "format", "red"])
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
