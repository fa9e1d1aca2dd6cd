"""Result of a benchmark: figures with their spread, and the machine, plan and settings they belong to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from normistral.evaluation.bench.machine import Bandwidth, MachineReport, ProcessMemory
from normistral.evaluation.bench.speed import SpeedPlan

SCHEMA_VERSION = 1
Interleaving = Literal["together", "reloaded"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and largest of `n` measurements."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None when there are none."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found), len(found)) if found else None

    @property
    def width(self) -> float:
        """From the least to the largest, as a part of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def overlaps(self, other: Spread) -> bool:
        """True if the ranges have a value in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """Reading a prompt of `length` tokens."""

    length: int
    tokens_per_s: Spread
    tokens_per_joule: Spread | None


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """Writing after `context` tokens.

    Attributes:
        weight_gb_per_s: weights read, in 10^9 bytes a second; the KV cache is not counted.
        share: of the read bandwidth around each measurement that weights and KV cache took; None where the device's
            memory was not measured.
        bandwidth_gb_per_s: around the measurements; None where it was not measured there.
        dropped: measurements that do not count, because the bandwidth changed meanwhile.
    """

    context: int
    tokens_per_s: Spread
    weight_gb_per_s: float
    share: float | None
    tokens_per_joule: Spread | None
    bandwidth_gb_per_s: Spread | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Seconds from the start of a process until the model is ready, and the parts of it."""

    ready_s: Spread
    python_s: Spread
    engine_import_s: Spread
    model_s: Spread


@dataclass(frozen=True, slots=True)
class AnswerResult:
    """Seconds to a first token.

    Attributes:
        first_use_s: of the first question after loading.
        question_s: of a question later on.
        second_turn_s: of the second question of a conversation.
        cached_tokens: of that one's prompt, those that were still in the KV cache.
    """

    first_use_s: Spread
    question_s: Spread
    second_turn_s: Spread
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Bytes: the highest of all processes of a configuration, and at the end of the last one."""

    peak: int | None
    peak_anonymous: int | None
    at_end: ProcessMemory


@dataclass(frozen=True, slots=True)
class Figures:
    """The measurements of a configuration that ran to its end.

    Attributes:
        basis: where settings come from that were not given: "rule" for this kind of machine, "tuned" on this one, or
            "exact" arithmetic.
        settings: those in force.
        output_sha256: of the tokens it writes after a fixed prompt; more than one if it did not always write the same.
        energy: why there are no joules; None where there are.
        idle_cpu_share: processors kept busy while others were measured.
    """

    engine: str
    basis: str
    threads: int
    settings: dict[str, str]
    tokens_per_word: float
    load: LoadResult
    answers: AnswerResult
    prefill: tuple[PrefillResult, ...]
    decode: tuple[DecodeResult, ...]
    memory: MemoryResult
    output_sha256: tuple[str, ...]
    energy: str | None
    idle_cpu_share: float


@dataclass(frozen=True, slots=True)
class ConfigurationResult:
    """One configuration: `figures`, or the `problem` that ended it."""

    label: str
    artifact: str
    format: str
    weights: str
    device: str
    exact: bool
    given_settings: dict[str, str]
    total_bytes: int
    weight_bytes_per_token: int
    context_length: int
    figures: Figures | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class BandwidthResult:
    """Read bandwidth with so many threads: the best of all measurements, and how the others were."""

    threads: int
    best: Bandwidth
    gb_per_s: Spread


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything of a run.

    Attributes:
        interleaving: "together": all models stood in memory and took turns at every measurement; "reloaded": they did
            not fit, so every round loaded one after the other.
    """

    created: str
    machine: MachineReport
    plan: SpeedPlan
    interleaving: Interleaving
    bandwidth: tuple[BandwidthResult, ...]
    configurations: tuple[ConfigurationResult, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def measured(self) -> list[tuple[ConfigurationResult, Figures]]:
        """The configurations that ran to their end."""
        return [(one, one.figures) for one in self.configurations if one.figures is not None]
