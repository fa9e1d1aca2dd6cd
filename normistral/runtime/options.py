"""Options of a generation: one declaration and one default each.

Library, commands, batch jobs and server read name, type, range, texts and default here. Defaults that the authors of a
model published (in the manifest) come between these and what the caller asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NoReturn, get_args

from normistral.artifact.manifest import Manifest, SamplingDefaults
from normistral.errors import UsageError
from normistral.runtime.structured.structure import Structure

DraftMode = Literal["auto", "off"]


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """Declaration of an option of generation that is a number; its default is that of `GenerationConfig`.

    Attributes:
        kind: int or float.
        low, high: the range, both ends included.
        metavar: name of the value in the help of a command.
        help: sentence for the help of a command, without the default.
        api_name: field of a request to the server.
        api_range: (low, high) of that field where it differs from `low` and `high`; None is unbounded.
        api_help: description of that field.
        all_at_minus_one: -1 is accepted and becomes the default, as in vLLM and llama.cpp.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    metavar: str
    help: str
    api_name: str
    api_range: tuple[float | None, float | None] | None = None
    api_help: str | None = None
    all_at_minus_one: bool = False


# In the order of the commands' help. The other options (stop, ignore_eos, draft, structure) are no numbers.
NUMERIC_OPTIONS = {
    "max_new_tokens": OptionSpec(int, 1, 2**31, "N", "Most tokens to write.", "max_tokens", (1, None)),
    "temperature": OptionSpec(
        float,
        0.0,
        100.0,
        "T",
        "Above 0 answers vary; 0 is greedy.",
        "temperature",
        api_help="Default: the model's authors'.",
    ),
    "top_k": OptionSpec(
        int,
        0,
        2**31,
        "K",
        "Sample among the K likeliest tokens; 0 is all.",
        "top_k",
        (-1, 2**31),
        "Extension: 0 and -1 are all tokens.",
        all_at_minus_one=True,
    ),
    "top_p": OptionSpec(float, 0.0, 1.0, "P", "Sample among the likeliest that reach probability P.", "top_p"),
    "min_p": OptionSpec(
        float, 0.0, 1.0, "P", "Leave out tokens below P times the likeliest one.", "min_p", api_help="Extension."
    ),
    "repetition_penalty": OptionSpec(
        float,
        0.01,
        100.0,
        "R",
        "Above 1 makes repeated tokens less likely.",
        "repetition_penalty",
        api_help="Extension.",
    ),
    "seed": OptionSpec(
        int,
        0,
        2**64 - 1,
        "N",
        "Same seed and input, same text. Default, and -1: a new one every time.",
        "seed",
        (-1, 2**63),
        "The same text again, while system_fingerprint is the same and not null; -1 is none.",
        all_at_minus_one=True,
    ),
    "logprobs": OptionSpec(int, 0, 100, "N", "Report log-probabilities of the N likeliest tokens.", "logprobs"),
    "max_reasoning_tokens": OptionSpec(
        int,
        0,
        2**31,
        "N",
        "Of a thinking model: end its reasoning after N tokens; 0 is none. Default: no limit.",
        "max_reasoning_tokens",
        api_help="Extension: ends the reasoning of a thinking model after so many tokens.",
    ),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Options of one generation.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: divides the logits; 0 takes the most likely token (greedy).
        top_k: sample among the k most likely tokens; 0 is all.
        top_p: sample among the smallest set of tokens whose probabilities reach p (nucleus sampling); 1 is all.
        min_p: leave out tokens less likely than min_p times the most likely one; 0 is none.
        repetition_penalty: divides (positive) or multiplies (negative) the logits of tokens seen before, prompt
            included (Keskar et al. 2019, as in transformers); 1 is off.
        seed: the same seed, input and options give the same text on the same artifact, settings, versions and machine,
            whatever was asked before or beside it. For that, the beginning of a prompt is reused only in whole chunks
            computed from position 0, and nothing is drafted: a chat computes its last answer anew at each turn
            (docs/sessions.md). None, and -1, draw a new seed and promise nothing; neither does temperature 0 without a
            seed, where two tokens about as likely may come out either way.
        stop: texts that end the answer; they are not part of it, and mean nothing in the reasoning of a thinking model.
        ignore_eos: go on past stop tokens (for benchmarks).
        logprobs: report log-probabilities (nats, of the model's own distribution before any of the above): None not
            at all, n for the chosen token and the n most likely ones.
        max_reasoning_tokens: of a thinking model: after so many tokens of reasoning its closing tag is written for it,
            and the answer follows. 0 is no reasoning, None as much as it likes. Tags and reasoning count towards
            `max_new_tokens` too.
        draft: "auto" guesses tokens from the text so far where that makes it faster, and lets the model check them;
            "off" does not. What is written is the same, but for the rounding of the arithmetic (docs/drafting.md); so
            with a seed nothing is drafted.
        structure: what the answer has to look like (docs/structured.md). It is of that form, or `finish_reason` says
            that it was cut off; it begins when the reasoning of a thinking model is closed.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    max_reasoning_tokens: int | None = None
    draft: DraftMode = "auto"
    structure: Structure | None = None

    @property
    def reproducible(self) -> bool:
        """Whether the text has to be the same every time."""
        return self.seed is not None

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range; -1 for `seed` and `top_k` becomes what it stands for."""
        for name, option in NUMERIC_OPTIONS.items():
            value, default = getattr(self, name), default_of(name)
            if option.all_at_minus_one and _is_minus_one(value):
                object.__setattr__(self, name, default)  # frozen otherwise
            elif value is not None or default is not None:
                _require_number(name, value, option)
        if self.top_p == 0.0:
            raise UsageError("top_p must be above 0", "use temperature=0 for greedy decoding")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be texts that are not empty, not {self.stop!r}", "leave it out for none")
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, not {self.ignore_eos!r}")
        if self.draft not in get_args(DraftMode):
            raise UsageError(f"draft must be one of {', '.join(get_args(DraftMode))}, not {self.draft!r}")
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise UsageError(
                f"structure must be a Structure, not {type(self.structure).__name__}",
                "make one with Structure.json_schema, json_object, regex, choice or grammar",
            )
        if self.structure is not None and self.ignore_eos:
            raise UsageError("ignore_eos would write on behind a complete structure", "leave one of them out")


def default_of(name: str) -> Any:
    """The default of an option; None is "not given"."""
    return _DEFAULTS[name]


_DEFAULTS = {field.name: field.default for field in fields(GenerationConfig)}


def resolve_options(authors: SamplingDefaults, options: dict[str, Any]) -> GenerationConfig:
    """Merge: the caller's options over the authors' defaults over ours.

    Args:
        authors: sampling defaults of the manifest.
        options: fields of `GenerationConfig` by name; `stop` may be one text or a sequence of them.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    known = {field.name for field in fields(GenerationConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", f"options are: {', '.join(sorted(known))}")
    stop = options.get("stop", ())
    if isinstance(stop, str):
        stop = (stop,)
    elif isinstance(stop, list):
        stop = tuple(stop)
    given = {**options, "stop": () if stop is None else stop}
    published = {field.name: value for field in fields(authors) if (value := getattr(authors, field.name)) is not None}
    return replace(GenerationConfig(), **(published | given))


def require_applicable(config: GenerationConfig, manifest: Manifest, name: str) -> None:
    """Refuse options that mean nothing to this model.

    Raises:
        UsageError: naming the option and the model.
    """
    if config.max_reasoning_tokens is not None and manifest.reasoning is None:
        raise UsageError(
            f"max_reasoning_tokens means nothing here: {name} is no model that marks its reasoning", "leave it out"
        )


def refuse_draft_table(name: str) -> NoReturn:
    """Raise the UsageError of an option that once named a table of n-grams to draft from."""
    raise UsageError(
        f"{name} was removed: no measurement showed that tables of n-grams make answers faster",
        "leave it out; tokens are drafted from the conversation itself",
    )


def _is_minus_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == -1


def _require_number(name: str, value: object, option: OptionSpec) -> None:
    kinds = int if option.kind is int else int | float
    if isinstance(value, kinds) and not isinstance(value, bool) and option.low <= value <= option.high:
        return  # not finite is outside of every range
    if option.kind is int:
        raise UsageError(f"{name} must be a whole number from {option.low} to {option.high}, not {value!r}")
    raise UsageError(f"{name} must be a number from {option.low:g} to {option.high:g}, not {value!r}")
