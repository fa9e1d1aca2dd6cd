"""Engine settings by the engine's own names: the values they take, and overrides over the plan for this machine.

An engine says which settings it knows (`Setting`); everything else is refused here, because onnxruntime ignores what it
does not know, and both read numbers loosely ("2x" is 2 to OpenVINO). It knows no engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from normistral.errors import UsageError

PREFILL_CHUNK = "prefill_chunk"  # a setting of ours, for both engines: tokens of a prompt that are fed at once
INT4_KERNEL = "int4_kernel"  # another, for OpenVINO on CPUs: whose products of 4-bit and 8-bit weights serve
OUR_KERNEL, ENGINES_KERNEL = "normistral", "openvino"
INT4_WEIGHTS = "int4_weights"  # and where the weights of our kernel lie
MEMORY, MAPPED = "memory", "mapped"
ATTENTION = "attention"  # and another: which of OpenVINO's attentions serves
PAGED, STATEFUL = "paged", "stateful"
DEFAULT_CHUNK = "256"  # long enough for full speed, short enough that a prompt can be cancelled (docs/decisions.md)


SettingsSource = Literal["rule", "tuned", "exact"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Device, arithmetic and settings to load an artifact with.

    Attributes:
        device: CPU, or another device by its engine's own name.
        exact: reference arithmetic: float32, and no quantization at run time.
        settings: the caller's settings, by the engine's own names, over everything else.
        tuned: settings that `normistral tune` found for this artifact here; None is the rule for this kind of machine.
    """

    device: str = "CPU"
    exact: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[str, str] | None = None

    @property
    def settings_source(self) -> SettingsSource:
        """Source of the settings under the caller's overrides."""
        return "exact" if self.exact else "rule" if self.tuned is None else "tuned"


DEFAULT_CONFIG = EngineConfig()


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of an engine.

    Attributes:
        pattern: regular expression of its whole value.
        values: the same for people.
        changes_results: whether it changes the arithmetic, and not only where and when it is done.
    """

    pattern: str
    values: str
    changes_results: bool = False


COUNT = Setting(r"[1-9]\d{0,3}", "a number from 1 to 9999")
ZERO_OR_ONE = Setting("[01]", "0 or 1")
KERNEL = Setting(f"{OUR_KERNEL}|{ENGINES_KERNEL}", f"{OUR_KERNEL} or {ENGINES_KERNEL}", changes_results=True)
INT4_WEIGHTS_SETTING = Setting(f"{MEMORY}|{MAPPED}", f"{MEMORY} or {MAPPED}")
ATTENTION_SETTING = Setting(f"{PAGED}|{STATEFUL}", f"{PAGED} or {STATEFUL}")
CHUNK = Setting(r"[1-9]\d{0,2}|[1-3]\d{3}|40[0-8]\d|409[0-6]", "a number of tokens from 1 to 4096")


def parse_settings(pairs: Iterable[str] | None) -> dict[str, str]:
    """Settings as a user writes them, KEY=VALUE; the engine checks names and values.

    Raises:
        UsageError: one is no such pair, or one key comes twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise UsageError(f"{pair!r} is no setting", "settings are KEY=VALUE, such as prefill_chunk=512")
        if key in settings:
            raise UsageError(f"the setting {key} is given twice", "give it once")
        settings[key] = value
    return settings


def override(
    plan: Mapping[str, str], given: Mapping[str, str], known: Mapping[str, Setting], *, engine: str, exact: bool
) -> dict[str, str]:
    """The plan with the user's values in place of its own, `prefill_chunk` included.

    Args:
        known: the settings that this engine has here; `prefill_chunk` is known to all.
        engine: its name, for messages.
        exact: refuse what would change the reference arithmetic.

    Raises:
        UsageError: an unknown name, a value that it does not take, or arithmetic that `exact` fixes.
    """
    known = {**known, PREFILL_CHUNK: CHUNK}
    allowed = sorted(name for name, setting in known.items() if not (exact and setting.changes_results))
    for name, value in given.items():
        setting = known.get(name)
        if setting is None:
            raise UsageError(f"{engine} has no setting {name!r} here", f"known are: {', '.join(allowed)}")
        if not isinstance(value, str):
            raise UsageError(f"{name} cannot be {value!r}", f"it takes {setting.values}, as a text: {str(value)!r}")
        if not re.fullmatch(setting.pattern, value):
            raise UsageError(f"{name} cannot be {value!r}", f"it takes {setting.values}")
        if name not in allowed:
            raise UsageError(
                f"{name} would change the reference arithmetic of exact",
                f"leave one of them out; with exact there may be: {', '.join(allowed)}",
            )
    return {PREFILL_CHUNK: DEFAULT_CHUNK, **plan, **given}
