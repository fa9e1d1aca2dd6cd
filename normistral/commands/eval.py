"""`normistral eval`: measures how well an artifact predicts a text, alone and beside a reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normistral.artifact import store
from normistral.artifact.extra_files import Repeat, read_origin, write_origin
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.artifact.presets import PRESETS
from normistral.commands import console
from normistral.commands.console import format_columns
from normistral.commands.find_artifact import find
from normistral.commands.info import describe_weights
from normistral.commands.options import ArtifactName, Debug, EngineArgs, JsonFile, OptionGroup
from normistral.commands.progress import show_progress
from normistral.commands.result_files import require_distinct, require_result_place, show_result
from normistral.errors import UsageError
from normistral.progress import Progress

if TYPE_CHECKING:
    from normistral.artifact.artifact import Artifact
    from normistral.evaluation.metrics import Estimate
    from normistral.evaluation.quality import Evaluation, ReferenceModel


@dataclass(frozen=True, slots=True)
class EvalArgs(OptionGroup):
    """Options of an evaluation and of its results."""

    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Text to predict, in UTF-8.", show_default=False)]
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare with this checkpoint in float32 (named as for export), or with another artifact.",
        ),
    ] = None
    windows: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="sliding: every token is scored once. llama.cpp: as its perplexity tool does it."
        ),
    ] = "sliding"
    window_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Length of a window. Default: 512, or the context if that is less.")
    ] = None
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens that a sliding window scores. Default: half the window.")
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after the window that brings the scored tokens to N.")
    ] = None
    reference_cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keeps the reference's predictions. Default: a file in the store's cache."),
    ] = None
    ignore_field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="As in `normistral export`, for a checkpoint as --reference; may be repeated."
        ),
    ] = None
    json_file: JsonFile = None


def evaluate(
    artifact: ArtifactName,
    *,
    options: EvalArgs,
    engine: EngineArgs,
    debug: Debug = False,
) -> None:
    """Measure how well an artifact predicts a text.

    Perplexity; with --reference also KL divergence and top-1 agreement: how far it is from another artifact or from the
    checkpoint. A reference is computed once; a run that was stopped goes on where it was.
    """
    console.require_stdout()
    from normistral.artifact.artifact import Artifact
    from normistral.evaluation import quality
    from normistral.evaluation.windows import read_text

    config = engine.config
    _check_options(options)
    text = read_text(options.text)
    opened = Artifact.open(find(artifact))
    plan = quality.EvaluationPlan(
        windows=options.windows,
        window_tokens=options.window_tokens,
        stride=options.stride,
        max_tokens=options.max_tokens,
        reference_cache=options.reference_cache,
        engine=config,
    )
    with show_progress() as progress:
        opening = None if options.reference is None else partial(_open_reference, options, progress)
        result = quality.evaluate(opened, text, plan, progress, opening, _cache_folder())
    remember_repeat(opened, options, result)
    document = _document(opened.folder, options, engine, result)
    show_result(document, _lines(opened.folder, options, result), options.json_file)


def remember_repeat(artifact: Artifact, options: EvalArgs, result: Evaluation) -> None:
    """Note in the copy of a published artifact how it compares with the checkpoint; `info` shows it."""
    origin, compared = read_origin(artifact.folder), result.quality.comparison
    if origin is None or compared is None or options.reference is None or _is_artifact(options.reference):
        return
    figures = compared.kl_mean.value, compared.top1_agreement.value
    repeat = Repeat(options.reference, *figures, result.quality.tokens, datetime.now(UTC).date().isoformat())
    with suppress(OSError):  # a store that is read-only: the figures are shown all the same
        write_origin(artifact.folder, replace(origin, repeat=repeat))


def _is_artifact(reference: str) -> bool:
    """Whether --reference names an artifact; a preset's name always means the preset."""
    is_preset = any(preset.name == reference for preset in PRESETS)
    folders = [Path(reference), store.artifacts_dir() / reference]
    return not is_preset and any((folder / MANIFEST_NAME).is_file() for folder in folders)


def _check_options(options: EvalArgs) -> None:
    for name, value in (("--reference-cache", options.reference_cache), ("--ignore-field", options.ignore_field)):
        if value and options.reference is None:
            raise UsageError(f"{name} means nothing without --reference", "leave it out, or add --reference")
    json_file = None if options.json_file in (None, "-") else Path(options.json_file or "")
    if json_file is not None:
        require_result_place(json_file, "--json")
    require_distinct({"--text": options.text, "--reference-cache": options.reference_cache, "--json": json_file})


def _open_reference(options: EvalArgs, progress: Progress) -> AbstractContextManager[ReferenceModel]:
    """An artifact where there is one of that name, else a checkpoint; a preset's name always means the preset."""
    from normistral.evaluation.quality import artifact_reference

    reference = options.reference or ""
    if _is_artifact(reference):
        if options.ignore_field:
            raise UsageError(
                f"--ignore-field means nothing here: {reference} is an artifact", "leave it out, or name a checkpoint"
            )
        return nullcontext(artifact_reference(store.resolve_artifact(reference)))
    from normistral.export.reference.layerwise import checkpoint_reference

    return checkpoint_reference(reference, _cache_folder(), progress, options.ignore_field or ())


def _cache_folder() -> Path:
    return store.cache_dir() / "references"


def _document(folder: Path, options: EvalArgs, engine: EngineArgs, result: Evaluation) -> dict[str, Any]:
    figures = asdict(result.quality)
    text = result.text
    return {
        "artifact": folder.name,
        "format": result.manifest.format,
        "weights": describe_weights(result.manifest.recipe),
        "device": engine.device,
        "exact": engine.exact,
        "settings": result.engine.settings,
        "basis": result.engine.settings_source,
        "given": list(result.engine.overrides),
        "reference": options.reference,
        "text": {"sha256": text.sha256, "tokens": len(text.token_ids), "bytes": int(text.nbytes.sum())},
        "windows": asdict(result.settings) | {"count": result.windows},
        "scored_tokens": figures.pop("tokens"),
        "scored_bytes": figures.pop("nbytes"),
        **figures,
    }


def _lines(folder: Path, options: EvalArgs, result: Evaluation) -> Iterator[str]:
    manifest, settings, quality, in_use = result.manifest, result.settings, result.quality, result.engine
    arithmetic = {"exact": "exact", "rule": "default settings", "tuned": "tuned settings"}[in_use.settings_source]
    arithmetic += "".join(f", {name}={in_use.settings[name]}" for name in in_use.overrides)
    stride = "" if settings.stride is None else f", stride {settings.stride}"
    bos = "" if settings.bos_id is None else ", each with its BOS"
    facts = [
        ("artifact", f"{folder.name}: {manifest.format}, {describe_weights(manifest.recipe)}; {arithmetic}"),
        ("text", f"{options.text.name}: {quality.tokens:,} tokens scored, {quality.nbytes:,} bytes"),
        ("windows", f"{result.windows} of {settings.length} tokens, {settings.convention}{stride}{bos}"),
    ]
    if options.reference is not None:
        facts.insert(1, ("reference", options.reference))
    yield format_columns(facts)
    yield ""
    rows = [
        ("perplexity of a token", *_figure(quality.perplexity, "{:.2f}")),
        ("perplexity of a byte", *_figure(quality.byte_perplexity, "{:.3f}")),
        ("bits for a byte", *_figure(quality.bits_per_byte, "{:.3f}")),
    ]
    if (compared := quality.comparison) is not None:
        rows += [
            ("reference's perplexity", *_figure(compared.reference_perplexity, "{:.2f}")),
            ("ratio of perplexities", *_figure(compared.perplexity_ratio, "{:.4f}")),
            ("difference, mean", *_figure(compared.kl_mean, "{:#.3g}")),
            ("difference, median", *_figure(compared.kl_median, "{:#.3g}")),
            ("difference, 99 % below", *_figure(compared.kl_p99, "{:#.3g}")),
            ("difference, largest", f"{compared.kl_max:#.3g}", ""),
            ("same first choice", *_figure(compared.top1_agreement, "{:.1%}")),
        ]
    known = quality.perplexity.low is not None
    yield format_columns([("", "", "95 % interval" if known else ""), *rows])
    if quality.comparison is not None:
        yield "difference: of the predictions from the reference's; 0 is none (KL divergence of a token, in nats)"
    if not known:
        yield "too few tokens for intervals"


def _figure(estimate: Estimate, pattern: str) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return pattern.format(estimate.value), ""
    return pattern.format(estimate.value), f"{pattern.format(estimate.low)} to {pattern.format(estimate.high)}"
