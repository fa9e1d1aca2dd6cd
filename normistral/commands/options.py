"""Arguments and options that several commands share: names, types and help. Each default stands where it is declared.

A command takes a group of options as one parameter, whose type is an `OptionGroup`; `with_option_groups` gives typer
the single ones. The options of sampling are made from their declaration, `NUMERIC_OPTIONS`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from normistral.artifact import store
from normistral.artifact.manifest import SamplingDefaults
from normistral.artifact.presets import PRESETS
from normistral.commands.console import decode_argument
from normistral.errors import UsageError
from normistral.runtime.engines.settings import EngineConfig, parse_settings
from normistral.runtime.options import NUMERIC_OPTIONS, DraftMode, default_of, refuse_draft_table
from normistral.runtime.overflow import OVERFLOW_HELP, Overflow

# Groups of options in the help.
SAMPLING, FORM, ENGINE, OUTPUT = "How to write", "Form of the answer", "Engine", "What is shown"

_PUBLISHED = frozenset(field.name for field in fields(SamplingDefaults))
DEFAULTS_NOTE = "(*) What the model's authors published comes first; the figure is the default where they say nothing."


def given(**options: Any) -> dict[str, Any]:
    """The options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


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


ArtifactName = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="Folder of an exported model, its name in the store, a preset, or OWNER/NAME of a published one.",
        show_default=False,
        autocompletion=complete_artifact,
    ),
]
Prompt = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Answer this on stdout and end. Input from a pipe does the same.")
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
Greedy = Annotated[
    bool,
    typer.Option(
        "--greedy", help="Always take the most likely token; same as --temperature 0.", rich_help_panel=SAMPLING
    ),
]
OverflowPolicy = Annotated[Overflow, typer.Option("--overflow", help=OVERFLOW_HELP)]
JsonFile = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - is stdout, without the table."),
]


class OptionGroup:
    """Options that are one parameter of a command: the fields of a dataclass, annotated for typer."""

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """Parameters for typer."""
        hints = get_type_hints(cls, include_extras=True)
        return [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(cls)  # type: ignore[arg-type]  # a subclass is a dataclass
        ]


@dataclass(frozen=True, slots=True)
class EngineArgs(OptionGroup):
    """Options of an engine."""

    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Reference arithmetic (float32, nothing quantised while running); slower.",
            rich_help_panel=ENGINE,
        ),
    ] = False
    device: Annotated[
        str,
        typer.Option(metavar="NAME", help="CPU, or another that `normistral doctor` lists.", rich_help_panel=ENGINE),
    ] = "CPU"
    engine_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the engine, over the plan for this machine; may be given several times.",
            rich_help_panel=ENGINE,
        ),
    ] = None

    @property
    def settings(self) -> dict[str, str]:
        """The settings by name.

        Raises:
            UsageError: one is not KEY=VALUE.
        """
        return parse_settings(self.engine_settings)

    @property
    def config(self) -> EngineConfig:
        """The same for the loader; raises UsageError as `settings`."""
        return EngineConfig(self.device, self.exact, self.settings)


@dataclass(frozen=True, slots=True)
class StructureArgs(OptionGroup):
    """The form of an answer; at most one may be given."""

    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer in JSON of this schema. (docs/structured.md)", rich_help_panel=FORM),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN", help="Answer with a text that this regular expression matches.", rich_help_panel=FORM
        ),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Answer with one of these texts; given several times.", rich_help_panel=FORM),
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer with a text of this grammar (Lark).", rich_help_panel=FORM),
    ] = None


@dataclass(frozen=True, slots=True)
class AnswerArgs(OptionGroup):
    """How one answer is written and shown."""

    draft: Annotated[
        DraftMode | None,
        typer.Option(
            help="auto guesses tokens from the text so far where that is faster, and the model checks them; off does "
            f"not. Default: {default_of('draft')}.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    draft_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Removed.", hidden=True, callback=_refuse_draft_table),
    ] = None
    hide_reasoning: Annotated[
        bool,
        typer.Option("--hide-reasoning", help="Do not show the reasoning of a thinking model.", rich_help_panel=OUTPUT),
    ] = False
    stats: Annotated[
        bool, typer.Option("--stats", help="Print speed and token counts on stderr.", rich_help_panel=OUTPUT)
    ] = False
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the whole answer as JSON: text, reasoning, timings.", rich_help_panel=OUTPUT
        ),
    ] = False


class SamplingArgs(OptionGroup):
    """Fields of `GenerationConfig` that the user gave."""

    def __init__(self, **options: Any) -> None:
        self._options = given(**options)

    @classmethod
    def parameters(cls) -> list[Parameter]:
        """An option for each number of `GenerationConfig` but log-probabilities, and the lists before the last one."""
        parameters = []
        for name, spec in NUMERIC_OPTIONS.items():
            if name not in ("logprobs", "prompt_logprobs"):
                note = _default_note(name, spec.at_minus_one)
                option = typer.Option(metavar=spec.metavar, help=spec.help + note, rich_help_panel=SAMPLING)
                parameters.append(_optional(name, spec.kind, option))
        stop = typer.Option(
            metavar="TEXT", help="End before this text; may be given several times.", rich_help_panel=SAMPLING
        )
        bias = typer.Option(
            metavar="ID=B",
            help="Add B to the logit of a token id, from -100 to 100; may be given several times.",
            rich_help_panel=SAMPLING,
        )
        breaker = typer.Option(
            metavar="TEXT",
            help="DRY looks for no sequence across this text, instead of line end, colon, quote and asterisk; may be "
            "given several times.",
            rich_help_panel=SAMPLING,
        )
        lists = [
            _optional("stop", list[str], stop),
            _optional("logit_bias", list[str], bias),
            _optional("dry_sequence_breaker", list[str], breaker),
        ]
        return [*parameters[:-1], *lists, parameters[-1]]

    def options(self, further_stops: Sequence[str] = ()) -> dict[str, Any]:
        """Keyword arguments of a generation.

        Raises:
            UsageError: a text is not UTF-8, or a bias is not ID=B.
        """
        options = dict(self._options)
        if bias := options.pop("logit_bias", ()):
            options["logit_bias"] = tuple(map(_parse_bias, bias))
        if breakers := options.pop("dry_sequence_breaker", ()):
            options["dry_sequence_breakers"] = tuple(map(decode_argument, breakers))
        if stops := [*map(decode_argument, options.pop("stop", ())), *further_stops]:
            options["stop"] = tuple(stops)
        return options


def _default_note(name: str, at_minus_one: Any) -> str:
    """The default; (*) where the model's authors may have published one."""
    default = default_of(name)
    if default is None:
        return ""
    shown = "-1" if default == at_minus_one and default else f"{default:g}"
    return f" (*) {shown}" if name in _PUBLISHED else f" Default: {shown}"


def _parse_bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError as exc:
        raise UsageError(f"--logit-bias takes ID=B, not {text}", "such as --logit-bias 42=-100") from exc


def _optional(name: str, kind: Any, option: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer is to see it: every `OptionGroup` among its parameters as the options that it stands for."""
    known = {group.__name__ for group in OptionGroup.__subclasses__()}
    if not known & {*map(str, command.__annotations__.values())}:
        return command  # evaluating annotations takes time, and typer does it too
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type[OptionGroup], list[Parameter]]] = {}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            groups[parameter.name] = kind, kind.parameters()
            parameters += groups[parameter.name][1]
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=kind))

    def call(**values: Any) -> None:
        for name, (kind, members) in groups.items():
            values[name] = kind(**{member.name: values.pop(member.name) for member in members})
        command(**values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
