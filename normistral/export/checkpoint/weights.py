"""Check a checkpoint's weight files before anything is converted.

Only headers are read: names, types, shapes, and that every byte that a header promises is there. The values are not
looked at; a wrong byte inside them shows in the SHA-256 when there is one to compare with (hub.py).
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from normistral.errors import CheckpointError
from normistral.export.checkpoint.families.base import OUTPUT_LAYER, Family
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.files import read_json, recognise_folder, unreadable
from normistral.export.checkpoint.tensor import Dtype, Tensor, make_tensor, recognise_tensors, shown, some_names
from normistral.export.checkpoint.torch_file import read_torch_file

T = TypeVar("T")

_INDEXED = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files that make up a checkpoint.

    Attributes:
        names: of the files in `folder`.
        index: name of the index file; None for a single weight file.
        weight_map: the index's map from tensor to file.
    """

    folder: Path
    names: tuple[str, ...]
    index: str | None = None
    weight_map: dict[str, str] | None = None


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the weight files by name, as transformers does: safetensors before torch, one file before shards.

    Raises:
        CheckpointError: there are none, or the index is damaged or leads out of the folder.
    """
    for single in _INDEXED:
        if (folder / single).is_symlink() or (folder / single).exists():
            return WeightFiles(folder, (single,))
        index = folder / f"{single}.index.json"
        if index.is_symlink() or index.exists():
            weight_map = _weight_map(index)
            return WeightFiles(folder, tuple(sorted(set(weight_map.values()))), index.name, weight_map)
    found = recognise_folder(folder)
    if found is not None:
        raise CheckpointError(f"{folder} has no weights that can be read: it is {found.what}", found.hint)
    others = sorted(path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if others:
        shard = re.fullmatch(r"(\w+)-\d+-of-\d+(\.\w+)", others[0])
        raise CheckpointError(
            f"{folder} has weights, but not under a name that transformers looks for: {some_names(others, 'files')}",
            f"copy the shards' index too, {shard[1]}{shard[2]}.index.json"
            if shard
            else f"if {others[0]} holds the whole model, rename it to {_INDEXED[others[0].endswith('.bin')]}",
        )
    raise CheckpointError(
        f"{folder} has no weights: neither {' nor '.join(_INDEXED)}, nor an index of shards",
        "give the folder of a whole checkpoint",
    )


def read_tensors(files: WeightFiles) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name, from the headers of its files.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or does not hold what the index says.
    """
    folder, weight_map = files.folder, files.weight_map
    absent = [file for file in files.names if not (folder / file).is_file()]
    if absent:
        raise _missing_files(folder, absent, len(files.names))
    tensors: dict[str, Tensor] = {}
    for file in files.names:
        path = folder / file
        found = read_safetensors(path) if file.endswith(".safetensors") else read_torch_file(path)
        if weight_map is not None:
            lacking = [name for name, where in weight_map.items() if where == file and name not in found]
            if lacking:
                raise CheckpointError(
                    f"{file} does not hold {some_names(lacking, 'tensors')}, which the index says", DOWNLOAD_AGAIN
                )
            unnamed = [name for name in found if name not in weight_map]
            if unnamed:
                raise CheckpointError(
                    f"{file} holds {some_names(unnamed, 'tensors')}, which {files.index} does not name: transformers "
                    "leaves such tensors out",
                    "copy the shards and their index again, from one and the same checkpoint",
                )
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(
                f"{file} holds {some_names(twice, 'tensors')}, which another shard holds too", DOWNLOAD_AGAIN
            )
        tensors |= found
    return tensors


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], family: Family) -> None:
    """Compare with what config.json describes.

    Raises:
        CheckpointError: naming tensors that are missing, mis-shaped or left over.
    """
    found = with_prefix(tensors, family)
    missing = [name for name in expected if name not in found]
    other = recognise_tensors(name for name in tensors if name not in expected) if missing else None
    if other is not None:
        raise CheckpointError(f"the weights are {other.what}", other.hint)
    if missing:
        tail = family.embedding.removeprefix(family.prefix)
        inside = next((name.removesuffix(tail) for name in tensors if name.endswith(f".{tail}")), family.prefix)
        if inside != family.prefix:
            raise CheckpointError(
                f"the weights were saved from inside another model: names begin with {shown(inside)} and not with "
                f"{family.prefix!r}",
                f"save the language model itself, or put {family.prefix} in the place of {ascii(inside[:80])[1:-1]}",
            )
        hint = "give the folder of a whole checkpoint"
        if missing == [OUTPUT_LAYER]:
            hint = "it may have been saved without its output layer; export the causal language model"
        if missing == [family.embedding] and OUTPUT_LAYER in found.keys() - expected.keys():
            hint = f"of two tied tensors {OUTPUT_LAYER} alone was saved: rename it to {family.embedding}"
        raise CheckpointError(f"the weights lack {some_names(missing, 'tensors')}, which config.json asks for", hint)
    for name, shape in expected.items():
        if 0 in found[name].shape:
            raise CheckpointError(
                f"{name} is empty: DeepSpeed (ZeRO 3) leaves such tensors in the place of those it holds in pieces",
                "join the pieces first: python zero_to_fp32.py, in the training run's folder",
            )
        if found[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {list(found[name].shape)}, but config.json asks for {list(shape)}",
                "config.json and weights belong to different models",
            )
    extra = [name for name in found if name not in expected and not family.is_computed(name)]
    if extra and extra != [OUTPUT_LAYER]:
        if (other := recognise_tensors(extra)) is not None:
            raise CheckpointError(f"the weights are {other.what}: they hold {some_names(extra, 'tensors')}", other.hint)
        raise CheckpointError(
            f"the weights hold {some_names(extra, 'tensors')}, which config.json does not describe",
            "config.json and weights belong to different models",
        )


def with_prefix(tensors: dict[str, T], family: Family) -> dict[str, T]:
    """Tensors under the names of the causal language model: a headless checkpoint's lack the family's prefix."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {name if name == OUTPUT_LAYER else f"{family.prefix}{name}": tensor for name, tensor in tensors.items()}


def has_separate_output(tensors: dict[str, Tensor], family: Family) -> bool:
    """Whether there is an output matrix that differs from the input embedding.

    Args:
        tensors: under the names of the causal language model.
    """
    output, embedding = tensors.get(OUTPUT_LAYER), tensors.get(family.embedding)
    if output is None or embedding is None:
        return False
    if (output.dtype, output.shape) != (embedding.dtype, embedding.shape):
        return True
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
        raise CheckpointError(f"{index.name} has no weight_map", DOWNLOAD_AGAIN)
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9._-]*\.{suffix}", file):
            raise CheckpointError(
                f"{index.name}: the file of {ascii(tensor)[:80]} is {ascii(file)[:80]}, not a {suffix} file beside it",
                "use a checkpoint whose index is as its authors published it",
            )
    return weight_map


def _missing_files(folder: Path, absent: list[str], count: int) -> CheckpointError:
    """The error that names them all, and the download that did not finish where it shows."""
    reason = f"{'weight file' if count == 1 else 'shard'} {absent[0]} is missing from {folder}"
    if len(absent) > 1:
        numbers = [match[1].lstrip("0") for name in absent if (match := re.search(r"-(\d+)-of-\d+\.", name))]
        which = ", ".join(numbers) if len(numbers) == len(absent) else some_names(absent, "files")
        reason = f"{len(absent)} of {count} shards are missing from {folder}: {which}"
    found = recognise_folder(folder)
    if found is not None and "did not finish" in found.what:
        return CheckpointError(f"{reason}; it holds {found.what}", found.hint)
    return CheckpointError(reason, "download or copy the checkpoint again")


# The format allows 100 MB. NorMistral's headers have 40 kB, and parsed JSON takes up to 25 times its text.
_MAX_HEADER_BYTES = 4 * 2**20


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by name.

    Raises:
        CheckpointError: it cannot be read, is truncated or damaged, or holds a type that is no float of 16 or 32 bits.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise unreadable(
                    path, f"{path.name} is truncated or not a safetensors file ({size} bytes)", DOWNLOAD_AGAIN
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the file's permissions") from exc
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else ascii(str(exc))[1:-1][:120]
        raise unreadable(
            path, f"{path.name} is damaged: its header is not valid JSON: {reason}", DOWNLOAD_AGAIN
        ) from exc
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} is damaged: its header is not an object", DOWNLOAD_AGAIN)
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        begin, end = _span(path, name, entry)
        tensor = make_tensor(path, name, entry.get("dtype"), entry.get("shape"), 8 + length + begin)
        if end - begin != tensor.nbytes:
            raise CheckpointError(
                f"{path.name} is damaged: {shown(name)} has {end - begin} bytes, but its shape needs {tensor.nbytes}",
                DOWNLOAD_AGAIN,
            )
        tensors[name] = tensor
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path.name} is damaged: its tensors overlap or leave gaps", DOWNLOAD_AGAIN)
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path.name} has {size} bytes, but its header describes {8 + length + position}: "
            + ("it is truncated" if size < 8 + length + position else "it is damaged"),
            DOWNLOAD_AGAIN,
        )
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("it has one name twice")
    return document


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(isinstance(offset, int) and not isinstance(offset, bool) for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] < 2**63
    ):
        raise CheckpointError(f"{path.name} is damaged: the header's entry for {shown(name)} is wrong", DOWNLOAD_AGAIN)
    return offsets[0], offsets[1]
