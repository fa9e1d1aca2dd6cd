"""A checkpoint's configuration and tensor headers, without its tokenizer: for tests of what only reads weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from normistral.export.checkpoint.families import find_family, sanitise_config
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.weights import find_weight_files, read_tensors, stored_dtype, with_prefix


def read_headers(folder: Path) -> SimpleNamespace:
    """The attributes of `Checkpoint` that readers and writers of weights use."""
    config = sanitise_config(read_json(folder / "config.json"))
    family = find_family(config)
    tensors = with_prefix(read_tensors(find_weight_files(folder)), family)
    return SimpleNamespace(
        folder=folder,
        family=family,
        config=config,
        architecture=family.architecture(config),
        tensors=tensors,
        dtype=stored_dtype(tensors),
        tensor_shapes=family.tensor_shapes(config),
    )
