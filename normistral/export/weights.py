"""Check a checkpoint's weight files before anything is converted.

Only headers are read: names, types, shapes, and that every byte that a header promises is there. The values are not
looked at; a wrong byte inside them shows in the SHA-256 when there is one to compare with (hub.py).
"""

from __future__ import annotations

import json
import math
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from normistral.errors import CheckpointError
from normistral.export.config import read_json
from normistral.export.families.base import OUTPUT_LAYER, Family

Dtype = Literal["bfloat16", "float16", "float32"]
T = TypeVar("T")

_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_ITEM_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_INDEXED = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a weight file: shape as stored; `start` is where its bytes begin in the file (safetensors only)."""

    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    start: int | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """The weight files that make up a checkpoint.

    Returns:
        file names, and the index's map from tensor to file (None for a single file).

    Raises:
        CheckpointError: there are none, or the index is damaged or leads out of the folder.
    """
    for single in _INDEXED:
        if (folder / single).is_symlink() or (folder / single).exists():
            return [single], None
        index = folder / f"{single}.index.json"
        if index.is_symlink() or index.exists():
            weight_map = _weight_map(index)
            return sorted(set(weight_map.values())), weight_map
    raise CheckpointError(
        f"{folder} has no weights: neither {' nor '.join(_INDEXED)}, nor an index of shards",
        "give the folder of a whole checkpoint",
    )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name, from the headers of its files.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or does not hold what the index says.
    """
    files, weight_map = weight_files(folder)
    for file in files:
        if not (folder / file).is_file():
            kind = "weight file" if weight_map is None else "shard"
            raise CheckpointError(f"{kind} {file} is missing from {folder}", "download or copy the checkpoint again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        found = _read_safetensors(path) if file.endswith(".safetensors") else _read_torch(path)
        if weight_map is not None:
            absent = [name for name, where in weight_map.items() if where == file and name not in found]
            if absent:
                raise CheckpointError(f"{file} does not hold {_some(absent)}, which the index says", _AGAIN)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{file} holds {_some(twice)}, which another shard holds too", _AGAIN)
        tensors |= found
    return tensors


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], family: Family) -> None:
    """Compare with what config.json describes.

    Raises:
        CheckpointError: naming tensors that are missing, mis-shaped or left over.
    """
    found = with_prefix(tensors, family)
    missing = [name for name in expected if name not in found]
    if missing:
        hint = "give the folder of a whole checkpoint"
        if missing == [OUTPUT_LAYER]:
            hint = "it may have been saved without its output layer; export the causal language model"
        raise CheckpointError(f"the weights lack {_some(missing)}, which config.json asks for", hint)
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(found[name].shape)}, but config.json asks for {list(shape)}",
                "config.json and weights belong to different models",
            )
    extra = [
        name
        for name in found
        if name not in expected and not (family.computed is not None and family.computed.search(name))
    ]
    if extra and extra != [OUTPUT_LAYER]:
        raise CheckpointError(
            f"the weights hold {_some(extra)}, which config.json does not describe",
            "config.json and weights belong to different models",
        )


def with_prefix(tensors: dict[str, T], family: Family) -> dict[str, T]:
    """Tensors under the names of the causal language model: a headless checkpoint's lack the family's prefix."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {name if name == OUTPUT_LAYER else f"{family.prefix}{name}": tensor for name, tensor in tensors.items()}


def has_separate_output(tensors: dict[str, Tensor], family: Family) -> bool:
    """Whether there is an output matrix that differs from the input embedding."""
    found = with_prefix(tensors, family)
    output, embedding = found.get(OUTPUT_LAYER), found.get(family.embedding)
    if output is None or embedding is None:
        return False
    if (output.dtype, output.shape) != (embedding.dtype, embedding.shape):
        return True
    if output.start is None or embedding.start is None:
        return not _equal_in_torch_files(output, embedding)
    with output.file.open("rb") as left, embedding.file.open("rb") as right:
        left.seek(output.start)
        right.seek(embedding.start)
        remaining = output.nbytes
        while remaining > 0:
            size = min(remaining, 4 * 2**20)
            if left.read(size) != right.read(size):
                return True
            remaining -= size
    return False


def stored_dtype(tensors: dict[str, Tensor]) -> Dtype:
    """The type that most bytes of the weights are stored in."""
    sizes: dict[Dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index.name} has no weight_map", _AGAIN)
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]*\.{suffix}", file):
            raise CheckpointError(
                f"{index.name}: the file of {ascii(tensor)[:80]} is {ascii(file)[:80]}, not a {suffix} file beside it",
                "use a checkpoint whose index is as its authors published it",
            )
    return weight_map


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Names, types and shapes of a safetensors file; https://huggingface.co/docs/safetensors/#format."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path.name} is truncated or not a safetensors file ({size} bytes)", _AGAIN)
            header = json.loads(file.read(length))
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the file's permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path.name} is damaged: its header is not valid JSON", _AGAIN) from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} is damaged: its header is not an object", _AGAIN)
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        begin, end = _span(path, name, entry)
        tensor = _tensor(path, name, entry.get("dtype"), entry.get("shape"), 8 + length + begin)
        if end - begin != tensor.nbytes:
            raise CheckpointError(
                f"{path.name} is damaged: {name} has {end - begin} bytes, but its shape needs {tensor.nbytes}", _AGAIN
            )
        tensors[name] = tensor
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path.name} is damaged: its tensors overlap or leave gaps", _AGAIN)
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path.name} has {size} bytes, but its header describes {8 + length + position}: "
            + ("it is truncated" if size < 8 + length + position else "it is damaged"),
            _AGAIN,
        )
    return tensors


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(offset, int) and not isinstance(offset, bool) for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise CheckpointError(f"{path.name} is damaged: the header's entry for {ascii(name)[:80]} is wrong", _AGAIN)
    return offsets[0], offsets[1]


def _tensor(path: Path, name: str, dtype: object, shape: object, start: int | None) -> Tensor:
    if not isinstance(shape, list) or not all(
        isinstance(width, int) and not isinstance(width, bool) and 0 <= width < 2**40 for width in shape
    ):
        raise CheckpointError(f"{path.name} is damaged: the shape of {ascii(name)[:80]} is wrong", _AGAIN)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(
            f"{path.name}: {ascii(name)[:80]} is stored as {ascii(dtype)[:20]}, not as bfloat16, float16 or float32",
            "export the original checkpoint with its floating-point weights",
        )
    return Tensor(_DTYPES[dtype], tuple(shape), path, start)


def load_torch_file(path: Path) -> Any:
    """A .bin file's tensors, mapped, without running its pickle's code."""
    import torch

    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name} is truncated, damaged, or in torch's format from before version 1.6",
            f"{_AGAIN}, or save it anew with a current torch",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as exc:  # torch raises a dozen types for damaged files; its unpickler refuses code here
        reason = str(exc).strip().partition("\n")[0][:120] or type(exc).__name__
        raise CheckpointError(f"{path.name} is damaged or holds more than tensors: {reason}", _AGAIN) from exc


def _read_torch(path: Path) -> dict[str, Tensor]:
    import torch

    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    state = load_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path.name} holds no plain table of tensors", "save the model's state_dict alone")
    return {
        str(name): _tensor(path, str(name), names.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape), None)
        for name, tensor in state.items()
    }


def _equal_in_torch_files(left: Tensor, right: Tensor) -> bool:
    import torch

    def find(tensor: Tensor, name: str) -> Any:
        state = load_torch_file(tensor.file)
        return next(value for key, value in state.items() if key.endswith(name))

    return bool(torch.equal(find(left, "lm_head.weight"), find(right, "embed_tokens.weight")))


def _some(names: list[str]) -> str:
    """Up to three names, and how many more."""
    shown = ", ".join(ascii(name)[1:-1][:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
