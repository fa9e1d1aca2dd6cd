"""An export as a story: locate → open → convert → compress → save → verify → manifest → move into place.

Each step lives in a file of its own; this one only puts them in order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from normistral.errors import ExportError, ResourceError, UsageError
from normistral.export import openvino, verify
from normistral.export.checkpoint import Checkpoint, hash_sources, open_checkpoint
from normistral.export.companions import copy_companions, folder_bytes, tool_versions
from normistral.export.locate import locate
from normistral.export.progress import NoProgress, Progress
from normistral.export.recipe import (
    GROUP_SIZES,
    Recipe,
    choose_group_size,
    choose_recipe,
    describe_recipe,
    input_widths,
    record_recipe,
)
from normistral.export.resources import MemoryMeter, check_resources, estimate_needs
from normistral.export.staging import Staging, check_output, stage
from normistral.export.tokenizer_ir import load_tokenizer, save_tokenizer_ir, tokenizer_ir_differs
from normistral.manifest import Manifest, Source, hash_files, write_manifest
from normistral.quiet import silence_telemetry
from normistral.store import default_output


def export_model(
    model: str,
    output: str | Path | None = None,
    format: str = "openvino",
    weights: str = "int4",
    *,
    force: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    **recipe: Any,
) -> Manifest:
    """Turn a checkpoint into an artifact folder.

    Args:
        model: a preset, a hub id, a folder, or a .gguf file.
        output: the folder to make; None takes a name in the local store.
        format: "openvino".
        weights: "int4", "int8" or "fp16".
        force: replace an artifact that is there already, once the new one is whole.
        revision: branch, tag or commit of a hub model.
        progress: receives stages and notes; None shows nothing.
        recipe: the other fields of `normistral.export.recipe.Recipe`.

    Raises:
        UsageError: an impossible option, or OUTPUT exists.
        ModelNotFoundError, DownloadError, CheckpointError: the model cannot be had or is damaged.
        MissingExtraError: the extra `export` is not installed.
        ResourceError: too little disk or memory.
        ExportError: the conversion failed, or what it gave does not compute what the model computes.
    """
    started = time.perf_counter()
    choice = choose_recipe(weights, recipe)
    if format != "openvino":
        hint = "use --format openvino" if format != "onnx" else "ONNX comes with a later version; use --format openvino"
        raise UsageError(f"format {format!r} cannot be exported", hint)
    output = default_output(model, weights, format) if output is None else Path(output)
    progress = NoProgress() if progress is None else progress
    check_output(output, force=force)
    silence_telemetry()
    with MemoryMeter() as meter, _translate_system_errors():
        openvino.find_export_tools()
        located = locate(model, revision=revision, progress=progress)
        with progress.stage("starting the export tools"):
            openvino.require_export_tools()
        with stage(output, force=force) as staging, openvino.quiet_tools():
            checkpoint = open_checkpoint(located, staging.workspace, progress=progress)
            with _beside(partial(hash_sources, checkpoint)) as source:
                manifest = _make_artifact(checkpoint, source, choice, staging, output, progress)
    peak = "" if meter.peak_bytes is None else f", peak memory {meter.peak_bytes / 2**30:.1f} GiB"
    progress.note(f"{output}: {manifest.total_bytes / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s{peak}")
    return manifest


def _make_artifact(
    checkpoint: Checkpoint,
    source: Future[Source],
    recipe: Recipe,
    staging: Staging,
    output: Path,
    progress: Progress,
) -> Manifest:
    """Fill `staging.artifact`, manifest last."""
    group_size = choose_group_size(checkpoint.architecture, recipe.group_size)
    check_resources(output, estimate_needs(checkpoint.architecture, recipe, group_size))
    made = [f"weights: {describe_recipe(recipe, group_size)}"]
    if recipe.weights == "int4" and recipe.group_size is None and group_size != GROUP_SIZES[0]:
        widths = ", ".join(map(str, input_widths(checkpoint.architecture)))
        made.append(f"group size {GROUP_SIZES[0]} does not divide all of the model's widths {widths}")
    for note in made:
        progress.note(note)

    tokenizer = load_tokenizer(checkpoint.folder)
    token_ids = list(tokenizer(verify.PROBE_TEXT)["input_ids"])
    reference = _make_weights(checkpoint, recipe, group_size, staging, token_ids, progress)
    template = None if checkpoint.template is None else checkpoint.template.text
    with progress.stage("writing tokenizer and configuration"):
        save_tokenizer_ir(tokenizer, staging.artifact, template)
        copy_companions(checkpoint, staging.artifact)
    with progress.stage("verifying"):
        proof = verify.verify(staging.artifact / openvino.IR_NAME, checkpoint.architecture, recipe.weights, reference)
        made.append(proof.note)
        progress.note(proof.note)
        if tokenizer_ir_differs(tokenizer, staging.artifact, verify.PROBE_TEXT):
            made.append(
                "the OpenVINO tokenizer splits text differently than the checkpoint's; this package's own does not"
            )
            progress.note(made[-1])
    with progress.stage("hashing", total=folder_bytes(staging.artifact), unit="bytes") as hashing:
        files = hash_files(staging.artifact, hashing.advance)
    manifest = Manifest(
        format="openvino",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source.result(),
        role=checkpoint.role,
        architecture=checkpoint.architecture,
        context_length=checkpoint.context_length,
        recipe=record_recipe(recipe, group_size),
        stop_token_ids=checkpoint.stop_token_ids,
        bos_token_id=checkpoint.bos_token_id,
        adds_bos=checkpoint.adds_bos,
        template=checkpoint.template,
        sampling=checkpoint.sampling,
        files=files,
        tools=tool_versions(),
        quality=proof.quality,
        notes=(*checkpoint.notes, *made),
    )
    write_manifest(staging.artifact, manifest)
    return manifest


def _make_weights(
    checkpoint: Checkpoint,
    recipe: Recipe,
    group_size: int,
    staging: Staging,
    token_ids: list[int],
    progress: Progress,
) -> verify.Reference | None:
    """Write the IR; torch and its memory-mapped weights are let go of on return.

    Returns:
        what the model itself computes for `token_ids`, or None when it is too large to run.
    """
    with progress.stage("loading the model"):
        model = openvino.load_model(checkpoint.folder, checkpoint.dtype)
        reference = None
        if verify.fits_for_running(checkpoint.architecture):
            reference = verify.compute_reference(model, token_ids)
    if recipe.weights == "fp16":
        with progress.stage("rounding to float16"):
            openvino.round_to_float16(model, staging.workspace / "float16")
    with progress.stage("converting to OpenVINO"):
        graph = openvino.convert(model)
    if recipe.weights != "fp16":
        with progress.stage(f"compressing to {recipe.weights}") as compressing:
            graph = openvino.compress(graph, recipe, group_size, compressing)
    with progress.stage("saving"):
        openvino.save(graph, staging.artifact, recipe)
    return reference


@contextmanager
def _beside(work: Callable[[Callable[[int], None]], Source]) -> Iterator[Future[Source]]:
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


@contextmanager
def _translate_system_errors() -> Iterator[None]:
    """What no step expected of the operating system: say it in one line."""
    try:
        yield
    except MemoryError as exc:
        raise ResourceError("the memory is used up", "close other programs, or export on a larger machine") from exc
    except OSError as exc:
        where = f"{exc.filename}: " if exc.filename else ""
        raise ExportError(f"{where}{exc.strerror or exc}", "see that the disk is there and may be written") from exc
