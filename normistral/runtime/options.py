"""Options of a generation: one declaration and one default each.

Library, commands, batch jobs and server read name, type, range, texts and default here. Defaults that the authors of a
model published (in the manifest) come between these and what the caller asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from normistral.artifact.manifest import Manifest, SamplingDefaults
from normistral.errors import UsageError
from normistral.runtime.structured.structure import Structure

if TYPE_CHECKING:
    from normistral.artifact.tokenizer import Tokenizer

DraftMode = Literal["auto", "off"]

_ALL = 2**31  # more than any context
_STRONGEST_BIAS = 100.0  # as OpenAI bounds logit_bias; it decides alone


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """Declaration of an option of generation that is a number; its default is that of `GenerationConfig`.

    Attributes:
        kind: int or float.
        low, high: the range, both ends included.
        metavar: name of the value in the help of a command.
        help: sentence for the help of a command, without the default, and for the server's API.
        at_minus_one: -1 is accepted and becomes this, as in vLLM and llama.cpp; "refused" is no such value.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    metavar: str
    help: str
    at_minus_one: int | Literal["refused"] | None = "refused"


# In the order of the commands' help. The other options (stop, logit_bias, dry_sequence_breakers, ignore_eos, draft,
# structure) are no single numbers.
NUMERIC_OPTIONS = {
    "max_new_tokens": OptionSpec(int, 1, _ALL, "N", "Most tokens to write; -1 is as many as fit.", _ALL),
    "temperature": OptionSpec(float, 0.0, 100.0, "T", "Above 0 answers vary; 0 is greedy."),
    "top_k": OptionSpec(int, 0, _ALL, "K", "Sample among the K likeliest tokens; 0 is all.", 0),
    "top_p": OptionSpec(float, 0.0, 1.0, "P", "Sample among the likeliest that reach probability P."),
    "min_p": OptionSpec(float, 0.0, 1.0, "P", "Leave out tokens below P times the likeliest one."),
    "typical_p": OptionSpec(float, 0.0, 1.0, "P", "Sample among the tokens of most typical probability that reach P."),
    "repetition_penalty": OptionSpec(float, 0.01, 100.0, "R", "Above 1 makes repeated tokens less likely."),
    "presence_penalty": OptionSpec(
        float, -2.0, 2.0, "R", "Above 0 makes tokens of the answer less likely to come again."
    ),
    "frequency_penalty": OptionSpec(float, -2.0, 2.0, "R", "The same for each time that a token has come."),
    "dry_multiplier": OptionSpec(
        float, 0.0, 100.0, "R", "Above 0 makes tokens less likely that would go on with a repeated sequence (DRY)."
    ),
    "dry_base": OptionSpec(float, 1.0, 100.0, "R", "Growth of the DRY penalty with each repeated token."),
    "dry_allowed_length": OptionSpec(int, 1, _ALL, "N", "Repeated tokens from which the DRY penalty begins."),
    "dry_penalty_last_n": OptionSpec(int, 0, _ALL, "N", "Tokens before the next that DRY looks at; -1 is all.", _ALL),
    "xtc_probability": OptionSpec(
        float, 0.0, 1.0, "P", "How often to leave out the likeliest of several good tokens (XTC)."
    ),
    "xtc_threshold": OptionSpec(float, 0.0, 0.5, "P", "Probability from which XTC takes a token for a good one."),
    "seed": OptionSpec(
        int, 0, 2**64 - 1, "N", "Same seed and input, same text. Default, and -1: a new one every time.", None
    ),
    "logprobs": OptionSpec(int, 0, 100, "N", "Report log-probabilities of the N likeliest tokens."),
    "prompt_logprobs": OptionSpec(int, 0, 100, "N", "Report log-probabilities of the prompt's tokens too."),
    "max_reasoning_tokens": OptionSpec(
        int,
        0,
        _ALL,
        "N",
        "Of a thinking model: end its reasoning after N tokens; 0 is none. Default: no limit.",
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
        typical_p: sample among the smallest set of tokens closest to the typical surprise that reaches p; 1 is all.
        presence_penalty: subtracted from the logits of tokens that the answer holds.
        frequency_penalty: the same for each time that it holds them.
        dry_multiplier: weight of a penalty for tokens that would go on with a sequence that came before (DRY); 0 is
            off. The penalty is multiplier * base ** (repeated tokens - allowed_length).
        dry_base, dry_allowed_length: of that penalty.
        dry_penalty_last_n: the last tokens of prompt and answer in which repeated sequences are looked for.
        dry_sequence_breakers: texts, or token ids, across which no sequence is looked for. Of a text it is the last
            token that ends sequences.
        xtc_probability: chance at each token that all tokens of at least `xtc_threshold` but the least likely of them
            are left out (XTC); 0 is off.
        xtc_threshold: a probability; above 0.5 XTC could never act.
        logit_bias: (token id, what is added to its logit, from -100 to 100) pairs; a mapping may be given.
        seed: the same seed, input and options give the same text on the same artifact, settings, versions and machine,
            whatever was asked before or beside it. For that, the beginning of a prompt is reused only in whole chunks
            computed from position 0, and nothing is drafted: a chat computes its last answer anew at each turn
            (docs/sessions.md). None, and -1, draw a new seed and promise nothing; neither does temperature 0 without a
            seed, where two tokens about as likely may come out either way.
        stop: texts that end the answer; they are not part of it, and mean nothing in the reasoning of a thinking model.
        ignore_eos: go on past stop tokens (for benchmarks).
        logprobs: report log-probabilities (nats, of the model's own distribution before any of the above): None not
            at all, n for the chosen token and the n most likely ones.
        prompt_logprobs: the same for each token of the prompt, in the first chunk; the whole prompt is then computed.
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
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = _ALL
    dry_sequence_breakers: tuple[str | int, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
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
            if option.at_minus_one != "refused" and _is_minus_one(value):
                object.__setattr__(self, name, option.at_minus_one)  # frozen otherwise
            elif value is not None or default is not None:
                _require_number(name, value, option)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0.0:
                raise UsageError(f"{name} must be above 0", "use temperature=0 for greedy decoding")
        _require_bias(self.logit_bias)
        if not isinstance(self.dry_sequence_breakers, tuple) or not all(
            (isinstance(one, str) and one) or _is_id(one) for one in self.dry_sequence_breakers
        ):
            raise UsageError(
                f"dry_sequence_breakers must be texts or token ids, not {self.dry_sequence_breakers!r}",
                "leave it out for the usual ones, or give none: ()",
            )
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
        options: fields of `GenerationConfig` by name; `stop` may be one text or a list of them.

    Raises:
        UsageError: an unknown option, or a value of the wrong type or out of range.
    """
    known = {field.name for field in fields(GenerationConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", f"options are: {', '.join(sorted(known))}")
    given = dict(options)
    stop = given.get("stop")
    stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
    given["stop"] = tuple(stop) if isinstance(stop, list) else stop
    if isinstance(breakers := given.get("dry_sequence_breakers"), list):
        given["dry_sequence_breakers"] = tuple(breakers)
    if isinstance(bias := given.get("logit_bias"), Mapping):
        given["logit_bias"] = tuple(bias.items())
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
    vocabulary = manifest.architecture.vocabulary
    for option, token_ids in (
        ("logit_bias", [token_id for token_id, _ in config.logit_bias]),
        ("dry_sequence_breakers", [one for one in config.dry_sequence_breakers if isinstance(one, int)]),
    ):
        if (worst := max(token_ids, default=0)) >= vocabulary:
            raise UsageError(f"{option}: {worst} is no token id of {name}", f"ids go from 0 to {vocabulary - 1}")


def encode_breakers(config: GenerationConfig, tokenizer: Tokenizer) -> GenerationConfig:
    """`dry_sequence_breakers` as token ids, where DRY is asked for: of a text its last token, behind a letter."""
    if config.dry_multiplier == 0.0 or not any(isinstance(one, str) for one in config.dry_sequence_breakers):
        return config
    ids = [
        one if isinstance(one, int) else tokenizer.encode("a" + one, add_special_tokens=False)[-1]
        for one in config.dry_sequence_breakers
    ]
    return replace(config, dry_sequence_breakers=tuple(dict.fromkeys(ids)))


def refuse_draft_table(name: str) -> NoReturn:
    """Raise the UsageError of an option that once named a table of n-grams to draft from."""
    raise UsageError(
        f"{name} was removed: no measurement showed that tables of n-grams make answers faster",
        "leave it out; tokens are drafted from the conversation itself",
    )


def _is_minus_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == -1


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_bias(bias: object) -> None:
    hint = f"give a mapping of token ids to numbers from {-_STRONGEST_BIAS:g} to {_STRONGEST_BIAS:g}"
    if not isinstance(bias, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in bias):
        raise UsageError("logit_bias must be pairs of a token id and a number", hint)
    for token_id, value in bias:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not _is_id(token_id) or not number or not -_STRONGEST_BIAS <= value <= _STRONGEST_BIAS:
            raise UsageError(f"logit_bias cannot be {value!r} for the token id {token_id!r}", hint)


def _require_number(name: str, value: object, option: OptionSpec) -> None:
    kinds = int if option.kind is int else int | float
    if isinstance(value, kinds) and not isinstance(value, bool) and option.low <= value <= option.high:
        return  # not finite is outside of every range
    if option.kind is int:
        raise UsageError(f"{name} must be a whole number from {option.low} to {option.high}, not {value!r}")
    raise UsageError(f"{name} must be a number from {option.low:g} to {option.high:g}, not {value!r}")
