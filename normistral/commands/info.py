"""The views of artifacts and answers: as text for people, as documents for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from normistral.artifact.advisory import find_advice
from normistral.artifact.manifest import Manifest, ReasoningMarkers, RecipeRecord, Template
from normistral.artifact.presets import PRESETS
from normistral.artifact.store import StoredArtifact
from normistral.commands.console import format_columns, is_verbose
from normistral.commands.progress import format_bytes
from normistral.runtime.chunks import Completion, Timings

_UNKNOWN = "?"  # not published; read from the checkpoint


def models_document(store: Path, artifacts: list[StoredArtifact]) -> dict[str, Any]:
    """Presets and local artifacts for programs."""
    return {
        "presets": [asdict(preset) | {"source": preset.source} for preset in PRESETS],
        "store": str(store),
        "artifacts": [_artifact_document(artifact) for artifact in artifacts],
    }


def models_lines(store: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
    """Presets and local artifacts for people."""
    presets = [
        (
            preset.name,
            preset.source,
            preset.role or _UNKNOWN,
            _count(preset.context_length),
            preset.licence or _UNKNOWN,
            preset.weights,
        )
        for preset in PRESETS
    ]
    yield "Presets (normistral export NAME)"
    yield format_columns([("name", "from", "role", "context", "licence", "recommended"), *presets], indent=2)
    yield ""
    yield f"Artifacts in {store} (normistral chat NAME)"
    if not artifacts:
        yield "  none yet; make one with: normistral export demo"
        return
    usable = [artifact for artifact in artifacts if isinstance(artifact.content, Manifest)]
    if usable:
        rows = [_artifact_row(artifact.name, artifact.content) for artifact in usable]  # type: ignore[arg-type]
        yield format_columns([("name", "size", "format", "weights", "role", "context", "made from"), *rows], indent=2)
    for artifact in artifacts:
        if isinstance(artifact.content, str):
            yield f"  {artifact.name}: {artifact.content}"


def list_document(store: Path, artifacts: list[StoredArtifact]) -> dict[str, Any]:
    """The store for programs."""
    return {"store": str(store), "artifacts": [_artifact_document(artifact) for artifact in artifacts]}


def list_lines(store: Path, artifacts: list[StoredArtifact]) -> Iterator[str]:
    """The store for people."""
    if not artifacts:
        yield f"There are no models yet in {store}."
        yield f"Make one with: {PRESETS[0].export_command}"
        return
    rows = []
    for name, _, content in artifacts:
        if isinstance(content, Manifest):
            rows.append((name, format_bytes(content.total_bytes), _describe_use(content), content.source.id))
        else:
            rows.append((name, "?", "damaged", content))
    yield format_columns([("name", "size", "for", "made from"), *rows])


def show_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """An artifact in a few words."""
    shape, source = manifest.architecture, manifest.source
    engine = {"openvino": "OpenVINO", "onnx": "onnxruntime"}[manifest.format]
    command = "chat" if manifest.template is not None else "generate"
    yield format_columns(
        [
            ("name", folder.name),
            ("folder", str(folder.absolute())),
            ("size", format_bytes(manifest.total_bytes)),
            ("made from", source.id + (f" at {source.revision}" if source.revision else "")),
            ("made on", manifest.created[:10]),
            ("model", f"{shape.parameters / 1e6:,.0f} million parameters, {manifest.recipe.weights} weights"),
            ("runs with", engine),
            ("for", _describe_use(manifest)),
            ("reads at most", f"{manifest.context_length:,} tokens, prompt and answer together"),
            ("quality check", _QUALITY_CHECK[manifest.verified]),
            ("try it", f"normistral {command} {folder.name}"),
        ]
    )


def _describe_use(manifest: Manifest) -> str:
    return "completing text" if manifest.template is None else "chat"


_QUALITY_CHECK = {
    "run": "passed: it was run, and compared with the original",
    "read": "passed in part: its files were compared with the original; it was not run",
    "no": "left out when it was made (--no-verify)",
    "failed": "FAILED, and it was kept all the same (--keep-failed)",
    None: "not recorded",
}


def info_document(folder: Path, manifest: Manifest, problems: list[str] | None) -> dict[str, Any]:
    """The manifest for programs, with its folder, and with what `--check` found if it was asked for."""
    document: dict[str, Any] = {"path": str(folder), "total_bytes": manifest.total_bytes}
    advice = find_advice(folder, manifest)
    if advice is not None:
        document["advice"] = advice
    if problems is not None:
        document["problems"] = problems
    described: dict[str, Any] = msgspec.to_builtins(manifest)
    return document | described


def info_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest for people."""
    shape, source = manifest.architecture, manifest.source
    heads = f"{shape.heads} heads, {shape.kv_heads} of keys and values, {shape.head_dim} wide"
    heads += ", ALiBi" if shape.positions == "alibi" else ""
    heads += "" if shape.sliding_window is None else f", sliding window {shape.sliding_window:,}"
    revision = "" if source.revision is None else f" at {source.revision}"
    advice = find_advice(folder, manifest)
    rows = [
        ("artifact", str(folder)),
        *(() if advice is None else (("WARNING", advice),)),
        ("made from", f"{source.id}{revision} ({source.kind})"),
        ("made", f"{manifest.created} with {_listed(manifest.tools)}"),
        ("format", manifest.format),
        ("weights", describe_weights(manifest.recipe)),
        ("role", manifest.role),
        ("architecture", f"{shape.name}, {shape.parameters / 1e6:,.0f} million parameters"),
        (
            "",
            f"{shape.layers} layers, {shape.hidden_size} wide, feed-forward {shape.feed_forward}; {heads}",
        ),
        ("vocabulary", f"{shape.vocabulary:,} tokens, {'tied' if shape.tied_embeddings else 'separate'} output layer"),
        ("context", f"{manifest.context_length:,} tokens"),
        ("stops at", f"token {', '.join(map(str, manifest.stop_token_ids))}"),
        ("begins with", _describe_bos(manifest)),
        ("template", _describe_template(manifest.template)),
        ("reasoning", _describe_reasoning(manifest.reasoning)),
        ("sampling", _describe_sampling(manifest)),
        *_certificate(manifest),
        *((("note" if i == 0 else ""), note) for i, note in enumerate(_notes(manifest))),
        ("size", format_bytes(manifest.total_bytes)),
    ]
    yield format_columns(rows)
    files = [(name, f"{record.size:,} bytes", record.sha256[:12]) for name, record in manifest.files.items()]
    yield format_columns([("file", "size", "sha256"), *files], indent=2)


def completion_document(completion: Completion) -> dict[str, Any]:
    """A whole answer for programs; times in seconds."""
    return {
        "text": completion.text,
        "reasoning": completion.reasoning,
        "reasoning_open": completion.reasoning_open,
        "finish_reason": completion.finish_reason,
        "token_ids": list(completion.token_ids),
        "timings": asdict(completion.timings) | {"tokens_per_s": completion.timings.tokens_per_s},
    }


def describe_timings(timings: Timings) -> str:
    """One line on a generation."""
    guessed = f"; {timings.accepted_tokens} of {timings.drafted_tokens} guessed tokens were right"
    return (
        f"{timings.new_tokens} tokens at {timings.tokens_per_s:.1f} tokens/s, the first after {timings.ttft_s:.2f} s; "
        f"prompt of {timings.prompt_tokens} tokens, {timings.cached_tokens} of them known from before"
        f"{guessed if timings.drafted_tokens else ''}"
    )


def describe_weights(recipe: RecipeRecord) -> str:
    """How the weights are stored, in a few words."""
    graph = "" if recipe.graph is None else f"; {recipe.graph} graph"
    if recipe.symmetric is None:
        return recipe.weights + graph
    parts = [recipe.weights, "symmetric" if recipe.symmetric else "asymmetric"]
    if recipe.group_size is not None:
        parts.append("one scale per channel" if recipe.group_size == -1 else f"groups of {recipe.group_size}")
    if recipe.recipe not in (None, "fast"):
        parts.append(f"recipe {recipe.recipe}")
    if recipe.ratio is not None and recipe.ratio != 1.0:
        mixed = recipe.eight_bits is not None
        parts.append(f"{1 - recipe.ratio:.0%} of the weights in int8" if mixed else f"{recipe.ratio:.0%} of the layers")
    described = ", ".join(parts)
    if recipe.backup is not None:
        described += f"; others {recipe.backup}; output layer {recipe.output_layer_bits} bits"
    return described + graph


_VERIFIED = {
    "run": "yes: run, and compared with the checkpoint",
    "read": "in part: read back, but too large to run where it was exported",
    "no": "no, as asked (--no-verify)",
    "failed": "NO: it failed, and was kept all the same (--keep-failed)",
    None: "before this was recorded",
}


def _notes(manifest: Manifest) -> list[str]:
    """Without those that say in figures what stands above."""
    return [note for note in manifest.notes if is_verbose() or not note.startswith(("verified: ", "weights: "))]


def _certificate(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What was proved at export."""
    yield "verified", _VERIFIED[manifest.verified]
    if manifest.ignored_fields:
        yield "", f"but for these fields of the checkpoint, ignored as asked: {', '.join(manifest.ignored_fields)}"
    quality = dict(manifest.quality or {})
    if "matrices" in quality:
        counts = [
            f"{quality.pop('matrices'):.0f} matrices",
            f"{quality.pop('tokenizer_tokens', 0):,.0f} tokens of text",
        ]
        if conversations := quality.pop("template_conversations", 0):
            counts.append(f"{conversations:.0f} conversations")
        yield "", f"as the checkpoint: {', '.join(counts)}"
    if "graph_error" in quality:
        error = quality.pop("graph_error")
        figure = f", to {error:.1g} of the logits' spread" if is_verbose() else ""
        yield "", f"computes what transformers computes with these weights{figure}"
    if "probe_kl_nats" in quality:
        kl, same = quality.pop("probe_kl_nats"), quality.pop("probe_top1_agreement")
        figure = f"; KL divergence {kl:.2g} nats" if is_verbose() else ""
        tokens = f"{quality.pop('probe_tokens'):.0f} tokens"
        yield "", f"chooses the same next token as the checkpoint at {same:.0%} of {tokens}{figure}"
    if quality:
        yield "quality", _listed(quality)


def _describe_bos(manifest: Manifest) -> str:
    if manifest.bos_token_id is None:
        return "nothing: the model has no beginning-of-sequence token"
    how = "put before plain text" if manifest.adds_bos else "not put before text by the tokenizer"
    return f"token {manifest.bos_token_id}, {how}"


def _describe_template(template: Template | None) -> str:
    if template is None:
        return "none"
    if template.sha256 is not None:
        return f"from a file given at export, SHA-256 {template.sha256[:12]}"
    return f"from the {template.origin}" if template.origin == "checkpoint" else template.origin


def _describe_reasoning(markers: ReasoningMarkers | None) -> str:
    if markers is None:
        return "none marked"
    how = "found in the text" if markers.open_id is None else f"tokens {markers.open_id} and {markers.close_id}"
    return f"between {markers.open} and {markers.close}, {how}"


def _describe_sampling(manifest: Manifest) -> str:
    published = {key: value for key, value in asdict(manifest.sampling).items() if value is not None}
    return f"by default {_listed(published)}" if published else "the most likely token each time (greedy)"


def _artifact_document(artifact: StoredArtifact) -> dict[str, Any]:
    name, path, content = artifact
    if isinstance(content, str):
        return {"name": name, "path": str(path), "problem": content}
    return {
        "name": name,
        "path": str(path),
        "total_bytes": content.total_bytes,
        "format": content.format,
        "weights": content.recipe.weights,
        "role": content.role,
        "context_length": content.context_length,
        "source": content.source.id,
    }


def _artifact_row(name: str, manifest: Manifest) -> tuple[str, ...]:
    return (
        name,
        format_bytes(manifest.total_bytes),
        manifest.format,
        manifest.recipe.weights,
        manifest.role,
        _count(manifest.context_length),
        manifest.source.id,
    )


def _count(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _listed(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
