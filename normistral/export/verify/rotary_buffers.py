"""Frequencies that old checkpoints carry beside their weights: computed anew, so they have to be config.json's."""

from __future__ import annotations

import numpy as np

from normistral.errors import CheckpointError
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tensor import shown
from normistral.export.checkpoint.tensor_reader import WeightReader
from normistral.export.checkpoint.weights import read_tensors
from normistral.export.verify.positions import published_frequencies

# Buffers were saved in the type of the weights: bfloat16 keeps 8 bits, and float16 counts in steps of 6e-8 near zero.
_RELATIVE, _ABSOLUTE = 1e-2, 1e-6


def check_rotary_buffers(checkpoint: Checkpoint) -> None:
    """Compare every stored `rotary_emb.inv_freq` with config.json; scaled or, as transformers once kept them, not.

    Raises:
        CheckpointError: one belongs to other rotary angles, so that config.json may not be this model's.
    """
    names = [name for name in read_tensors(checkpoint.folder) if checkpoint.family.is_computed(name)]
    if not names:
        return
    reader, raw = WeightReader(checkpoint.folder, checkpoint.family), checkpoint.raw_config
    theta = (raw.get("rope_parameters") or raw.get("rope_scaling") or {}).get("rope_theta") or raw.get("rope_theta")
    unscaled = {**raw, "rope_parameters": None, "rope_scaling": None, "rope_theta": theta}
    allowed = [published_frequencies(raw)[0], published_frequencies(unscaled)[0]]
    for name in names:
        found = reader.read(name if name in reader else f"{checkpoint.family.prefix}{name}").reshape(-1)
        if not any(len(f) == len(found) and np.allclose(found, f, _RELATIVE, _ABSOLUTE) for f in allowed):
            raise CheckpointError(
                f"{shown(name)} holds other rotary frequencies than config.json describes: "
                f"{found[min(1, len(found) - 1)]:.4g} and not {allowed[0][min(1, len(allowed[0]) - 1)]:.4g} at 1",
                "config.json and weights belong to different models: compare rope_theta and head_dim with the authors'",
            )
