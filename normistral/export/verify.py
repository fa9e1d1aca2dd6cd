"""The proof before an artifact gets its name: it opens, has the right shape, and computes what the model computes.

A model that fits is run: step by step against all at once, and both against the model it was made from. A large one
is only opened, because running it would take more memory than exporting it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ExportError
from normistral.export.staging import require_free_disk
from normistral.hardware import available_memory_bytes, exact_openvino, read_machine
from normistral.manifest import Architecture
from normistral.presets import WeightFormat

if TYPE_CHECKING:
    import openvino
    from transformers import PreTrainedModel

Logits = NDArray[np.float32]

PROBE_TEXT = (
    "Hovedstaden i Norge er Oslo, og den lengste elva er Glåma. På Vestlandet regner det ofte, men folk går tur. "
    "The capital of Norway is Oslo. A short text in two languages is enough to see whether a model was converted whole."
)
_PROBE_TOKENS = 64
# A model whose float32 copy takes more than this is not run: twice that is held during the comparison.
_RUN_LIMIT_BYTES = 2 * 10**9
# Largest difference between logits step by step and at once, as a share of the largest logit. Both are float32 sums of
# the same terms in another order (measured: 2e-6 on the demo model); a wrong mask or position costs 0.01 and more.
_STEP_TOLERANCE = 1e-3
# KL divergence in nats of a float16 artifact from its model; rounding alone costs 1e-6 to 1e-5 (demo model).
_FLOAT16_KL_LIMIT = 1e-3


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model itself computes: token ids [n] and float32 logits [n, vocabulary]."""

    token_ids: list[int]
    logits: Logits


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found: a line for the user, and figures for the manifest (None when nothing was run)."""

    note: str
    quality: dict[str, float] | None


def fits_for_running(architecture: Architecture) -> bool:
    """Whether model and artifact can be run here beside each other."""
    float32_bytes = 4 * architecture.parameters
    return float32_bytes <= _RUN_LIMIT_BYTES and 2 * float32_bytes <= available_memory_bytes()


def compute_reference(model: PreTrainedModel, token_ids: list[int]) -> Reference:
    """Logits of the model in float32, before its weights are rounded. Works on a copy unless it is float32 already."""
    import copy

    import torch

    token_ids = token_ids[:_PROBE_TOKENS]
    with torch.inference_mode():
        exact = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
        logits = exact(torch.tensor([token_ids])).logits[0]
    return Reference(token_ids, logits.numpy().astype(np.float32))


def verify(ir: Path, architecture: Architecture, weights: WeightFormat, reference: Reference | None) -> Proof:
    """Check a written IR.

    Args:
        reference: the model's own logits; None for one that does not fit, which is then only opened.

    Raises:
        ExportError: the artifact is not what it should be.
        ResourceError: it was cut short because the disk is full.
    """
    import openvino

    core = openvino.Core()
    try:
        graph = core.read_model(ir)
    except RuntimeError as exc:
        require_free_disk(ir)
        raise ExportError("the written model cannot be opened again: its weights are not whole") from exc
    check_structure(graph, architecture)
    if reference is None:
        return Proof("verified: inputs, output and KV cache have the right shapes; too large to run here", None)
    logits = _run(core.compile_model(graph, "CPU", exact_openvino(read_machine())), reference.token_ids)
    kl, agreement = compare_logits(reference.logits, logits)
    uniform_kl, _ = compare_logits(reference.logits, np.zeros_like(logits))
    limit = _FLOAT16_KL_LIMIT if weights == "fp16" else uniform_kl
    if not kl <= limit:
        raise ExportError(
            f"the written model does not compute what the checkpoint does: {kl:.3g} nats apart, "
            f"at most {limit:.3g} allowed"
        )
    note = (
        f"verified: runs, step by step as at once; {kl:.2g} nats from the checkpoint and the same first choice at "
        f"{agreement:.0%} of {len(reference.token_ids)} tokens of a fixed text"
    )
    tokens = float(len(reference.token_ids))
    return Proof(note, {"probe_kl_nats": kl, "probe_top1_agreement": agreement, "probe_tokens": tokens})


def check_structure(graph: openvino.Model, architecture: Architecture) -> None:
    """Inputs, output and KV cache variables as `normistral.export.openvino.convert` promises them.

    Raises:
        ExportError: something is missing or has another shape.
    """
    inputs = {name for port in graph.inputs for name in port.get_names()}
    missing = {"input_ids", "attention_mask", "position_ids", "beam_idx"} - inputs
    if missing:
        raise ExportError(f"the converted model lacks the input {', '.join(sorted(missing))}")
    vocabulary = graph.output("logits").get_partial_shape()[2]
    if vocabulary.is_static and vocabulary.get_length() != architecture.vocabulary:
        raise ExportError(f"the converted model has {vocabulary} logits instead of {architecture.vocabulary}")
    caches = [node.get_output_partial_shape(0) for node in graph.get_ops() if node.get_type_name() == "ReadValue"]
    if len(caches) != 2 * architecture.layers:
        raise ExportError(
            f"the converted model has {len(caches)} KV cache tensors instead of {2 * architecture.layers}"
        )
    wanted = (architecture.kv_heads, architecture.head_dim)
    for shape in caches:
        found = tuple(shape[axis].get_length() if shape[axis].is_static else None for axis in (1, 3))
        if found != wanted:
            raise ExportError(f"the converted model's KV cache is {shape}, without {wanted[0]} heads of {wanted[1]}")


def compare_logits(reference: Logits, logits: Logits) -> tuple[float, float]:
    """Distance of two sets of predictions.

    Args:
        reference, logits: float32 [n, vocabulary].

    Returns:
        mean Kullback-Leibler divergence KL(reference || logits) in nats, and the share of positions with the same
        most likely token.
    """
    p, q = _log_softmax(reference), _log_softmax(logits)
    kl = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    agreement = float(np.mean(reference.argmax(axis=-1) == logits.argmax(axis=-1)))
    return max(kl, 0.0), agreement  # float rounding can take it below 0


def _run(compiled: openvino.CompiledModel, token_ids: list[int]) -> Logits:
    """Logits of all tokens [n, vocabulary], after checking that feeding them one by one gives the same."""
    request = compiled.create_infer_request()
    at_once = _forward(request, token_ids, past=0)
    request.reset_state()
    steps = [_forward(request, [token], past=past) for past, token in enumerate(token_ids)]
    apart = float(np.max(np.abs(np.concatenate(steps) - at_once)))
    scale = float(np.max(np.abs(at_once)))
    if not np.isfinite(scale):
        raise ExportError("the written model computes logits that are not numbers", "the checkpoint may be damaged")
    if not apart <= _STEP_TOLERANCE * scale:
        raise ExportError(
            f"the written model computes step by step other logits than at once: {apart:.3g} of {scale:.3g}"
        )
    return at_once


def _forward(request: Any, token_ids: list[int], past: int) -> Logits:
    count = len(token_ids)
    request.infer(
        {
            "input_ids": np.array([token_ids], dtype=np.int64),
            "attention_mask": np.ones((1, past + count), dtype=np.int64),
            "position_ids": np.arange(past, past + count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
    )
    return np.array(request.get_tensor("logits").data[0], dtype=np.float32)


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
