"""`normistral info`: the manifest of an artifact, and with --check the hashes of its files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from normistral.artifact.card import find_reference, render_card
from normistral.artifact.extra_files import CARD_NAME, Origin, is_sealed, read_card, read_origin
from normistral.artifact.manifest import (
    Manifest,
    ReasoningMarkers,
    RecipeRecord,
    Template,
    find_problems,
    read_manifest,
)
from normistral.commands import console
from normistral.commands.console import format_columns, is_verbose
from normistral.commands.find_artifact import find
from normistral.commands.options import ArtifactName, Debug, Verbose
from normistral.commands.progress import show_progress
from normistral.errors import EXPORT_AGAIN, ArtifactError, UsageError
from normistral.files import explain
from normistral.progress import format_bytes


def info(
    artifact: ArtifactName,
    check: Annotated[bool, typer.Option("--check", help="Hash every file again; exit code 1 if one differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Print the model card that the manifest gives.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show everything that a model on this machine is made of; --check looks for damage."""
    if card and (check or as_json):
        raise UsageError("--card stands alone", "leave --check and --json out")
    folder = find(artifact)
    manifest = read_manifest(folder)
    if card:
        sys.stdout.write(render_card(manifest, folder.resolve().name).decode())
        return
    problems = None
    if check:
        with show_progress() as progress, progress.stage("hashing", manifest.total_bytes, "bytes") as hashing:
            problems = list(find_problems(folder, manifest, thorough=True, on_bytes=hashing.advance))
    if as_json:
        console.print_json(info_document(folder, manifest, problems))
    else:
        console.print_lines(info_lines(folder, manifest))
        if problems is not None:
            console.print_lines(problems or [f"all {len(manifest.files)} files are as they were exported"])
            console.print_lines(_card_lines(folder))
    if problems:
        raise ArtifactError(f"{folder} has {len(problems)} damaged or missing files", EXPORT_AGAIN)


def _card_lines(folder: Path) -> Iterator[str]:
    """A line about a card that is no longer what the export wrote: its owner may do that."""
    try:
        card = read_card(folder)
        if card is not None and not is_sealed(card):
            yield f"{CARD_NAME} was rewritten; `info --card` prints what the manifest gives"
    except OSError as exc:
        yield f"{CARD_NAME} cannot be read: {explain(exc)[0]}"


def info_document(folder: Path, manifest: Manifest, problems: list[str] | None) -> dict[str, Any]:
    """The manifest for programs, with its folder, and with what `--check` found if it was asked for."""
    import msgspec

    from normistral.artifact.artifact import find_advice

    document: dict[str, Any] = {"path": str(folder), "total_bytes": manifest.total_bytes}
    advice = find_advice(folder, manifest)
    if advice is not None:
        document["advice"] = advice
    origin = read_origin(folder)
    if origin is not None:
        document["published"] = msgspec.to_builtins(origin)
    if problems is not None:
        document["problems"] = problems
    described: dict[str, Any] = msgspec.to_builtins(manifest)
    return document | described


def info_lines(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Lines of the manifest."""
    from normistral.artifact.artifact import find_advice

    shape, source = manifest.architecture, manifest.source
    heads = f"{shape.heads} heads, {shape.kv_heads} of keys and values, {shape.head_dim} wide"
    heads += ", ALiBi" if shape.positions == "alibi" else ""
    heads += "" if shape.sliding_window is None else f", sliding window {shape.sliding_window:,}"
    revision = "" if source.revision is None else f" at {source.revision}"
    advice = find_advice(folder, manifest)
    origin = read_origin(folder)
    rows = [
        ("artifact", str(folder)),
        *(() if advice is None else (("WARNING", advice),)),
        *(() if origin is None else (("published", _describe_origin(origin)),)),
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
        *_certificate(manifest, origin),
        *((("note" if i == 0 else ""), note) for i, note in enumerate(_notes(manifest))),
        ("size", format_bytes(manifest.total_bytes)),
    ]
    yield format_columns(rows)
    files = [(name, f"{record.size:,} bytes", record.sha256[:12]) for name, record in manifest.files.items()]
    yield format_columns([("file", "size", "sha256"), *files], indent=2)


def describe_weights(recipe: RecipeRecord) -> str:
    """Format of the stored weights, in a few words."""
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


def _describe_origin(origin: Origin) -> str:
    revision = "" if origin.revision is None else f"@{origin.revision}"
    return f"{origin.endpoint}/{origin.repository}{revision}, commit {origin.commit}, downloaded {origin.date}"


def _certificate(manifest: Manifest, origin: Origin | None) -> Iterator[tuple[str, str]]:
    """Rows of the verification at export; of a published artifact they are its publisher's word."""
    yield "verified", ("" if origin is None else "its publisher says: ") + _VERIFIED[manifest.verified]
    if origin is not None and origin.repeat is None:
        name = origin.repository + ("" if origin.revision is None else f"@{origin.revision}")
        reference = find_reference(manifest) or "CHECKPOINT"
        yield "", f"nobody compared it here; do it with: normistral eval {name} --text FILE --reference {reference}"
    elif origin is not None and (repeat := origin.repeat) is not None:
        figures = f"KL divergence {repeat.kl_nats:.3g} nats, same first choice at {repeat.top1_agreement:.0%}"
        yield "", f"compared here with {repeat.reference} on {repeat.date}: {figures} of {repeat.tokens:,} tokens"
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


def _listed(values: dict[str, Any]) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())
