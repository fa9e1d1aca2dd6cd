"""What the model itself computes, as transformers runs it: the measure of everything that is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError, first_line
from normistral.hardware import available_memory_bytes
from normistral.manifest import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits = NDArray[np.float32]

PROBE_TEXT = (
    "Hovedstaden i Norge er Oslo, og den lengste elva er Glåma. På Vestlandet regner det ofte, men folk går tur. "
    "The capital of Norway is Oslo. A short text in two languages is enough to see whether a model was converted whole."
)
_PROBE_TOKENS = 64
# A model whose float32 copy takes more than this is not run: twice that is held during the comparison.
_RUN_LIMIT_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model itself computes: token ids [n] and float32 logits [n, vocabulary]."""

    token_ids: list[int]
    logits: Logits


def fits_for_running(architecture: Architecture) -> bool:
    """Whether model and artifact can be run here beside each other."""
    float32_bytes = 4 * architecture.parameters
    return float32_bytes <= _RUN_LIMIT_BYTES and 2 * float32_bytes <= available_memory_bytes()


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The checkpoint as a transformers model; safetensors stay memory-mapped when `dtype` is their own.

    Runs no code of the checkpoint and asks no network.

    Args:
        folder: config.json and weights, as `open_checkpoint` prepared them.
        dtype: "float32", "float16" or "bfloat16".

    Raises:
        ExportError: transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as exc:
        raise ExportError(f"transformers cannot load the checkpoint: {first_line(exc)}") from exc
    return model.eval()


def compute_reference(model: PreTrainedModel, token_ids: list[int]) -> Reference:
    """Logits of the model in float32, before its weights are rounded. Works on a copy unless it is float32 already."""
    import copy

    import torch

    token_ids = token_ids[:_PROBE_TOKENS]
    with torch.inference_mode():
        exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        logits = exact(torch.tensor([token_ids])).logits[0]
    return Reference(token_ids, logits.numpy().astype(np.float32))
