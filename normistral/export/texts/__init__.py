"""Texts for calibration and for the quick check at export: written for this project and licensed like it.

Nothing that we evaluate with is in them (Debian's Norwegian documentation), so that a recipe which was calibrated on
them can be judged there.
"""

from __future__ import annotations

from importlib import resources

NAMES = ("bokmaal", "nynorsk", "english", "mixed")  # mixed: code, tables, numbers, emoji, Sami letters, odd blanks


def load_texts() -> dict[str, str]:
    """Name -> text: paragraphs of one line each, with an empty line between subjects; about 9,000 words in all."""
    folder = resources.files(__name__)
    # Line ends as they are: read_text would turn \r\n into \n, and a tokenizer sees the difference.
    return {name: folder.joinpath(f"{name}.txt").read_bytes().decode("utf-8") for name in NAMES}
