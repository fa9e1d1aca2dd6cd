"""The command `tune`, and what `doctor` says of its results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME, Manifest, read_manifest
from normistral.commands.console import format_columns, is_verbose, print_json, print_lines, say
from normistral.commands.progress import show_progress
from normistral.files import sha256_file
from normistral.hardware import Machine, explain_openvino, plan_onnxruntime, plan_openvino
from normistral.runtime.engines.settings import DEFAULT_CHUNK, PREFILL_CHUNK
from normistral.runtime.tuned import (
    Tuned,
    find_mismatch,
    forget_tuned,
    list_tuned,
    make_key,
    read_tuned,
    tuned_path,
)


def run_tune(artifact: str, options: dict[str, Any], *, as_json: bool) -> None:
    """Tune and print.

    Args:
        options: fields of `TuneOptions`; its profile is checked with its work.

    Raises:
        NormistralError: as `normistral.tuning.tune.tune`.
    """
    from normistral.tuning.tune import TuneOptions, tune

    chosen = TuneOptions(**options)
    folder = store.resolve_artifact(artifact)
    with show_progress() as progress:
        tuned = tune(folder, chosen, progress)
    if as_json:
        print_json(tuned_document(tuned))
    else:
        print_lines(tuned_lines(tuned))


def forget_artifact(artifact: str) -> None:
    """Drop an artifact's results; says how many there were."""
    folder = store.resolve_artifact(artifact)
    deleted = forget_tuned(sha256_file(folder / MANIFEST_NAME))
    say(f"{len(deleted)} result{'s' if len(deleted) != 1 else ''} dropped; the usual settings serve")


def describe_tuned(machine: Machine, versions: dict[str, str]) -> list[dict[str, Any]]:
    """Every result in the store, for `doctor`; "problem" says why one does not hold here.

    Args:
        versions: of the engines that are there, by name.
    """
    described: list[dict[str, Any]] = []
    for path, content in list_tuned():
        if isinstance(content, str):
            described.append({"file": path.name, "problem": content})
            continue
        there = content.key
        here = make_key(None, machine, there.engine, versions.get(there.engine, "missing"), there.device)
        problem = find_mismatch(there, replace(here, manifest_sha256=there.manifest_sha256))
        described.append({"file": path.name, **tuned_document(content), "problem": problem})
    return described


def describe_artifact(folder: Path, machine: Machine, versions: dict[str, str]) -> dict[str, Any]:
    """What loading an artifact on the CPU would use, and why, for `doctor`."""
    manifest = read_manifest(folder)
    engine = "openvino" if manifest.format == "openvino" else "onnxruntime"
    key = make_key(folder, machine, engine, versions.get(engine, "missing"), "CPU")
    settings, why = _rule(machine, manifest)
    problem = None
    try:
        tuned = read_tuned(tuned_path(key))
        problem = find_mismatch(tuned.key, key)
    except FileNotFoundError:
        why.append("not tuned on this machine: normistral tune finds what is faster here")
        return {"name": folder.name, "basis": "rule", "settings": settings, "why": why, "problem": None}
    except (OSError, ValueError) as exc:
        problem = str(exc)
    if problem is not None:
        return {"name": folder.name, "basis": "rule", "settings": settings, "why": why, "problem": problem}
    why = [f"tuned for {tuned.profile} on {tuned.created[:10]}; gain: {describe_gain(tuned)}"]
    return {"name": folder.name, "basis": "tuned", "settings": tuned.settings, "why": why, "problem": None}


def artifact_lines(described: dict[str, Any]) -> Iterator[str]:
    """`describe_artifact` for people."""
    origin = {"rule": "settings chosen for this kind of machine", "tuned": "settings tuned on this machine"}
    yield f"What will be used for {described['name']}: {origin[described['basis']]}"
    yield format_columns(list(described["settings"].items()), indent=2)
    yield from (f"  {reason}" for reason in described["why"])


def tuned_table(described: list[dict[str, Any]]) -> Iterator[str]:
    """`describe_tuned` for people."""
    if not described:
        return
    yield "Tuned settings"
    rows = []
    for result in described:
        if "artifact" in result:
            facts = f"{result['profile']}, {result['created'][:10]}, {result['gain'] - 1:+.0%}"
            rows.append(
                (result["artifact"], facts, f"not here: {result['problem']}" if result["problem"] else "holds here")
            )
        else:
            rows.append((result["file"], "", result["problem"]))
    yield format_columns(rows, indent=2)


def _rule(machine: Machine, manifest: Manifest) -> tuple[dict[str, str], list[str]]:
    if manifest.format == "openvino":
        weights = manifest.recipe.weights
        return {**plan_openvino(machine, weights), PREFILL_CHUNK: DEFAULT_CHUNK}, explain_openvino(machine, weights)
    return {**plan_onnxruntime(machine), PREFILL_CHUNK: DEFAULT_CHUNK}, []


def tuned_document(tuned: Tuned) -> dict[str, Any]:
    """For programs."""
    document: dict[str, Any] = msgspec.to_builtins(tuned)
    return document | {"gain": tuned.gain}


def tuned_lines(tuned: Tuned) -> Iterator[str]:
    """For people."""
    changed = ", ".join(f"{name}={tuned.settings[name]}" for name in tuned.changed)
    yield format_columns(
        [
            ("artifact", f"{tuned.artifact}, {tuned.key.engine} on {tuned.key.cpu}, {tuned.key.threads} threads"),
            ("changed", changed or "nothing: the usual settings for this machine are the fastest that were found"),
            ("gain", describe_gain(tuned)),
            ("quality", "as checked: close enough to exact arithmetic"),
            *([("", f"KL divergence {tuned.kl:.2g} nats, {tuned.kl_bound:.2g} allowed")] if is_verbose() else []),
        ]
    )
    if not tuned.complete:
        yield "the time was up before everything was tried: a larger --budget may find more"


def describe_gain(tuned: Tuned) -> str:
    """What it gained, and at what."""
    seconds = f"{tuned.tuned_s:.3g} s for {tuned.rule_s:.3g} s"
    return f"{tuned.gain - 1:+.0%} in speed at {tuned.profile} ({seconds})" if tuned.changed else "none"
