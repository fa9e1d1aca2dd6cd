"""The command `eval`: opens what is compared, one model in memory at a time, and shows the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normistral.artifact import store
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import MANIFEST_NAME, Manifest
from normistral.artifact.presets import PRESETS
from normistral.commands.console import format_columns, print_json, print_lines, say
from normistral.commands.info import describe_weights
from normistral.commands.interrupts import interrupts_win
from normistral.commands.progress import format_bytes, show_progress
from normistral.commands.result_files import require_result_place, write_result
from normistral.errors import UsageError
from normistral.evaluation.metrics import Estimate, Quality, summarise
from normistral.evaluation.reference_logits import ReferenceFile, ReferenceKey
from normistral.evaluation.score import (
    ModelPredictor,
    Reference,
    artifact_reference,
    make_key,
    score,
    take_windows,
    write_reference,
)
from normistral.evaluation.text import Text, read_text, tokenise
from normistral.evaluation.windows import Window, WindowSettings, choose_windows, cut
from normistral.progress import Progress
from normistral.runtime.engines.base import Capabilities


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What the user asked for; names as on the command line."""

    text: Path
    reference: str | None
    windows: str
    window_tokens: int | None
    stride: int | None
    max_tokens: int | None
    reference_cache: Path | None
    json: str | None
    exact: bool
    device: str
    settings: dict[str, str] = field(default_factory=dict)


def run_eval(artifact: str, options: EvalOptions) -> None:
    """Evaluate and print.

    Raises:
        NormistralError: whatever may go wrong; options are checked first.
    """
    _check_options(options)
    text = read_text(options.text)
    opened = Artifact.find(artifact)
    folder, manifest = opened.folder, opened.manifest
    ours = tokenise(text, opened.tokenizer)
    settings = choose_windows(
        options.windows,
        options.window_tokens,
        options.stride,
        context_length=manifest.context_length,
        bos_id=manifest.bos_token_id if manifest.adds_bos else None,
    )
    windows = take_windows(cut(ours.token_ids, settings), options.max_tokens)
    with show_progress() as progress, _predictions(options, manifest, text, ours, settings, windows, progress) as file:
        quality, in_use = _score(folder, windows, ours, file, options, progress)
    document = _document(folder, manifest, options, ours, settings, len(windows), quality, in_use)
    if options.json != "-":
        print_lines(_lines(folder, manifest, options, settings, len(windows), quality, in_use))
    if options.json == "-":
        print_json(document)
    elif options.json is not None:
        write_result(Path(options.json), json.dumps(document, ensure_ascii=False, indent=2) + "\n")


def _check_options(options: EvalOptions) -> None:
    if options.reference_cache is not None and options.reference is None:
        raise UsageError("--reference-cache means nothing without --reference", "leave it out, or add --reference")
    if options.json not in (None, "-"):
        require_result_place(Path(options.json or ""), "--json")


def _predictions(
    options: EvalOptions,
    manifest: Manifest,
    text: str,
    ours: Text,
    settings: WindowSettings,
    windows: Sequence[Window],
    progress: Progress,
) -> AbstractContextManager[ReferenceFile | None]:
    """The file of the reference's predictions, complete; nothing where there is no reference."""
    if options.reference is None:
        return nullcontext()
    with _open_reference(options.reference, progress) as reference:
        key = make_key(reference, manifest, text, ours, settings)
        file = ReferenceFile(options.reference_cache or _default_cache(key), key, windows)
        try:
            _complete(file, reference, progress)
        except BaseException:
            file.__exit__()
            raise
    return file


def _open_reference(reference: str, progress: Progress) -> AbstractContextManager[Reference]:
    """An artifact where there is one of that name, else a checkpoint; a preset's name always means the preset."""
    is_preset = any(preset.name == reference for preset in PRESETS)
    folders = [Path(reference), store.artifacts_dir() / reference]
    if not is_preset and any((folder / MANIFEST_NAME).is_file() for folder in folders):
        return nullcontext(artifact_reference(store.resolve_artifact(reference)))
    from normistral.export.reference.evaluation import checkpoint_reference

    return checkpoint_reference(reference, _cache_folder(), progress)


def _complete(file: ReferenceFile, reference: Reference, progress: Progress) -> None:
    missing = sum(window.scored for window in file.missing)
    if not missing:
        progress.note(f"the reference's predictions are in {file.path}")
        return
    if file.finished:
        progress.note(f"going on after window {file.finished} of {file.path}")
    try:
        with (
            interrupts_win(),
            reference.open() as predictor,
            progress.stage("reference", missing, "tokens") as stage,
        ):
            write_reference(file, predictor, stage.advance)
    except KeyboardInterrupt:
        say(f"{file.finished} windows are kept in {file.path}; the same command goes on from there")
        raise
    progress.note(f"the reference's predictions: {file.path}, {format_bytes(file.path.stat().st_size)}")


def _score(
    folder: Path,
    windows: Sequence[Window],
    text: Text,
    file: ReferenceFile | None,
    options: EvalOptions,
    progress: Progress,
) -> tuple[Quality, Capabilities]:
    from normistral.runtime.loading import load

    with progress.stage("loading"):
        model = load(folder, options.device, exact=options.exact, settings=options.settings)
    with model, progress.stage("scoring", sum(window.scored for window in windows), "tokens") as stage:
        quality = summarise(score(ModelPredictor(model), windows, text, file, stage.advance))
        return quality, model.capabilities


def _cache_folder() -> Path:
    return store.cache_dir() / "references"


def _default_cache(key: ReferenceKey) -> Path:
    return _cache_folder() / key.file_name()


# Views


def _document(
    folder: Path,
    manifest: Manifest,
    options: EvalOptions,
    text: Text,
    settings: WindowSettings,
    windows: int,
    quality: Quality,
    in_use: Capabilities,
) -> dict[str, Any]:
    figures = asdict(quality)
    return {
        "artifact": folder.name,
        "format": manifest.format,
        "weights": describe_weights(manifest.recipe),
        "device": options.device,
        "exact": options.exact,
        "settings": in_use.settings,
        "basis": in_use.basis,
        "given": list(in_use.given),
        "reference": options.reference,
        "text": {"sha256": text.sha256, "tokens": len(text.token_ids), "bytes": int(text.nbytes.sum())},
        "windows": asdict(settings) | {"count": windows},
        "scored_tokens": figures.pop("tokens"),
        "scored_bytes": figures.pop("nbytes"),
        **figures,
    }


def _lines(
    folder: Path,
    manifest: Manifest,
    options: EvalOptions,
    settings: WindowSettings,
    windows: int,
    quality: Quality,
    in_use: Capabilities,
) -> Iterator[str]:
    arithmetic = {"exact": "exact", "rule": "default settings", "tuned": "tuned settings"}[in_use.basis]
    arithmetic += "".join(f", {name}={in_use.settings[name]}" for name in in_use.given)
    stride = "" if settings.stride is None else f", stride {settings.stride}"
    bos = "" if settings.bos_id is None else ", each with its BOS"
    facts = [
        ("artifact", f"{folder.name}: {manifest.format}, {describe_weights(manifest.recipe)}; {arithmetic}"),
        ("text", f"{options.text.name}: {quality.tokens:,} tokens scored, {quality.nbytes:,} bytes"),
        ("windows", f"{windows} of {settings.length} tokens, {settings.convention}{stride}{bos}"),
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
            ("KL, mean", *_figure(compared.kl_mean, "{:#.3g}")),
            ("KL, median", *_figure(compared.kl_median, "{:#.3g}")),
            ("KL, 99 % below", *_figure(compared.kl_p99, "{:#.3g}")),
            ("KL, largest", f"{compared.kl_max:#.3g}", ""),
            ("same first choice", *_figure(compared.top1_agreement, "{:.1%}")),
        ]
    known = quality.perplexity.low is not None
    yield format_columns([("", "", "95 % interval" if known else ""), *rows])
    if not known:
        yield "too few tokens for intervals"


def _figure(estimate: Estimate, pattern: str) -> tuple[str, str]:
    if estimate.low is None or estimate.high is None:
        return pattern.format(estimate.value), ""
    return pattern.format(estimate.value), f"{pattern.format(estimate.low)} to {pattern.format(estimate.high)}"
