"""Layer-by-layer execution of a checkpoint of any size in float32, for references and calibration.

Sequences go through the model in groups: their hidden states wait in memory while one decoder layer after the other is
read from the mapped file, turned to float32, run over all of them and dropped. At one time there is one layer in
float32 (0.9 GB for NorMistral-7B), or the embedding, or the output layer (0.5 GB each). transformers' own code makes
masks, positions and ALiBi and runs each layer, so what comes out is what it computes at once. A checkpoint that fits in
memory is run at once as the reference of an evaluation.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError, MissingExtraError, first_line, install_extra
from normistral.evaluation.quality import Predictor, ReferenceModel
from normistral.evaluation.windows import Window
from normistral.export.checkpoint.families.base import OUTPUT_LAYER
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, hash_sources, open_checkpoint
from normistral.export.checkpoint.tensor import map_tensor
from normistral.export.reference.model import (
    Logits,
    build_empty,
    fits_for_running,
    load_reference,
    read_reference_config,
)
from normistral.export.tools import quiet_tools
from normistral.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens that go through the layers together: reading a 7B's weights takes about as long as running 500 tokens through
# them on two cores, so a group of 8,192 loses a few percent; their hidden states take 134 MB, and what is finished is
# on disk after every group.
_GROUP_TOKENS = 8192


MatrixReader = Callable[[str], NDArray[np.float32] | None]
"""From a matrix's name to its values [out, in], or None for one that it does not have."""


@dataclass(slots=True)
class SequenceState:
    """Sequences between two layers: hidden states [sequences, tokens, hidden], and each layer's other arguments."""

    hidden: torch.Tensor
    layer_arguments: dict[str, Any]


class LayeredModel:
    """A model of any size, in float32, one layer in memory at a time.

    Args:
        checkpoint: an opened one; its folder has to stay.
        group_tokens: tokens that go through the layers together.
        matrices: replace the checkpoint's matrices of the same names where it has them: those of an artifact.

    Raises:
        ExportError: transformers cannot build the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        group_tokens: int = _GROUP_TOKENS,
        matrices: MatrixReader | None = None,
    ) -> None:
        import torch

        self._family, self._progress, self._group_tokens = checkpoint.family, progress, group_tokens
        self._matrices = matrices
        self._tensors = checkpoint.tensors
        self._model = empty_model(checkpoint)
        self._tied = self._model.config.tie_word_embeddings
        parent, _, name = self._family.layer_prefix.rstrip(".").rpartition(".")
        self._layers = self._model.get_submodule(parent).get_submodule(name)
        self._probe = _make_probe()
        setattr(self._model.get_submodule(parent), name, torch.nn.ModuleList([self._probe]))
        norms = set(self._family.outer_tensors(checkpoint.config)) - {self._family.embedding}
        for tensor in norms:
            self._fill(self._model, tensor, tensor)

    def predict(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """Logits of each window, as `Predictor`; the first ones come when a whole group has passed all layers."""
        groups = _group(windows, self._group_tokens)
        for number, group in enumerate(groups, start=1):
            what = "reference" if self._matrices is None else "the artifact's weights in transformers"
            title = f"{what}, layer by layer" + (f", part {number} of {len(groups)}" if len(groups) > 1 else "")
            with self._progress.stage(title, self.layers, "layers") as stage:
                sequences = self.embed(*([window.fed_ids] for window in group))
                for index in range(self.layers):
                    with self.open_layer(index) as layer:
                        for sequence in sequences:
                            self.run(layer, sequence)
                    stage.advance(1)
            yield from self._finish(group, sequences)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def embed(self, *batches: Sequence[Sequence[int]]) -> list[SequenceState]:
        """Embed token ids, the inputs of the first layer: one state for each batch of sequences of one length."""
        import torch

        with self._filled(self._model, {self._family.embedding: self._family.embedding}), torch.no_grad():
            return [self._start(torch.tensor(batch)) for batch in batches]

    @contextmanager
    def open_layer(self, index: int, without: Set[str] = frozenset()) -> Iterator[torch.nn.Module]:
        """A layer whose parameters are there, in float32 and free to be changed, while the context is open.

        Args:
            without: parameters that the caller will put in.
        """
        layer = self._layers[index]
        prefix = self.prefix(index)
        names = [name for name, _ in layer.named_parameters()]
        try:
            with self._filled(layer, {name: f"{prefix}{name}" for name in names if name not in without}):
                yield layer
        finally:
            for name in without:
                clear_parameter(layer, name)

    def layer(self, index: int) -> torch.nn.Module:
        """A layer, with or without its parameters."""
        layer: torch.nn.Module = self._layers[index]
        return layer

    def read_matrix(self, stored: str) -> torch.Tensor:
        """A tensor in float32, by its name in the checkpoint."""
        import torch

        return map_tensor(self._tensors[stored]).to(torch.float32, copy=True)

    def prefix(self, index: int) -> str:
        """Prefix of a layer's parameter names in the checkpoint."""
        return f"{self._family.layer_prefix}{index}."

    def run(self, layer: torch.nn.Module, sequence: SequenceState) -> None:
        """Pass a sequence through an open layer."""
        import torch

        with torch.no_grad():
            sequence.hidden = self.call(layer, sequence)

    def call(self, layer: torch.nn.Module, sequence: SequenceState) -> torch.Tensor:
        """Output of an open layer [1, tokens, hidden]; with a gradient if torch records one."""
        out = layer(sequence.hidden, **sequence.layer_arguments)
        self._answers_tuple = isinstance(out, tuple)  # BLOOM's layers do, Llama's do not
        hidden: torch.Tensor = out[0] if self._answers_tuple else out
        return hidden

    @contextmanager
    def open_output(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Last norm and output layer while the context is open: hidden states [1, tokens, hidden] to logits.

        Layers have to have been run before.
        """

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            self._probe.answer = (hidden,) if self._answers_tuple else hidden
            found: torch.Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits[0]
            return found

        with self._filled(self._model, {OUTPUT_LAYER: OUTPUT_LAYER}):
            yield logits

    def _start(self, token_ids: torch.Tensor) -> SequenceState:
        """Inputs of the first layer."""
        self._probe.answer = None
        try:
            self._model(token_ids, use_cache=False)
        except _LayersReachedError as reached:
            return SequenceState(reached.hidden, reached.layer_arguments)
        raise ExportError(f"transformers' {type(self._model).__name__} has no layers where they were expected")

    def _finish(self, windows: Sequence[Window], sequences: Sequence[SequenceState]) -> Iterator[Logits]:
        """Last norm and output layer, at the scored places only."""
        import torch

        with self.open_output() as output:
            for window, sequence in zip(windows, sequences, strict=True):
                with torch.inference_mode():
                    logits = output(sequence.hidden[:, -window.scored :])
                yield logits.numpy().astype(np.float32, copy=False)

    @contextmanager
    def _filled(self, module: torch.nn.Module, names: dict[str, str]) -> Iterator[None]:
        """The module's parameters in float32 while the context is open; names: in the module -> in the file."""
        try:
            for name, stored in names.items():
                self._fill(module, name, stored)
            yield
        finally:
            for name in names:
                clear_parameter(module, name)

    def _fill(self, module: torch.nn.Module, name: str, stored: str) -> None:
        import torch

        if stored == OUTPUT_LAYER and self._tied:
            stored = self._family.embedding
        replaced = None if self._matrices is None else self._matrices(stored)
        values = self.read_matrix(stored) if replaced is None else torch.from_numpy(replaced)
        if values.shape != module.get_parameter(name).shape:
            raise ExportError(f"transformers expects another shape of {stored}", "config.json and weights differ")
        set_parameter(module, name, values)


def _group(windows: Sequence[Window], tokens: int) -> list[list[Window]]:
    """Consecutive windows of about so many tokens together."""
    groups: list[list[Window]] = []
    size = 0
    for window in windows:
        if not groups or size + len(window.token_ids) > tokens:
            groups.append([])
            size = 0
        groups[-1].append(window)
        size += len(window.token_ids)
    return groups


class _LayersReachedError(Exception):
    """Not a failure: carries the layers' inputs out of transformers' code."""

    def __init__(self, hidden: torch.Tensor, layer_arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.layer_arguments = hidden, layer_arguments


def _make_probe() -> Any:
    """A module in place of all layers: it returns `answer`, or raises with its inputs."""
    import torch

    class Probe(torch.nn.Module):
        answer: Any = None

        def forward(self, hidden: torch.Tensor, **layer_arguments: Any) -> Any:
            if self.answer is None:
                raise _LayersReachedError(hidden, layer_arguments)
            return self.answer

    return Probe()


def clear_parameter(module: torch.nn.Module, name: str) -> None:
    """Let go of a parameter's values."""
    set_parameter(module, name, module.get_parameter(name).to("meta"))


def set_parameter(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    """Replace a parameter ("self_attn.q_proj.weight") of a module."""
    import torch

    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(values, requires_grad=False))


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The reference without weights; buffers are computed as always."""
    import torch

    config = read_reference_config(checkpoint)
    try:
        return build_empty(config, torch.float32).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
        raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc


_PACKAGES = ("torch", "transformers", "accelerate", "gguf")


@contextmanager
def checkpoint_reference(
    model: str, scratch: Path, progress: Progress, ignore_fields: Sequence[str] = ()
) -> Iterator[ReferenceModel]:
    """A checkpoint to compare with.

    Args:
        model: a preset, a hub id, a folder, or a .gguf file.
        scratch: a folder on a disk with room for a .gguf file's float32 copy; what is put there goes with the context.
        ignore_fields: as in `export_model`.

    Raises:
        ModelNotFoundError, DownloadError, CheckpointError: the model cannot be had or is damaged.
        MissingExtraError: the extra `export` is not installed.
        ResourceError: too little disk or memory.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(
                f"a checkpoint as reference needs the package {package}, which is not installed",
                f"install it with: {install_extra('export')}; or give an artifact as --reference",
            )
    located = locate(model, ignore_fields=ignore_fields, progress=progress)
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".opened-", dir=scratch) as workspace:
        checkpoint = open_checkpoint(located, Path(workspace), progress=progress, ignore_fields=ignore_fields)
        unread = sum(path.stat().st_size for _, path in checkpoint.unhashed)
        with progress.stage("hashing the reference", unread, "bytes") as hashing:
            files = hash_sources(checkpoint, hashing.advance).files
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        yield ReferenceModel(
            name=model,
            source=f"checkpoint {digest}, float32" + "".join(f", without {name}" for name in checkpoint.ignored_fields),
            folder=checkpoint.folder,
            vocabulary=checkpoint.architecture.vocabulary,
            context_length=checkpoint.context_length,
            open=partial(_open, checkpoint, progress),
        )


@contextmanager
def _open(checkpoint: Checkpoint, progress: Progress) -> Iterator[Predictor]:
    with quiet_tools(None):
        if fits_for_running(checkpoint.architecture):
            yield WholeModel(load_reference(checkpoint))
        else:
            yield LayeredModel(checkpoint, progress)


class WholeModel:
    """A float32 model that fits in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def predict(self, windows: Sequence[Window]) -> Iterator[Logits]:
        """As `Predictor`."""
        import torch

        for window in windows:
            with torch.inference_mode():
                logits = self._model(torch.tensor([window.fed_ids]), use_cache=False).logits[0, -window.scored :]
            yield logits.numpy().astype(np.float32, copy=False)
