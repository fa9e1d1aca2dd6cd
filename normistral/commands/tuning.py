"""The command that finds this machine's best settings for an artifact."""

from __future__ import annotations

from typing import Annotated

import typer

from normistral.terminal.arguments import Artifact, Debug


def tune(
    artifact: Artifact,
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The work: chat (question and answer), documents (long text, short answer) or batch (many of both).",
        ),
    ] = "chat",
    budget: Annotated[float, typer.Option(metavar="MINUTES", help="Measure nothing new after this time.")] = 5.0,
    quality: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Most that settings may cost: mean KL divergence from exact arithmetic. Default: half of what "
            "rounding the weights cost, within 0.001 to 0.02.",
        ),
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Drop what was tuned for this artifact, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Find the settings with which an artifact runs best here, and keep them for later loads.

    Compares settings of its engine on this machine's processor, in a few minutes and while it has the processor to
    itself, and keeps those that are faster by more than the noise and cost little quality. The artifact stays as it is.
    """
    from normistral.terminal.tuning import forget_artifact, run_tune

    if forget:
        forget_artifact(artifact)
    else:
        run_tune(artifact, profile, budget, quality, as_json=as_json)
