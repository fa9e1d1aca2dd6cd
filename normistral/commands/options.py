"""Arguments and options of `chat`, `generate`, `eval` and `bench`: names, types and help; values default elsewhere."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from normistral.artifact import store
from normistral.artifact.presets import PRESETS
from normistral.runtime.options import DraftMode, GenerationConfig, refuse_draft_table

_OURS = GenerationConfig()

# Groups of options in the help.
SAMPLING, FORM, ENGINE, OUTPUT = "How to write", "Form of the answer", "Engine", "What is shown"


def _remember_debug(on: bool) -> bool:
    if on:
        logging.getLogger("normistral").setLevel(logging.DEBUG)
    return on


def _remember_verbose(on: bool) -> bool:
    logger = logging.getLogger("normistral")
    if on and not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    return on


def _refuse_draft_table(file: Path | None) -> None:
    if file is not None:
        refuse_draft_table("--draft-table")


def complete_stored(incomplete: str) -> list[str]:
    """Names in the store, for the shell; it sees no errors."""
    with suppress(OSError):
        root = store.artifacts_dir()
        names = (path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        return sorted(name for name in names if name.startswith(incomplete))
    return []


def complete_preset(incomplete: str) -> list[str]:
    """Presets' names, for the shell. Where none fits it completes files."""
    return [preset.name for preset in PRESETS if preset.name.startswith(incomplete)]


def complete_artifact(incomplete: str) -> list[str]:
    """Names in the store and presets, for the shell. Where none fits it completes files."""
    return [*complete_stored(incomplete), *complete_preset(incomplete)]


Artifact = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="Folder of an exported model, its name in the store, or a preset.",
        show_default=False,
        autocompletion=complete_artifact,
    ),
]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Answer this on stdout and end. Input from a pipe does the same.")
]
Greedy = Annotated[
    bool,
    typer.Option(
        "--greedy", help="Always take the most likely token; same as --temperature 0.", rich_help_panel=SAMPLING
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Reference arithmetic (float32, nothing quantised while running); slower.",
        rich_help_panel=ENGINE,
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="CPU, or another that `normistral doctor` lists.", rich_help_panel=ENGINE)
]
EngineSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting of the engine, over the plan for this machine; may be given several times.",
        rich_help_panel=ENGINE,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"Most tokens to write. (*) {_OURS.max_new_tokens}", rich_help_panel=SAMPLING),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T", help=f"Above 0 answers vary; 0 is greedy. (*) {_OURS.temperature:g}", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="K", help=f"Sample among the K likeliest tokens; 0 is all. (*) {_OURS.top_k}", rich_help_panel=SAMPLING
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help=f"Sample among the likeliest that reach probability P. (*) {_OURS.top_p:g}",
        rich_help_panel=SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help=f"Leave out tokens below P times the likeliest one. (*) {_OURS.min_p:g}",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help=f"Above 1 makes repeated tokens less likely. (*) {_OURS.repetition_penalty:g}",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Same seed and input, same text. Default, and -1: a new one every time.",
        rich_help_panel=SAMPLING,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; may be given several times.", rich_help_panel=SAMPLING),
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Answer in JSON of this schema. (docs/structured.md)", rich_help_panel=FORM),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN", help="Answer with a text that this regular expression matches.", rich_help_panel=FORM
    ),
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Answer with one of these texts; given several times.", rich_help_panel=FORM),
]
Grammar = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Answer with a text of this grammar (Lark).", rich_help_panel=FORM)
]
MaxReasoningTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Of a thinking model: end its reasoning after N tokens; 0 is none. Default: no limit.",
        rich_help_panel=SAMPLING,
    ),
]
Draft = Annotated[
    DraftMode | None,
    typer.Option(
        help="auto guesses tokens from the text so far where that is faster, and the model checks them; off does not. "
        f"Default: {_OURS.draft}.",
        rich_help_panel=ENGINE,
    ),
]
DraftTable = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Removed.", hidden=True, callback=_refuse_draft_table),
]
HideReasoning = Annotated[
    bool,
    typer.Option("--hide-reasoning", help="Do not show the reasoning of a thinking model.", rich_help_panel=OUTPUT),
]
Session = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Go on with the conversation that this file holds, if it is there, and save it there."
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Print speed and token counts on stderr.", rich_help_panel=OUTPUT)]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the whole answer as JSON: text, reasoning, timings.", rich_help_panel=OUTPUT),
]

Debug = Annotated[
    bool,
    typer.Option(
        "--debug",
        help="Show what is logged, and a traceback after an error.",
        callback=_remember_debug,
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]

Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Show the details as well.", callback=_remember_verbose, is_eager=True, rich_help_panel=OUTPUT
    ),
]

DEFAULTS_NOTE = "(*) What the model's authors published comes first; the figure is the default where they say nothing."

# eval

EvalText = Annotated[
    Path, typer.Option("--text", metavar="FILE", help="Text to predict, in UTF-8.", show_default=False)
]
EvalReference = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Compare with this checkpoint in float32 (named as for export), or with another artifact."
    ),
]
Windows = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="sliding: every token is scored once. llama.cpp: as its perplexity tool does it."
    ),
]
WindowTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Length of a window. Default: 512, or the context if that is less.")
]
Stride = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens that a sliding window scores. Default: half the window.")
]
MaxTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Stop after the window that brings the scored tokens to N.")
]
ReferenceCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keeps the reference's predictions. Default: a file in the store's cache."),
]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - is stdout, without the table."),
]

# bench

Artifacts = Annotated[
    list[str],
    typer.Argument(
        metavar="ARTIFACT...",
        help="Folders or names, each alone or with settings of its engine: ARTIFACT@KEY=VALUE,KEY=VALUE.",
        show_default=False,
    ),
]
Report = Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report with charts: FILE.html or FILE.md.")]
Quick = Annotated[bool, typer.Option("--quick", help="Shorter, fewer, less certain.")]
PrefillLengths = Annotated[
    str | None,
    typer.Option("--prefill", metavar="N,N", help="Lengths of the prompts. Default: 128,512,2048, as far as they fit."),
]
DecodeContexts = Annotated[
    str | None,
    typer.Option("--decode", metavar="N,N", help="Tokens before those written. Default: 16,512,2048 likewise."),
]
DecodeTokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", help="Tokens to write at each. Default: 32.")
]
Repeats = Annotated[int | None, typer.Option(metavar="N", help="Measurements of each kind. Default: 5.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}
