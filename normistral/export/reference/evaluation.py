"""A checkpoint as the reference of an evaluation: run in float32 by transformers, at once if it fits in memory."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from normistral.errors import MissingExtraError, install_extra
from normistral.evaluation.quality import Predictor, ReferenceModel
from normistral.evaluation.windows import Window
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, hash_sources, open_checkpoint
from normistral.export.reference.layerwise import LayeredModel
from normistral.export.reference.model import Logits, fits_for_running, load_reference
from normistral.export.tools import quiet_tools
from normistral.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
