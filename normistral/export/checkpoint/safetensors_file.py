"""Read the header of a safetensors file: https://huggingface.co/docs/safetensors/#format."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import DOWNLOAD_AGAIN
from normistral.export.checkpoint.file_kinds import unreadable
from normistral.export.checkpoint.tensor import Tensor, make_tensor, shown

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
