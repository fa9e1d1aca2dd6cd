"""Search for the fastest settings of an artifact on this machine (`normistral tune`).

Hill climbing: each variant is measured once beside the best settings so far; one that is faster and keeps the quality
meets them in a paired test, and takes their place only if it is faster by more than the noise. Nothing is compared
across time, because machines drift. One model is in memory at a time. docs/decisions.md, "Settings and tuning".
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import EngineError, ResourceError, UsageError
from normistral.evaluation.bench.speed import measure_pass
from normistral.evaluation.metrics import compare_logits
from normistral.evaluation.quality import ModelPredictor
from normistral.evaluation.windows import Window
from normistral.export.resources import estimate_running_bytes
from normistral.export.texts import load_texts
from normistral.hardware import Machine, available_memory_bytes, plan_threads, read_machine
from normistral.progress import NoProgress, Progress, Stage
from normistral.runtime.collect_env import heuristic_settings
from normistral.runtime.engines.base import Logits
from normistral.runtime.engines.settings import (
    ENGINES_KERNEL,
    INT4_KERNEL,
    OUR_KERNEL,
    PREFILL_CHUNK,
    EngineConfig,
)
from normistral.runtime.loading import find_engine, open_model
from normistral.runtime.model import Model
from normistral.runtime.tuned import BUDGET_MINUTES, Profile, Tuned, make_key, save_tuned

logger = logging.getLogger(__name__)

PAIRS, MORE_PAIRS = 5, 3  # the latter only after exactly one lost pair
LEAST_GAIN = 0.02
_DECODED = 16  # tokens that are timed, for answers of any length
_LEAST_PROMPT = 8
_PROBE_TOKENS = 300
_CHUNKS = (64, 128, 256, 512, 1024)
# Quality: both errors are small and independent, KL is quadratic in them, and so they add. Half of what quantizing the
# weights cost is left for the settings, within bounds (nats); the last one where the manifest does not say.
_SHARE_OF_WEIGHTS, _LEAST_BOUND, _LARGEST_BOUND, _UNKNOWN_BOUND = 0.5, 0.001, 0.02, 0.005
# Chosen by the engine where nobody does, and varied here: the search begins with them.
_REPORTED = frozenset(
    {"INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION", "ENABLE_CPU_PINNING"}
    | {"accuracy_level", "activation_bits", INT4_KERNEL}
)

Settings = Mapping[str, str]


class BudgetSpentError(Exception):
    """No time is left to measure."""


class Workload(NamedTuple):
    """One request, in tokens. Its seconds: those of the prompt, and answer times those of a decoded token."""

    prompt: int
    answer: int


# A question with some history and a page of answer; a long text and a line about it; many of middling length.
WORKLOADS: dict[Profile, Workload] = {
    "chat": Workload(200, 200),
    "documents": Workload(1024, 32),
    "batch": Workload(512, 100),
}


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """Choices of the user.

    Attributes:
        profile: the workload.
        budget_minutes: after which nothing new is measured.
        quality: mean KL divergence (nats) from exact arithmetic that settings may cost; None: `quality_bound`.
    """

    profile: Profile = "chat"
    budget_minutes: float = BUDGET_MINUTES
    quality: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.budget_minutes <= 24 * 60:
            raise UsageError(f"a budget of {self.budget_minutes:g} minutes is none", "give up to a day, such as 5")
        if self.quality is not None and not 0 <= self.quality < float("inf"):
            raise UsageError(f"a quality bound of {self.quality:g} is none", "give 0 or more, such as 0.005")


def choose_workload(profile: str, context_length: int) -> Workload:
    """The workload of a profile, with a shorter prompt where the context has no room for it.

    Raises:
        UsageError: no such profile, or a context that is too short for any.
    """
    work = next((work for name, work in WORKLOADS.items() if name == profile), None)
    if work is None:
        raise UsageError(f"there is no profile {profile!r}", f"take one of: {', '.join(WORKLOADS)}")
    prompt = min(work.prompt, context_length - _DECODED)
    if prompt < _LEAST_PROMPT:
        raise UsageError(f"a context of {context_length} tokens is too short for anything to be measured")
    return work._replace(prompt=prompt)


def quality_bound(manifest: Manifest) -> float:
    """Mean KL divergence (nats) from exact arithmetic that settings may cost at most."""
    weights = (manifest.quality or {}).get("probe_kl_nats")
    return _UNKNOWN_BOUND if weights is None else min(max(_SHARE_OF_WEIGHTS * weights, _LEAST_BOUND), _LARGEST_BOUND)


def variants_to_try(machine: Machine, manifest: Manifest, work: Workload, start: Settings) -> Iterator[dict[str, str]]:
    """Changes of settings, each to be laid over the best so far; the most telling first."""
    planned, cores = plan_threads(machine), machine.physical_cores
    counts = {planned - 1, cores // 2, cores, planned + 1 if machine.cpu_quota else machine.logical_cpus}
    threads = sorted(n for n in counts if n >= 1 and n != planned and (not machine.cpu_quota or n <= cores))
    if manifest.format == "openvino":
        if start.get(INT4_KERNEL) == OUR_KERNEL:
            yield {INT4_KERNEL: ENGINES_KERNEL}
        sets = machine.instruction_sets  # where nothing is known of a machine, everything is tried
        halves = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "f16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
        precisions = ["f32", *(name for name, having in halves.items() if sets & having)]
        # Activations are quantized only for weights that are, and that pays only with int8 dot products.
        quantized = manifest.recipe.weights in ("int4", "int8") and (not sets or sets & hardware.INT8_DOT_PRODUCT)
        for precision in precisions:  # beside half floats the size of groups matters less
            for group in ["0", *(("32", "64", "128") if precision == "f32" else ("64",))] if quantized else ["0"]:
                yield {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        for number in threads:
            more = {"ENABLE_HYPER_THREADING": "YES"} if number > cores else {}
            yield {"INFERENCE_NUM_THREADS": str(number)} | more
        yield {"ENABLE_CPU_PINNING": "NO"}
        yield from ({"KV_CACHE_PRECISION": precision} for precision in ("u8", *precisions))
    else:
        if manifest.recipe.graph == "fused" and manifest.recipe.weights == "int4":
            yield from ({"accuracy_level": level} for level in ("1", "4"))
        if manifest.recipe.graph == "fused" and manifest.recipe.weights == "int8":  # level 1 takes 25 times as long
            yield from ({"activation_bits": bits} for bits in ("8", "16"))
        yield from ({"intra_op_num_threads": str(number)} for number in threads)
        yield from ({"session.intra_op.allow_spinning": switch} for switch in ("0", "1"))
    largest = next((size for size in _CHUNKS if size >= work.prompt), _CHUNKS[-1])  # larger ones change nothing
    yield from ({PREFILL_CHUNK: str(size)} for size in _CHUNKS if size <= largest)


def paired_gain(best: Settings, challenger: Settings, measure: Callable[[Settings], float]) -> float | None:
    """Seconds of the challenger as a multiple of the best's (median of pairs); None unless it is faster beyond noise.

    It is where 5 of 5 pairs agree, or 7 of 8, and the median is 2 % faster. By the pairs alone equal settings would win
    in 1 of 20 tests (1/32 + 5/32 · 1/8). The order alternates, so that a drift helps neither.
    """
    ratios: list[float] = []
    lost = 0
    while len(ratios) < PAIRS or (lost == 1 and len(ratios) < PAIRS + MORE_PAIRS):
        if len(ratios) % 2:
            after, before = measure(challenger), measure(best)
        else:
            before, after = measure(best), measure(challenger)
        ratios.append(after / before)
        lost += after >= before
        if lost > 1:
            return None
    ratio = statistics.median(ratios)
    return ratio if lost <= (len(ratios) > PAIRS) and ratio <= 1 - LEAST_GAIN else None


def predict(model: Model, token_ids: Sequence[int]) -> Logits:
    """Logits [n, vocabulary] after every token."""
    return next(ModelPredictor(model).predict([Window((*token_ids, 0), 0, len(token_ids))]))


def settings_kl(exact: Logits, model: Model, token_ids: Sequence[int]) -> float:
    """Mean KL(exact || these settings) in nats; infinite for logits that are not finite."""
    logits = predict(model, token_ids)
    return compare_logits(exact, logits)[0] if np.isfinite(logits).all() else float("inf")


def measure_work(model: Model, work: Workload, seeds: Iterator[int]) -> float:
    """Seconds of the workload on a loaded model, with bench's measurement of a prompt and decoded tokens after it."""
    warm_up = min(work.prompt, model.capabilities.prefill_chunk)  # kernels are compiled; a server pays for that once
    measure_pass(model, warm_up, 1, next(seeds))
    measured = measure_pass(model, work.prompt, _DECODED - 1, next(seeds))
    return measured.prefill_s + work.answer * measured.decode_s / max(1, measured.decode_tokens)


def tune(
    folder: Path, options: TuneOptions, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
) -> Tuned:
    """Search, and keep the result where `load` finds it. Ctrl-C keeps what was won by then, and is passed on.

    Raises:
        ArtifactError: damaged files.
        UsageError: a profile or context that cannot be measured, or a quality that the usual settings do not keep.
        ResourceError: the model does not fit into memory, or the result cannot be kept.
        EngineError: the engine could not load or run it.
    """
    deadline = clock() + 60 * options.budget_minutes
    artifact = Artifact.open(folder, verify=False)
    work = choose_workload(options.profile, artifact.manifest.context_length)
    artifact.check_files()
    needed, available = estimate_running_bytes(artifact.manifest), available_memory_bytes()
    if needed > available:  # a machine that swaps measures its disk
        raise ResourceError(
            f"{artifact.name} takes about {needed / 1e9:.1f} GB to run, and {available / 1e9:.1f} GB of memory are "
            "there",
            "close other programs, or tune smaller weights (int4)",
        )
    search = _Search(artifact, work, options, progress or NoProgress(), lambda: clock() > deadline)
    try:
        return search.run()
    finally:
        search.close()


class _Search:
    """Loads the artifact with one set of settings after the other, and keeps the best."""

    def __init__(
        self, artifact: Artifact, work: Workload, options: TuneOptions, progress: Progress, is_over: Callable[[], bool]
    ) -> None:
        self.artifact, self.work, self.options, self.progress, self.is_over = artifact, work, options, progress, is_over
        self.machine, self.seeds = read_machine(), count(1)
        self.model: Model | None = None
        self.loaded: Settings | None = None
        self.heuristic_s: list[float] = []
        self.kls: dict[frozenset[tuple[str, str]], float] = {}
        self.probe = artifact.tokenizer.encode(load_texts()["bokmaal"])
        self.probe = self.probe[: min(_PROBE_TOKENS, artifact.manifest.context_length)]
        with progress.stage("exact arithmetic, to compare with"):
            self.exact = predict(self.load(EngineConfig(exact=True)), self.probe)
        # As tuned settings, which the engine may adapt: for the heuristic's that is right.
        wanted = heuristic_settings(self.machine, artifact.manifest)
        in_force = self.load(EngineConfig(tuned=wanted)).capabilities.settings
        self.heuristic = {
            name: value
            for name, value in in_force.items()
            if name in wanted or (name in _REPORTED and "," not in value)  # "1,4": a graph with both levels
        }
        self.best, self.ratio, self.complete = self.heuristic, 1.0, False
        self.bound = quality_bound(artifact.manifest) if options.quality is None else options.quality

    def run(self) -> Tuned:
        if not self.keeps_quality(self.heuristic):
            kl = self.kl(self.heuristic)
            if self.options.quality is not None:
                raise UsageError(
                    f"the usual settings cost a KL divergence of {kl:.2g}; --quality allows {self.bound:g}",
                    "allow more; exact arithmetic (--exact) costs nothing, and is slower",
                )
            self.bound = kl
            self.progress.note(
                "only settings that keep the quality of the usual ones are taken; --quality allows others"
            )
        try:
            with self.progress.stage(f"comparing settings for {self.options.profile}", unit="measurements") as stage:
                for variant in variants_to_try(self.machine, self.artifact.manifest, self.work, self.heuristic):
                    self.try_variant(variant, stage)
                self.complete = True
        except BudgetSpentError:
            self.progress.note("the time is up; the rest is left out")
        except KeyboardInterrupt:
            if self.best != self.heuristic:  # every change to it won a paired test
                self.save()
                self.progress.note("what was won so far is kept")
            raise
        return self.save()

    def try_variant(self, variant: dict[str, str], stage: Stage) -> None:
        """Make a change part of the best settings where it is faster and keeps the quality."""

        def measure(settings: Settings) -> float:
            if self.is_over():
                raise BudgetSpentError
            seconds = measure_work(self.load_settings(settings), self.work, self.seeds)
            if settings == self.heuristic:
                self.heuristic_s.append(seconds)
            stage.advance(1)
            return seconds

        settings = {**self.best, **variant}
        if settings == self.best:
            return
        try:
            if measure(self.best) <= measure(settings) or not self.keeps_quality(settings):
                return
        except (UsageError, EngineError) as exc:
            self.progress.note(f"{_listed(variant)}: {exc.message}")
            return
        if (ratio := paired_gain(self.best, settings, measure)) is not None:
            self.progress.note(f"{_listed(variant)} is {1 / ratio - 1:.0%} faster")
            self.best, self.ratio = settings, self.ratio * ratio

    def keeps_quality(self, settings: Settings) -> bool:
        """True if the KL divergence is within the bound; prints a note."""
        kl = self.kl(settings)
        changes = {name: value for name, value in settings.items() if self.best.get(name) != value}
        verdict = "passes" if kl <= self.bound else "fails"
        self.progress.note(f"{_listed(changes) or 'the usual settings'}: {verdict} the quality check")
        logger.info("its KL divergence from exact arithmetic: %.2g nats, at most %.2g allowed", kl, self.bound)
        return kl <= self.bound

    def kl(self, settings: Settings) -> float:
        """Mean KL divergence from exact arithmetic, nats; infinite where logits are not finite. Measured once."""
        key = frozenset(settings.items())
        if key not in self.kls:
            self.kls[key] = settings_kl(self.exact, self.load_settings(settings), self.probe)
        return self.kls[key]

    def load_settings(self, settings: Settings) -> Model:
        """A model with these settings; the one in memory where they are its own."""
        if self.model is None or self.loaded != settings:
            self.load(EngineConfig(settings=settings))
            self.loaded = settings
        assert self.model is not None
        return self.model

    def load(self, config: EngineConfig) -> Model:
        """A model, in the place of the one before."""
        self.close()
        self.model = open_model(self.artifact, config)
        return self.model

    def close(self) -> None:
        if self.model is not None:
            self.model.close()
        self.model = self.loaded = None

    def save(self) -> Tuned:
        if not self.heuristic_s:
            raise ResourceError(
                "the time was up before anything was compared", "give more of it, such as --budget 10; nothing was kept"
            )
        seconds = statistics.median(self.heuristic_s)
        changed = {name: value for name, value in self.best.items() if self.heuristic.get(name) != value}
        tuned = Tuned(
            make_key(self.artifact.folder, self.machine, *find_engine(self.artifact.manifest), "CPU"),
            self.artifact.name,
            datetime.now(UTC).isoformat(timespec="seconds"),
            self.options.profile,
            # Whose products serve is left to what is compiled then, unless the search decided otherwise.
            {name: value for name, value in self.best.items() if name != INT4_KERNEL or name in changed},
            tuple(sorted(changed)),
            seconds,
            seconds * self.ratio,
            self.kl(self.best),
            self.bound,
            self.complete,
        )
        save_tuned(tuned)
        return tuned


def _listed(settings: Settings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
