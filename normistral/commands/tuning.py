"""The command that finds this machine's best settings for an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.commands.options import Artifact, Debug, Verbose, given
from normistral.errors import UsageError
from normistral.runtime.tuned import BUDGET_MINUTES, Profile


def tune(
    artifact: Artifact,
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
            help="Most that settings may change answers: mean KL divergence from exact arithmetic, in nats. "
            "Default: half of what quantizing the weights cost, within 0.001 to 0.02.",
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
    from normistral.commands.tune import forget_artifact, run_tune

    options = given(profile=profile, budget_minutes=budget, quality=quality)
    if not forget:
        run_tune(artifact, options, as_json=as_json)
    elif options or as_json:
        raise UsageError("--forget measures nothing, so it takes no other option", "give it alone")
    else:
        forget_artifact(artifact)
