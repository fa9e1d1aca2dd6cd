"""The small files beside the weights, so that other loaders find what they expect."""

from __future__ import annotations

import shutil
from pathlib import Path

from normistral.export.checkpoint.open import Checkpoint


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and generation_config.json as they were checked, the tokenizer's files byte for byte."""
    configurations = [checkpoint.folder / "config.json", checkpoint.folder / "generation_config.json"]
    for file in (*configurations, *checkpoint.tokenizer_files):
        shutil.copyfile(file, folder / file.name)  # follows links


def folder_bytes(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
