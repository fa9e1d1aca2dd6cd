"""The proof before an artifact gets its name: it opens, has the right shape, and computes what the model computes.

A model that fits is run by this package's own engine: step by step against all at once, and both against the model it
was made from. A large one is only opened, because running it would take more memory than exporting it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normistral.errors import EngineError, ExportError
from normistral.evaluation.metrics import compare_logits
from normistral.export.reference import Logits, Reference
from normistral.manifest import Manifest
from normistral.runtime.engines.base import Backend

# Largest difference between logits step by step and at once, as a share of the largest logit. Both are float32 sums of
# the same terms in another order (measured: 2e-6 on the demo model); a wrong mask or position costs 0.01 and more.
_STEP_TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
# Single tokens to feed: with reference arithmetic onnxruntime unpacks all rounded weights for each (0.3 s, demo model).
_ANSWER_TOKENS = 16
# KL divergence in nats of an artifact with float weights from its model; rounding to float16 alone costs 1e-6 to 1e-5
# (demo model).
_FLOAT_KL_LIMIT = 1e-3


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found: a line for the user, and figures for the manifest (None when nothing was run)."""

    note: str
    quality: dict[str, float] | None


def verify(folder: Path, manifest: Manifest, reference: Reference | None) -> Proof:
    """Check a written artifact.

    Args:
        folder: all files but the manifest.
        reference: the model's own logits; None for one that does not fit, which is then only opened.

    Raises:
        ExportError: the artifact is not what it should be.
        ResourceError: it was cut short because the disk is full.
    """
    check_structure(folder, manifest)
    if reference is None:
        return Proof("verified: inputs, output and KV cache have the right shapes; too large to run here", None)
    try:
        backend = load_exact(folder, manifest)
        try:
            logits = run(backend, reference.token_ids, tolerance_of(manifest))
        finally:
            backend.close()
    except EngineError as exc:
        raise ExportError(f"the written model cannot be run: {exc.message}", exc.hint) from exc
    kl, agreement = compare_logits(reference.logits, logits)
    uniform_kl, _ = compare_logits(reference.logits, np.zeros_like(logits))
    limit = _FLOAT_KL_LIMIT if manifest.recipe.weights in ("fp16", "fp32") else uniform_kl
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


def check_structure(folder: Path, manifest: Manifest) -> None:
    """Inputs, outputs and KV cache, without running anything.

    Raises:
        ExportError: something is missing or has another shape.
        ResourceError: the disk is full.
    """
    if manifest.format == "onnx":
        from normistral.export.onnx.structure import check_structure as check_onnx

        check_onnx(folder, manifest)
    else:
        from normistral.export.openvino import check_structure as check_ir

        check_ir(folder, manifest.architecture)


def load_exact(folder: Path, manifest: Manifest) -> Backend:
    """The artifact in its own engine, on the CPU, with reference arithmetic."""
    if manifest.format == "onnx":
        from normistral.runtime.engines.onnxruntime import load_onnx

        return load_onnx(folder, manifest, exact=True)
    from normistral.runtime.engines.openvino import load_openvino

    return load_openvino(folder, manifest, exact=True)


def tolerance_of(manifest: Manifest) -> float:
    """Allowed difference of step by step and at once. An ONNX model of float16 weights computes in float16."""
    halves = manifest.format == "onnx" and manifest.recipe.weights == "fp16"
    return _STEP_TOLERANCE["float16" if halves else "float32"]


def run(backend: Backend, token_ids: list[int], tolerance: float) -> Logits:
    """Logits of all tokens [n, vocabulary], after checking that feeding them in parts gives the same."""
    engine = backend.create_engine()
    at_once = engine.forward(token_ids, last=len(token_ids))
    engine.reset()
    steps = [engine.forward(part, last=len(part)) for part in split_in_turns(token_ids)]
    engine.close()
    apart = float(np.max(np.abs(np.concatenate(steps) - at_once)))
    scale = float(np.max(np.abs(at_once)))
    if not np.isfinite(scale):
        raise ExportError("the written model computes logits that are not numbers", "the checkpoint may be damaged")
    if not apart <= tolerance * scale:
        raise ExportError(
            f"the written model computes step by step other logits than at once: {apart:.3g} of {scale:.3g}"
        )
    return at_once


def split_in_turns(token_ids: list[int]) -> list[list[int]]:
    """As a conversation feeds them: a prompt, an answer token by token, a second prompt."""
    start = (len(token_ids) - _ANSWER_TOKENS) // 2
    stop = start + _ANSWER_TOKENS
    if start < 1:
        return [[token] for token in token_ids]
    return [token_ids[:start], *([token] for token in token_ids[start:stop]), token_ids[stop:]]
