"""`normistral tune`: finds the fastest settings for an artifact on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.commands.console import format_columns, is_verbose, print_json, print_lines, say
from normistral.commands.find_artifact import find
from normistral.commands.options import ArtifactName, Debug, Verbose, given
from normistral.commands.progress import show_progress
from normistral.errors import UsageError
from normistral.files import sha256_file
from normistral.runtime.tuned import BUDGET_MINUTES, Profile, Tuned, forget_tuned


def tune(
    artifact: ArtifactName,
    profile: Annotated[
        Profile | None,
        typer.Option(
            metavar="NAME",
            help="The work: chat (question and answer; the default), documents (long text, short answer) or batch "
            "(many of middling length).",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", help=f"Measure nothing new after this time. Default: {BUDGET_MINUTES:g}."),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="KL",
            help="Most that settings may move predictions away from those of exact arithmetic, as mean KL divergence "
            "(nats). Default: half of what quantizing the weights cost, within 0.001 to 0.02.",
        ),
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Drop what was tuned for this artifact, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Find the fastest settings for a model on this machine.

    Compares settings of its engine on the processor for a few minutes, while nothing else should use it. Those that
    are faster by more than the noise and cost little quality are kept, and used whenever the artifact is loaded here.
    The artifact stays as it is.
    """
    options = given(profile=profile, budget_minutes=budget, quality=quality)
    if forget:
        if options or as_json:
            raise UsageError("--forget measures nothing, so it takes no other option", "give it alone")
        _forget(artifact)
        return
    from normistral import tuning
    from normistral.runtime.collect_env import tuned_document

    chosen = tuning.TuneOptions(**options)
    folder = find(artifact)
    with show_progress() as progress:
        tuned = tuning.tune(folder, chosen, progress)
    if as_json:
        print_json(tuned_document(tuned))
    else:
        print_lines(tuned_lines(tuned))


def _forget(artifact: str) -> None:
    deleted = forget_tuned(sha256_file(store.resolve_artifact(artifact) / MANIFEST_NAME))
    say(f"{len(deleted)} result{'s' if len(deleted) != 1 else ''} dropped; the usual settings serve")


def tuned_lines(tuned: Tuned) -> Iterator[str]:
    """Lines of a result."""
    from normistral.runtime.collect_env import describe_gain

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
