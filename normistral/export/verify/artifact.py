"""Verification before an artifact gets its name: it opens, holds the checkpoint's content, and computes the same.

The cheap parts come first, and name the difference: inputs and outputs, configuration, tokenizer, template, some rows
of every matrix. (Tokenizer and template were compared with transformers before the export began.) Then the model is
run by this package's own engine, step by step against all at once, and against transformers in float32: with the
artifact's matrices, which has to agree, and with the checkpoint's, which says what rounding costs. Through transformers
it goes layer by layer, so that checkpoint and artifact are never in memory together; a large fused ONNX artifact is
itself run layer by layer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest, write_manifest
from normistral.errors import EngineError, ExportError, UsageError
from normistral.evaluation.metrics import compare_logits
from normistral.evaluation.windows import Window
from normistral.export.checkpoint.fields import shorten
from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.open import Checkpoint
from normistral.export.checkpoint.tokenizer_check import first_difference
from normistral.export.job import ExportJob
from normistral.export.recipe import Recipe
from normistral.export.reference.layerwise import LayeredModel, MatrixReader
from normistral.export.reference.model import PROBE_TOKENS, Logits, fits_for_running
from normistral.export.resources import estimate_layered_bytes, estimate_running_bytes
from normistral.export.verify import CAUSE
from normistral.hardware import available_memory_bytes
from normistral.progress import Progress
from normistral.runtime.engines.base import Backend
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

# Largest difference between logits step by step and at once, as a share of the largest logit. Both are float32 sums of
# the same terms in another order (measured: 2e-6 on the demo model); a wrong mask or position costs 0.01 and more.
_STEP_TOLERANCE = {"float32": 1e-3, "float16": 1e-2}
# Single tokens to feed: with reference arithmetic onnxruntime unpacks all rounded weights for each (0.3 s, demo model;
# 3 s, 7B).
_ANSWER_TOKENS, _ANSWER_TOKENS_OF_LARGE = 16, 2
# Largest difference of a logit from transformers in float32 with the artifact's own matrices, as a share of the logits'
# spread: 4e-7 on tiny models, 1e-5 and more after 32 layers; a wrong mask, angle or order of heads costs 0.03 and more.
_GRAPH_TOLERANCE = {"float32": 5e-3, "float16": 3e-2}
# KL divergence in nats of float weights from their model; rounding to float16 alone costs 1e-6 to 1e-5 (demo model).
# What rounding to 4 or 8 bits costs is the model's affair and bounds nothing: it is reported.
_FLOAT_KL_LIMIT = 1e-3
_WARNING_SHARE = 0.5  # of the uniform distribution's KL divergence; from there on the result gets a warning


logger = logging.getLogger(__name__)


def verify_artifact(job: ExportJob, manifest: Manifest) -> Manifest:
    """Check a written artifact, which has all files but the manifest, and tell the user the result.

    Returns:
        the manifest with the result, its figures, and a note of them.

    Raises:
        ExportError: the artifact is not what it should be.
        ResourceError: it was cut short because the disk is full.
    """
    from normistral.export import openvino
    from normistral.export.onnx import signature as onnx_signature
    from normistral.export.verify.weights import ArtifactMatrices  # imports onnx

    checkpoint, folder, progress = job.checkpoint, job.staging.artifact, job.progress
    with progress.stage("verifying the files"):
        if manifest.format == "onnx":
            onnx_signature.check_structure(folder, manifest)
        else:
            openvino.check_structure(folder, manifest.architecture)
        check_config(folder, checkpoint.folder)
        check_tokenizer(folder, checkpoint)
        check_template(manifest, checkpoint)
        matrices = ArtifactMatrices(folder, manifest, checkpoint)
        quality = {**checkpoint.checks, "matrices": float(matrices.check())}
    read = "the same tokenizer, template and matrices"
    small = fits_for_running(manifest.architecture)  # asked once: what is free changes meanwhile
    if estimate_run_bytes(manifest, small=small) > available_memory_bytes():
        progress.note(f"quality check passed in part: {read} as the original; too large to run here")
        notes = (*manifest.notes, f"verified: {read}; too large to run here")
        return replace(manifest, verified="read", quality=quality, notes=notes)
    reference = run_checkpoint(checkpoint, job.probe_ids, progress)
    expected = run_checkpoint(checkpoint, job.probe_ids, progress, matrices.read)
    with progress.stage("verifying by running it"):
        logits = run_artifact(folder, manifest, job.probe_ids, small=small)
    quality |= compare_runs(manifest, logits, expected, reference)
    uniform_kl = compare_logits(reference, np.zeros_like(reference))[0]
    warning = f"; {quantization_warning(job.recipe)}" if quality["probe_kl_nats"] > _WARNING_SHARE * uniform_kl else ""
    progress.note(
        f"quality check passed: {read} as the original, and the same first choice for "
        f"{quality['probe_top1_agreement']:.0%} of {len(reference)} tokens of a fixed text{warning}"
    )
    note = (
        f"verified: {read}; computes what transformers does with them ({quality['graph_error']:.1g} of the logits' "
        f"spread), step by step as at once; {quality['probe_kl_nats']:.2g} nats from the checkpoint and the same first "
        f"choice at {quality['probe_top1_agreement']:.0%} of {len(reference)} tokens of a fixed text{warning}"
    )
    return replace(manifest, verified="run", quality=quality, notes=(*manifest.notes, note))


def quantization_warning(recipe: Recipe) -> str:
    """Warning that quantization costs a great deal, with what this recipe leaves to try."""
    finer = f"--weights {'int8' if recipe.weights == 'int4' else 'fp16'}"
    others = "" if recipe.recipe_name == "best" else ", or --recipe best"
    return f"this rounding costs the model a great deal: think of {finer}{others}"


def run_checkpoint(
    checkpoint: Checkpoint, token_ids: list[int], progress: Progress, matrices: MatrixReader | None = None
) -> Logits:
    """Run a checkpoint of any size layer by layer, with `matrices` in place of its own if they are given."""
    token_ids = token_ids[:PROBE_TOKENS]
    window = Window((*token_ids, token_ids[0]), 0, len(token_ids))  # the last one is a target and is not fed
    (logits,) = LayeredModel(checkpoint, progress, matrices=matrices).predict([window])
    return logits


def is_run_layered(manifest: Manifest, *, small: bool) -> bool:
    """Whether the artifact is run layer by layer: a fused ONNX graph of a model that is not small."""
    return manifest.recipe.graph == "fused" and not small


def estimate_run_bytes(manifest: Manifest, *, small: bool) -> int:
    """Memory that `run_artifact` takes."""
    if is_run_layered(manifest, small=small):
        return estimate_layered_bytes(manifest.architecture)
    return estimate_running_bytes(manifest)


def run_artifact(folder: Path, manifest: Manifest, token_ids: list[int], *, small: bool) -> Logits:
    """Run the artifact with exact arithmetic: logits [n, vocabulary], the same fed at once and in parts.

    Args:
        small: the model `fits_for_running`.

    Raises:
        ExportError: it cannot be run, or computes something else step by step.
    """
    token_ids = token_ids[:PROBE_TOKENS]
    parts = split_in_turns(token_ids, _ANSWER_TOKENS if small else _ANSWER_TOKENS_OF_LARGE)
    try:
        if is_run_layered(manifest, small=small):
            from normistral.export.verify.layered_onnx import run_layered

            at_once, in_parts = run_layered(folder, manifest, [[token_ids], parts])
        else:
            at_once, in_parts = run_engine(load_exact(folder, manifest), token_ids, parts)
    except EngineError as exc:
        raise ExportError(f"the written model cannot be run: {exc.message}", exc.hint) from exc
    require_same_in_parts(at_once, in_parts, _STEP_TOLERANCE[_arithmetic(manifest)])
    return at_once


def compare_runs(manifest: Manifest, logits: Logits, expected: Logits, reference: Logits) -> dict[str, float]:
    """The figures; raises ExportError with those that are beyond their bounds.

    Args:
        logits: the artifact's.
        expected: transformers' with the artifact's matrices.
        reference: transformers' with the checkpoint's.
    """
    error = float(np.abs(logits - expected).max() / np.ptp(expected))
    kl, agreement = compare_logits(reference, logits)
    tolerance = _GRAPH_TOLERANCE[_arithmetic(manifest)]
    if not error <= tolerance:
        raise ExportError(
            f"the written model does not compute what transformers does with the same weights: logits differ by "
            f"{error:.2g} of their spread, at most {tolerance:g} allowed ({kl:.3g} nats from the checkpoint)",
            "the exporter has a bug: report it, with the model's config.json",
        )
    if manifest.recipe.weights in ("fp16", "fp32") and not kl <= _FLOAT_KL_LIMIT:
        raise ExportError(
            f"the written model does not compute what the checkpoint does: {kl:.3g} nats apart, "
            f"at most {_FLOAT_KL_LIMIT:g} allowed",
            "the exporter has a bug: report it, with the model's config.json",
        )
    return {
        "graph_error": error,
        "probe_kl_nats": kl,
        "probe_top1_agreement": agreement,
        "probe_tokens": float(len(reference)),
    }


def load_exact(folder: Path, manifest: Manifest) -> Backend:
    """The artifact in its own engine, on the CPU, with reference arithmetic."""
    return load_backend(Artifact(folder, manifest), EngineConfig(exact=True))


def _arithmetic(manifest: Manifest) -> str:
    """An ONNX model of float16 weights computes in float16."""
    return "float16" if manifest.format == "onnx" and manifest.recipe.weights == "fp16" else "float32"


def run_engine(backend: Backend, token_ids: list[int], parts: list[list[int]]) -> tuple[Logits, Logits]:
    """Logits [n, vocabulary] of all tokens at once, and fed in parts; closes the backend."""
    try:
        engine = backend.create_engine()
        at_once = engine.forward(token_ids, last=len(token_ids))
        engine.reset()
        in_parts = np.concatenate([engine.forward(part, last=len(part)) for part in parts])
        engine.close()
    finally:
        backend.close()
    return at_once, in_parts


def require_same_in_parts(at_once: Logits, in_parts: Logits, tolerance: float) -> None:
    """Raise ExportError for logits that are no numbers, or that depend on how the tokens were fed.

    Args:
        tolerance: allowed difference as a share of the largest logit.
    """
    apart = float(np.max(np.abs(in_parts - at_once)))
    scale = float(np.max(np.abs(at_once)))
    if not np.isfinite(scale):
        raise ExportError(
            "the written model computes logits that are not numbers, from weights that are",
            "its layers reach beyond the type that computes them, float16 for fp16 in ONNX: use int8, int4 or fp32",
        )
    if not apart <= tolerance * scale:
        raise ExportError(
            f"the written model computes step by step other logits than at once: {apart:.3g} of {scale:.3g}",
            "weights far larger than usual make sums depend on their order: look for such in the checkpoint; if there "
            "are none, the exporter has a bug: report it",
        )


def split_in_turns(token_ids: list[int], answer: int) -> list[list[int]]:
    """Split token ids like a conversation: a prompt, an answer token by token, a second prompt."""
    start = (len(token_ids) - answer) // 2
    stop = start + answer
    if start < 1:
        return [[token] for token in token_ids]
    return [token_ids[:start], *([token] for token in token_ids[start:stop]), token_ids[stop:]]


def choose_failed_place(output: Path, *, verify: bool) -> Path:
    """Where an artifact that fails its verification is kept.

    Raises:
        UsageError: nothing can fail without verification, or something stands there.
    """
    if not verify:
        raise UsageError("without verification nothing fails that could be kept", "leave out --keep-failed")
    place = output.absolute().with_name(f"{output.name}.failed")
    if os.path.lexists(place):
        raise UsageError(f"{place} exists already", "remove or rename it, or leave out --keep-failed")
    return place


def verify_or_keep(job: ExportJob, manifest: Manifest, failed_place: Path | None) -> Manifest:
    """As `verify_artifact`; an artifact that fails is moved to `failed_place`, or left where that is None."""
    try:
        verified = verify_artifact(job, manifest)
    except ExportError as failure:
        if failed_place is not None:
            notes = (*manifest.notes, f"failed its verification: {failure.message}")
            write_manifest(job.staging.artifact, replace(manifest, verified="failed", notes=notes))
            job.staging.artifact.rename(failed_place)
            failure.hint = f"what was written is kept as {failed_place}; {failure.hint}"
        raise
    logger.info(verified.notes[-1])
    return verified


# Compared by its two long lists apart: those are where something goes missing unnoticed.
_MODEL_LISTS = ("vocab", "merges")


def check_config(folder: Path, checkpoint: Path) -> None:
    """config.json has the checkpoint's fields, with the checkpoint's values.

    Raises:
        ExportError: naming the first field that differs.
    """
    _compare("config.json", read_json(checkpoint / "config.json"), read_json(folder / "config.json"))


def check_tokenizer(folder: Path, checkpoint: Checkpoint) -> None:
    """The artifact has the tokenizer's files whose ids were compared with transformers', unchanged.

    Args:
        folder: of the artifact.

    Raises:
        ExportError: naming the part of tokenizer.json or the file that differs.
    """
    expected, found = read_json(checkpoint.folder / "tokenizer.json"), read_json(folder / "tokenizer.json")
    for name in _MODEL_LISTS:
        _compare_list(name, expected.get("model", {}).get(name), found.get("model", {}).get(name))
    _compare("tokenizer.json", expected, found)
    for file in checkpoint.tokenizer_files:
        if file.read_bytes() != (folder / file.name).read_bytes():
            raise ExportError(f"the artifact's {file.name} is not the checkpoint's", CAUSE)


def check_template(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """The manifest has the template that was compared with transformers'.

    Raises:
        ExportError: quoting where they part.
    """
    if manifest.template == checkpoint.template:
        return
    ours, theirs = ("" if one is None else one.text for one in (manifest.template, checkpoint.template))
    raise ExportError(f"the artifact's chat template is not the checkpoint's: {first_difference(ours, theirs)}", CAUSE)


def _compare_list(name: str, expected: Any, found: Any) -> None:
    """The vocabulary (token to id, or pairs with scores), or the merges."""
    left, right = _entries(expected), _entries(found)
    if left == right:
        return
    missing = next((entry for entry in left if entry not in right), None)
    extra = next((entry for entry in right if entry not in left), None)
    if missing is not None:
        what = f"lacks {shorten(missing)}"
    elif extra is not None:
        what = f"also has {shorten(extra)}"
    else:
        entry = next(entry for entry in left if left[entry] != right[entry])
        what = f"has {shorten(entry)} at {shorten(right[entry])} instead of {shorten(left[entry])}"
    raise ExportError(
        f"tokenizer.json: the artifact's {name} {what} ({len(right)} entries, the checkpoint has {len(left)})", CAUSE
    )


def _entries(content: Any) -> dict[Any, Any]:
    """Entry -> its place: an id, or the position in the list."""
    if isinstance(content, Mapping):
        return dict(content)
    items: Iterable[Any] = content if isinstance(content, list) else ()
    return {tuple(item) if isinstance(item, list) else item: place for place, item in enumerate(items)}


def _compare(where: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for field in [*expected, *(name for name in found if name not in expected)]:
        if expected.get(field) != found.get(field) or (field in expected) != (field in found):
            raise ExportError(
                f"{where}: the artifact's {field} is {shorten(found.get(field))}, "
                f"the checkpoint's {shorten(expected.get(field))}",
                CAUSE,
            )
