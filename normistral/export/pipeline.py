"""Export pipeline: locate → open → auxiliary files → calibrate → model → hash → verify → manifest → move into place.

Tokenizer and template are opened, compared with transformers and written before the first weight is read.

Each stage has a file of its own; this one puts them in order.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from normistral.artifact.card import write_card
from normistral.artifact.manifest import Manifest, RecipeRecord, Source, hash_files, write_manifest
from normistral.artifact.store import default_output, folder_bytes
from normistral.errors import ExportError, ResourceError
from normistral.export import openvino
from normistral.export.checkpoint.chat_templates import read_template_file
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import hash_sources, open_checkpoint
from normistral.export.job import ExportJob
from normistral.export.quantize.kept_layers import (
    KeptLayers,
    discard_kept,
    fingerprint,
    leave_kept,
)
from normistral.export.quantize.plan import (
    SENSITIVITY_TOKENS,
    QuantPlan,
    calibration_sha256,
    calibration_windows,
    choose_plan,
    list_by_kind,
)
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.quantize.weight_values import read_magnitudes, require_range
from normistral.export.recipe import (
    choose_recipe,
    describe_choices,
    record_recipe,
)
from normistral.export.reference.model import PROBE_TEXT
from normistral.export.resources import (
    MemoryMeter,
    check_resources,
    check_tools_memory,
    estimate_needs,
    predict_calibration_s,
)
from normistral.export.staging import check_output, stage
from normistral.export.tools import find_export_tools, quiet_tools, require_export_tools, tool_versions
from normistral.export.verify.artifact import choose_failed_place, verify_or_keep
from normistral.export.verify.weights import check_rotary_buffers
from normistral.hardware import plan_threads, read_machine
from normistral.progress import NoProgress, Progress
from normistral.telemetry import silence_telemetry

logger = logging.getLogger(__name__)


def export_model(
    model: str,
    output: str | Path | None = None,
    format: str = "openvino",
    weights: str = "int4",
    *,
    force: bool = False,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    ignore_fields: Sequence[str] = (),
    verify: bool = True,
    keep_failed: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    **recipe: Any,
) -> Manifest:
    """Turn a checkpoint into an artifact folder.

    Args:
        model: a preset, a hub id, a folder, or a .gguf file.
        output: the folder to make; None takes a name in the local store.
        format: "openvino" or "onnx".
        weights: "int4", "int8", "fp16", or for ONNX "fp32".
        force: replace an artifact that is there already, once the new one is whole.
        revision: branch, tag or commit of a hub model.
        chat_template: a file of jinja that takes the place of the checkpoint's chat template.
        ignore_fields: fields of config.json or generation_config.json, or keys of a .gguf file, that would be refused
            because they may change what the model computes; the manifest names them.
        verify: compare the artifact with the checkpoint; otherwise the manifest says that it was not verified.
        keep_failed: keep an artifact that fails this as OUTPUT.failed; otherwise nothing stays.
        restart: throw away the layers that an interrupted export to this `output` kept; otherwise it goes on with them.
        progress: receives stages and notes; None shows nothing.
        recipe: the other fields of `normistral.export.recipe.Recipe`.

    Raises:
        UsageError: an impossible option, or OUTPUT exists.
        ModelNotFoundError, DownloadError, CheckpointError: the model cannot be had or is damaged.
        MissingExtraError: the extra `export` is not installed, or for ONNX the extra `onnx`.
        ResourceError: too little disk or memory.
        ExportError: the conversion failed, or what it gave is not what the checkpoint is.
    """
    started = time.perf_counter()
    choice = choose_recipe(format, weights, recipe)
    output = default_output(model, weights, format) if output is None else Path(output)
    progress = NoProgress() if progress is None else progress
    check_output(output, force=force)
    failed_place = choose_failed_place(output, verify=verify) if keep_failed else None
    template = None if chat_template is None else read_template_file(Path(chat_template))
    silence_telemetry()
    with MemoryMeter() as meter, _translate_system_errors():
        find_export_tools(choice.format)
        check_tools_memory()
        located = locate(model, revision=revision, ignore_fields=ignore_fields, progress=progress)
        with progress.stage("starting the export tools"):
            require_export_tools(choice.format)
        with stage(output, force=force) as staging, leave_kept(staging.kept, progress), quiet_tools(choice.format):
            checkpoint = open_checkpoint(
                located,
                staging.workspace,
                progress=progress,
                chat_template=template,
                ignore_fields=ignore_fields,
            )
            job = ExportJob.settle(checkpoint, choice, staging, progress)
            manifest = _make_artifact(job, output, verify=verify, failed_place=failed_place, restart=restart)
    took, size = _in_words(time.perf_counter() - started), manifest.total_bytes
    written = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
    if meter.peak_bytes is None:
        progress.note(f"{output} is ready: {written}, in {took}")
    else:
        peak = meter.peak_bytes / 2**30
        progress.note(f"{output} is ready: {written}, in {took}, peak memory {peak:.1f} GiB")
    return manifest


def _make_artifact(job: ExportJob, output: Path, *, verify: bool, failed_place: Path | None, restart: bool) -> Manifest:
    """Fill `job.staging.artifact`, manifest last."""
    checkpoint, recipe, progress, artifact = job.checkpoint, job.recipe, job.progress, job.staging.artifact
    _require_resources(job, output)
    choices = list(
        describe_choices(checkpoint.architecture, checkpoint.context_length, recipe, job.group_size, job.context_length)
    )
    logger.info(choices[0])
    for note in choices[1:]:
        progress.note(note)

    with progress.stage("writing tokenizer and configuration"):
        found = _write_auxiliary_files(job)
    check_rotary_buffers(checkpoint)
    with _in_background(partial(hash_sources, checkpoint)) as hashed:
        with progress.stage("reading the weights", checkpoint.weight_bytes, "bytes") as reading:
            require_range(read_magnitudes(checkpoint, reading.advance), checkpoint, recipe)
        quantized, record = _calibrate(job, restart=restart)
        if recipe.format == "onnx":
            from normistral.export.onnx.artifact import write_model
        else:
            from normistral.export.openvino import write_model
        write_model(job, quantized)
        with progress.stage("hashing", total=folder_bytes(artifact), unit="bytes") as hashing:
            files = hash_files(artifact, hashing.advance)
        source = hashed.result()
    manifest = Manifest(
        format=recipe.format,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        role=checkpoint.role,
        architecture=checkpoint.architecture,
        context_length=job.context_length,
        recipe=record,
        stop_token_ids=checkpoint.stop_token_ids,
        bos_token_id=checkpoint.bos_token_id,
        adds_bos=checkpoint.adds_bos,
        template=checkpoint.template,
        sampling=checkpoint.sampling,
        files=files,
        tools=tool_versions(recipe.format),
        reasoning=checkpoint.reasoning,
        ignored_fields=checkpoint.ignored_fields,
        added_tokens=checkpoint.added_tokens,
        notes=(*checkpoint.notes, *choices, *found),
    )
    for note in found:
        progress.note(note)
    if verify:
        try:
            manifest = verify_or_keep(job, manifest, failed_place)
        except ExportError:
            discard_kept(job.staging.kept, "what was made of them failed its verification", progress)
            raise
    else:
        progress.note("not verified: --no-verify")
        manifest = replace(manifest, verified="no", notes=(*manifest.notes, "not verified, as asked"))
    write_card(artifact, manifest, output.name)
    write_manifest(artifact, manifest)
    return manifest


def _require_resources(job: ExportJob, output: Path) -> None:
    architecture, recipe = job.checkpoint.architecture, job.recipe
    if_fast = None
    if recipe.recipe_name != "fast" and not recipe.is_mixed:
        if_fast = estimate_needs(architecture, replace(recipe, recipe="fast"), job.group_size)
    needs = estimate_needs(architecture, recipe, job.group_size)
    kept = folder_bytes(job.staging.kept)  # used, or thrown away
    check_resources(output, replace(needs, disk=max(0, needs.disk - kept)), if_fast)


def _calibrate(job: ExportJob, *, restart: bool) -> tuple[QuantizedTensorStore | None, RecipeRecord]:
    """Quantize the layers' matrices with calibration texts, into the folder that an interruption keeps.

    Returns:
        the matrices, None for a recipe that needs no calibration; and the recipe for the manifest.
    """
    checkpoint, progress = job.checkpoint, job.progress
    record = record_recipe(job.recipe, job.group_size)
    plan = choose_plan(job.recipe, job.group_size)
    if plan is None:
        discard_kept(job.staging.kept, f"the recipe {job.recipe.recipe_name} needs none", progress)
        return None, record
    from normistral.export.quantize.calibrate import calibration_dtype, fast_matmul, quantize_layers

    windows = calibration_windows(lambda text: list(checkpoint.tokenizer(text)["input_ids"]), job.context_length)
    made_of = fingerprint(checkpoint, plan, windows, tool_versions(job.recipe.format), calibration_dtype())
    layers = checkpoint.architecture.layers
    kept = KeptLayers.open(job.staging.kept, made_of, layers, restart=restart, progress=progress)
    left = layers - kept.done
    tokens, in_int8 = sum(map(len, windows)), kept.in_int8 or frozenset()
    with fast_matmul():
        if left:
            seconds = predict_calibration_s(checkpoint.architecture, plan, plan_threads(read_machine())) * left / layers
            progress.note(
                f"the recipe {job.recipe.recipe_name} tries its rounding on sample texts: very roughly "
                f"{_in_words(seconds)} on this machine; --recipe fast goes without"
            )
        if job.recipe.is_mixed and kept.in_int8 is None:
            in_int8 = _select_int8(job, plan, windows)
            kept.keep_in_int8(in_int8)
        with progress.stage(f"rounding on sample texts ({tokens:,} tokens)", left, "layers") as stage:
            quantize_layers(checkpoint, plan, windows, kept.tensors, stage, in_int8, kept)
    return kept.tensors, replace(
        record,
        calibration_sha256=calibration_sha256(),
        calibration_tokens=tokens,
        eight_bits=list_by_kind(in_int8, checkpoint.family.layer_prefix) if job.recipe.is_mixed else None,
    )


def _select_int8(job: ExportJob, plan: QuantPlan, windows: list[list[int]]) -> frozenset[str]:
    """Names of the matrices that take 8 bits in a mixed-precision recipe."""
    from normistral.export.quantize.sensitivity import measure_sensitivity, select_int8

    some = windows[: max(1, SENSITIVITY_TOKENS // len(windows[0]))]
    tokens, passes = sum(map(len, some)), 2 * job.checkpoint.architecture.layers
    with job.progress.stage(f"finding which weights need 8 bits, on {tokens:,} tokens", passes, "layers") as stage:
        return select_int8(measure_sensitivity(job.checkpoint, plan, some, stage), plan.ratio)


def _write_auxiliary_files(job: ExportJob) -> list[str]:
    """Write configuration and tokenizer beside the weights. Returns notes."""
    checkpoint, folder = job.checkpoint, job.staging.artifact
    configurations = [checkpoint.folder / "config.json", checkpoint.folder / "generation_config.json"]
    for file in (*configurations, *checkpoint.tokenizer_files):
        shutil.copyfile(file, folder / file.name)  # follows links
    if job.recipe.format == "onnx":
        from normistral.export.onnx.artifact import write_genai_config

        write_genai_config(job)
        return []
    template = None if checkpoint.template is None else checkpoint.template.text
    openvino.save_tokenizer_ir(checkpoint.tokenizer, folder, template)
    if openvino.tokenizer_ir_differs(checkpoint.tokenizer, folder, PROBE_TEXT):
        return ["the OpenVINO tokenizer splits text differently than the checkpoint's; this package's own does not"]
    return []


@contextmanager
def _in_background(work: Callable[[Callable[[int], None]], Source]) -> Iterator[Future[Source]]:
    """Run `work` in a thread while the block runs; it is stopped, at its next report of bytes, when the block ends."""
    stopping = threading.Event()

    def stop_if_asked(count: int) -> None:
        if stopping.is_set():
            raise CancelledError

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="export") as executor:
        try:
            yield executor.submit(work, stop_if_asked)
        finally:
            stopping.set()


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def _translate_system_errors() -> Iterator[None]:
    """Translate errors of the operating system that no stage has translated."""
    try:
        yield
    except MemoryError as exc:
        raise ResourceError("the memory is used up", "close other programs, or export on a larger machine") from exc
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        raise ExportError(f"{where}{exc.strerror or exc}", "see that the disk is there and may be written") from exc
