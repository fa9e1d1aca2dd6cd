"""The authors' sampling settings, from generation_config.json.

Values that loaders write for "off", and values that transformers takes and we do not, are translated to what they mean
there. A value without a meaning is left out, and a note names it: it changes how answers are drawn by default, which a
caller may set anyway, and not the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from normistral.artifact.manifest import SamplingDefaults
from normistral.export.checkpoint.fields import shorten

_TOP_K = 50  # what transformers takes where none is given
_LARGEST = 2**31 - 1


def read_sampling_defaults(generation: dict[str, Any], note: Callable[[str], None]) -> SamplingDefaults:
    """The authors' settings.

    Temperature and filters count when it says "do_sample": true, or "sample": true as NorMistral's does; transformers
    knows only the first, and then takes 1.0 and 50 for a temperature and a top_k that are not given. Otherwise decoding
    is greedy, and the penalty counts there too.

    Args:
        note: told, in one line, of each value that is translated or left out.
    """
    fields = _Fields(generation, note)
    values: dict[str, Any] = {"max_new_tokens": fields.whole("max_new_tokens", 1)}
    if generation.get("do_sample") is True or generation.get("sample") is True:
        temperature = fields.number("temperature", 0.0, 100.0)
        values |= {
            "temperature": 1.0 if temperature is None else temperature,
            "top_k": _read_top_k(fields),
            "min_p": fields.number("min_p", 0.0, 1.0),
        }
        values |= _read_top_p(fields)
    penalty = fields.number("repetition_penalty", 0.01, 100.0)
    if penalty != 1.0 or "temperature" in values:
        values["repetition_penalty"] = penalty
    return SamplingDefaults(**values)


def _read_top_k(fields: _Fields) -> int:
    if fields.get("top_k") == -1:  # vLLM's way to say "all"
        fields.translated("top_k", "all tokens, as in vLLM")
        return 0
    top_k = fields.whole("top_k", 0)
    return _TOP_K if top_k is None else top_k


def _read_top_p(fields: _Fields) -> dict[str, Any]:
    """top_p; transformers applies none from 1 on, and leaves the likeliest token alone at 0."""
    value = fields.get("top_p")
    if _is_number(value) and value == 0:
        fields.translated("top_p", "the likeliest token alone (top_k 1), as in transformers")
        return {"top_k": 1, "top_p": None}
    if _is_number(value) and value > 1:
        fields.translated("top_p", "no such filter, as in transformers")
        return {"top_p": None}
    return {"top_p": fields.number("top_p", 1e-6, 1.0)}


class _Fields:
    """Fields of generation_config.json that may hold anything."""

    def __init__(self, document: dict[str, Any], note: Callable[[str], None]) -> None:
        self._document, self._note = document, note

    def get(self, name: str) -> Any:
        return self._document.get(name)

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number from `low` to `high`; None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high:
            self._left_out(name, f"a number from {low:g} to {high:g}")
            return None
        return float(value)

    def whole(self, name: str, low: int) -> int | None:
        """A whole number of at least `low`, also written like 50.0; None where there is none."""
        value = self.get(name)
        if value is None:
            return None
        if not _is_number(value) or value != int(value) or not low <= value <= _LARGEST:
            self._left_out(name, f"a whole number of at least {low}")
            return None
        return int(value)

    def translated(self, name: str, meaning: str) -> None:
        self._note(f"generation_config.json: {name} is {shorten(self.get(name))}, which means {meaning}")

    def _left_out(self, name: str, wanted: str) -> None:
        self._note(f"generation_config.json: {name} is {shorten(self.get(name))}, not {wanted}: it is left out")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
