"""Layers that a calibration has quantized, kept until the artifact is whole: the same command goes on behind them.

    FOLDER/kept.json        what they were made of, the choice of 8 bits, and each layer's files with their SHA-256
    FOLDER/rounded/         the quantized matrices
    FOLDER/states-12        hidden states in front of layer 12, the next one; there is one such file, the newest

kept.json is replaced when all it names is on the disk, so a kill or a power cut loses the layer that was being done.
There is no random state to keep: a calibration draws nothing. The choice of 8 bits does, with a seed of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.artifact.store import folder_bytes
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.quantize.plan import QuantPlan
from normistral.export.quantize.scheme import QuantScheme
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.files import (
    atomic_write,
    flush_to_disk,
    make_own_folder,
    read_file,
    remove_own_folder,
    sha256_file,
)
from normistral.progress import Progress, format_bytes

if TYPE_CHECKING:
    import torch

_INDEX = "kept.json"
_MOST_INDEX_BYTES = 2**26
_CHANGES = {
    "checkpoint": "they are of another checkpoint",
    "options": "they were made with other options",
    "tokens": "they were made with other sample tokens",
    "versions": "they were made by other versions of normistral or its tools",
    "arithmetic": "they were made on a processor with other arithmetic",
}


def fingerprint(
    checkpoint: Checkpoint, plan: QuantPlan, windows: list[list[int]], versions: dict[str, str], arithmetic: str
) -> dict[str, str]:
    """What quantized layers depend on: layers with the same fingerprint may be mixed.

    Weight files that nobody has hashed count by size and time of change, and by the headers of their tensors.

    Args:
        arithmetic: torch's type of the products, which the processor decides.
    """
    weights = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in checkpoint.unhashed]
    headers = [(name, tensor.dtype, tensor.shape, tensor.start) for name, tensor in sorted(checkpoint.tensors.items())]
    parts = {
        "checkpoint": [checkpoint.config, checkpoint.source.files, weights, headers],
        "options": asdict(plan),
        "tokens": windows,
        "versions": versions,
        "arithmetic": arithmetic,
    }
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }


@dataclass(slots=True)
class KeptLayers:
    """The layers of one export that are done, in their order.

    Attributes:
        folder: holds the files above; of this user alone.
        layers: of the model.
        tensors: the matrices of the layers that are done, and of those that are being done.
        in_int8: names of the matrices that take 8 bits, once they are chosen.
    """

    folder: Path
    layers: int
    tensors: QuantizedTensorStore
    in_int8: frozenset[str] | None = None
    _fingerprint: dict[str, str] = field(default_factory=dict)
    _threads: set[int] = field(default_factory=set)
    _done: list[dict[str, Any]] = field(default_factory=list)
    _states: dict[str, Any] | None = None

    @classmethod
    def open(
        cls, folder: Path, made_of: dict[str, str], layers: int, *, restart: bool, progress: Progress
    ) -> KeptLayers:
        """What an interrupted export kept, as far as it is whole and of the same fingerprint; otherwise nothing.

        Args:
            folder: of ours, or not there yet.
            restart: throw away what was kept.
        """
        import torch

        index = _read_index(folder)
        if index is not None:
            changed = [reason for name, reason in _CHANGES.items() if index["fingerprint"].get(name) != made_of[name]]
            if restart or changed:
                discard_kept(folder, "--restart" if restart else changed[0], progress)
                index = None
        elif folder.exists():  # killed within its first layer
            remove_own_folder(folder)
        if not folder.exists():
            make_own_folder(folder)
            (folder / "rounded").mkdir(0o700)
        kept = cls(folder, layers, QuantizedTensorStore(folder / "rounded"), _fingerprint=made_of)
        if index is not None:
            kept._take_up(index, progress)
        kept._threads.add(torch.get_num_threads())
        return kept

    @property
    def done(self) -> int:
        """Number of layers that are done."""
        return len(self._done)

    def save(self, names: Iterable[str], states: torch.Tensor | None) -> None:
        """Keep the next layer.

        Args:
            names: of its matrices, which are in `tensors`.
            states: what enters the layer behind it; None behind the last one.

        Raises:
            OSError: it cannot be written.
        """
        hashes, schemes = {}, {}
        for name in sorted(names):
            schemes[name] = asdict(self.tensors.schemes[name])
            for path in self.tensors.files(name):
                hashes[path.name] = sha256_file(path)
                flush_to_disk(path)
        flush_to_disk(self.tensors.folder)
        self._done.append({"files": hashes, "schemes": schemes})
        before, self._states = self._states, None if states is None else self._write_states(states)
        self._write_index()
        if before is not None:
            (self.folder / before["file"]).unlink()

    def keep_in_int8(self, names: frozenset[str]) -> None:
        """Keep the choice of 8 bits."""
        self.in_int8 = names
        self._write_index()

    def load_states(self) -> torch.Tensor | None:
        """What enters the next layer; None if it was not kept, or is damaged."""
        import torch

        if self._states is None:
            return None
        states = torch.empty(self._states["shape"], dtype=getattr(torch, self._states["dtype"]))
        raw = states.view(torch.uint8).numpy()
        try:
            with (self.folder / self._states["file"]).open("rb") as file:
                whole = file.readinto(raw.data.cast("B")) == raw.nbytes
        except OSError:
            return None
        return states if whole and hashlib.sha256(raw.data).hexdigest() == self._states["sha256"] else None

    def _write_states(self, states: torch.Tensor) -> dict[str, Any]:
        import torch

        raw = states.contiguous().view(torch.uint8).numpy()
        name = f"states-{self.done}"
        with atomic_write(self.folder / name) as file:
            file.write(raw.data.cast("B"))
        dtype = str(states.dtype).removeprefix("torch.")
        return {
            "file": name,
            "sha256": hashlib.sha256(raw.data).hexdigest(),
            "shape": list(states.shape),
            "dtype": dtype,
        }

    def _write_index(self) -> None:
        flush_to_disk(self.folder)
        index = {
            "of_layers": self.layers,
            "fingerprint": self._fingerprint,
            "threads": sorted(self._threads),
            "in_int8": None if self.in_int8 is None else sorted(self.in_int8),
            "states": self._states,
            "layers": self._done,
        }
        with atomic_write(self.folder / _INDEX) as file:
            file.write(json.dumps(index).encode())
        flush_to_disk(self.folder)

    def _take_up(self, index: dict[str, Any], progress: Progress) -> None:
        """Take over the layers in front of the first damaged one, and say what is gone on with."""
        import torch

        self.in_int8 = None if index["in_int8"] is None else frozenset(index["in_int8"])
        self._states, self._threads = index["states"], set(index["threads"])
        size = folder_bytes(self.folder)
        with progress.stage("checking the layers that were kept", size, "bytes") as checking:
            for layer in index["layers"]:
                if any(_hash(self.tensors.folder / name) != sha256 for name, sha256 in layer["files"].items()):
                    break
                self._done.append(layer)
                checking.advance(sum((self.tensors.folder / name).stat().st_size for name in layer["files"]))
        for layer in self._done:
            for name, scheme in layer["schemes"].items():
                self.tensors.schemes[name] = QuantScheme(**scheme)
        if self.done < len(index["layers"]):
            number = self.done + 1
            progress.note(f"kept layer {number} is damaged: it and the following are done again")
            states, self._states = self._states, None
            self._write_index()
            if states is not None:
                (self.folder / states["file"]).unlink(missing_ok=True)
        progress.note(f"{self.done} of {self.layers} layers were kept by an interrupted export, which goes on here")
        if self._threads != {torch.get_num_threads()} and self._done:
            before, now = ", ".join(map(str, sorted(self._threads))), torch.get_num_threads()
            progress.note(
                f"they were made with {before} threads, and there are {now} now: bytes may differ "
                "from those of an export that was not interrupted"
            )


def discard_kept(folder: Path, reason: str, progress: Progress) -> None:
    """Throw away what an interrupted export kept, and say so if there was anything."""
    if not folder.exists():
        return
    if (index := _read_index(folder)) is not None:
        done = len(index["layers"])
        progress.note(f"this export starts anew, without the layers that were kept ({done}): {reason}")
    remove_own_folder(folder)


@contextmanager
def leave_kept(folder: Path, progress: Progress) -> Iterator[None]:
    """Say what an export leaves that does not come to its end; without anything done, leave nothing."""
    try:
        yield
    except BaseException:
        index = _read_index(folder)
        if index is not None:
            done, of_layers, size = len(index["layers"]), index["of_layers"], format_bytes(folder_bytes(folder))
            progress.note(
                f"kept {done} of {of_layers} layers, {size}, in {folder}: the same command goes on with them; "
                "--restart or rm -r throws them away"
            )
        elif folder.exists():
            remove_own_folder(folder)
        raise


def _read_index(folder: Path) -> dict[str, Any] | None:
    """None if there is none, or it was damaged."""
    try:
        index = json.loads(read_file(folder / _INDEX, _MOST_INDEX_BYTES))
    except (OSError, ValueError):
        return None
    expected = {"of_layers": int, "fingerprint": dict, "threads": list, "layers": list}
    whole = isinstance(index, dict) and all(isinstance(index.get(name), kind) for name, kind in expected.items())
    return index if whole and {"in_int8", "states"} <= index.keys() else None


def _hash(path: Path) -> str | None:
    try:
        return sha256_file(path)
    except OSError:
        return None
