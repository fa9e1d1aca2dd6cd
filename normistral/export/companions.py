"""The small files beside the weights, so that other loaders find what they expect.

config.json and the tokenizer's files come from the checkpoint byte for byte; generation_config.json is written anew,
because the checkpoints' own files contradict each other about where an answer ends.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from normistral.export.checkpoint import Checkpoint

_TOOLS = ("normistral", "torch", "transformers", "optimum", "optimum-intel", "nncf", "openvino", "openvino-tokenizers")


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files, not links, into `folder`."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def folder_bytes(folder: Path) -> int:
    """Size of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_generation_config(folder: Path, checkpoint: Checkpoint) -> None:
    """Write generation_config.json with every stop id, and the authors' sampling settings in transformers' spelling."""
    document: dict[str, Any] = {"eos_token_id": sorted(checkpoint.stop_token_ids)}
    document["pad_token_id"] = document["eos_token_id"][0]
    if checkpoint.bos_token_id is not None:
        document["bos_token_id"] = checkpoint.bos_token_id
    document |= {name: value for name, value in asdict(checkpoint.sampling).items() if value is not None}
    # A temperature means sampling; 0 is how we spell greedy, which transformers wants as do_sample alone.
    document["do_sample"] = bool(document.get("temperature"))
    if document.get("temperature") == 0:
        del document["temperature"]
    (folder / "generation_config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def tool_versions() -> dict[str, str]:
    """Versions of the packages that take part in an export."""
    return {name: version(name) for name in _TOOLS}
