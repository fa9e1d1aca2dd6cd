"""Options of a generation, with their one default each.

CLI, library and benchmarks read the defaults here. Defaults that the model's authors published (in the manifest) come
between these and what the caller asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from normistral.artifact.manifest import Manifest, SamplingDefaults
from normistral.errors import UsageError
from normistral.runtime.structured.structure import Structure

DraftMode = Literal["auto", "off"]


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How to generate.

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
        for name, neutral in (("seed", None), ("top_k", 0)):
            if _is_minus_one(getattr(self, name)):
                object.__setattr__(self, name, neutral)  # frozen for everybody else
        _require_int("max_new_tokens", self.max_new_tokens, 1, 2**31)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, 0, 2**31)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_p == 0.0:
            raise UsageError("top_p must be above 0", "use temperature=0 for greedy decoding")
        if self.seed is not None:
            _require_int("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, 100)
        if self.max_reasoning_tokens is not None:
            _require_int("max_reasoning_tokens", self.max_reasoning_tokens, 0, 2**31)
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


def _is_minus_one(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == -1


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise UsageError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
