"""`tune`: from an artifact to a stored result. One model is in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from normistral.artifact.artifact import Artifact
from normistral.artifact.manifest import Manifest
from normistral.errors import ResourceError, UsageError
from normistral.export.resources import estimate_running_bytes
from normistral.export.texts import load_texts
from normistral.hardware import available_memory_bytes, read_machine
from normistral.progress import NoProgress, Progress
from normistral.runtime.engines.settings import INT4_KERNEL
from normistral.runtime.loading import find_engine
from normistral.runtime.tuned import BUDGET_MINUTES, Profile, Tuned, make_key, save_tuned
from normistral.tuning.quality import quality_bound
from normistral.tuning.search import Found, OutOfTimeError, describe, duel, search
from normistral.tuning.space import Settings, exact_arithmetic, plan_search, rule_settings
from normistral.tuning.work import choose_work
from normistral.tuning.workbench import Workbench

logger = logging.getLogger(__name__)

_SEARCH_SHARE = 0.8  # of the budget; the rest is for the last duel with the rule
_TEXT = "bokmaal"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """What the user may choose.

    Attributes:
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


def tune(
    folder: Path, options: TuneOptions, progress: Progress | None = None, clock: Callable[[], float] = time.monotonic
) -> Tuned:
    """Search, and keep the result where `load` finds it.

    Ctrl-C keeps what was won by then, and is passed on.

    Raises:
        ArtifactError: damaged files.
        UsageError: a profile or context that cannot be measured.
        ResourceError: the model does not fit into memory, or the result cannot be kept.
        EngineError: the engine could not load or run it.
    """
    progress = progress or NoProgress()
    artifact = Artifact.open(folder, verify=False)
    manifest = artifact.manifest
    work = choose_work(options.profile, manifest.context_length)
    artifact.check_files()
    require_memory(folder, manifest)
    token_ids = artifact.tokenizer.encode(load_texts()[_TEXT])
    bound = quality_bound(manifest) if options.quality is None else options.quality
    now, budget_s = clock(), 60 * options.budget_minutes
    with Workbench(artifact, work, token_ids, now + budget_s * _SEARCH_SHARE, clock) as bench:
        return _tune(bench, options, bound, progress, now + budget_s)


def _tune(bench: Workbench, options: TuneOptions, bound: float, progress: Progress, deadline: float) -> Tuned:
    machine = read_machine()
    with progress.stage("exact arithmetic, to compare with"):
        bench.take_reference()
    rule = bench.settings_in_force(rule_settings(machine, bench.manifest))
    found = Found(rule)
    if not _is_within(bench, bound, rule, rule, progress):
        if options.quality is None:  # exact arithmetic may be many times slower: that is for the user to choose
            bound = bench.kl(rule)
            progress.note("only settings that keep the quality of the usual ones are taken; --quality allows others")
        else:
            progress.note("the search begins with exact arithmetic")
            found.best = bench.settings_in_force({**rule, **exact_arithmetic(machine, bench.manifest)})
    start = found.best
    stages = plan_search(machine, bench.manifest, bench.work, start)
    try:
        with progress.stage(f"comparing settings for {options.profile}", unit="measurements") as stage:
            bench.on_measured = stage.advance
            if start != rule:
                found.ratio = duel(rule, start, bench.measure).ratio
            search(
                found,
                stages,
                bench.measure,
                lambda settings: _is_within(bench, bound, settings, found.best, progress),
                progress.note,
            )
            bench.deadline = deadline
            _compare_with_rule(found, rule, start, bench)
    except OutOfTimeError:
        progress.note("the time is up; the rest is left out")
    except KeyboardInterrupt:
        if found.best != start:  # every change to it won a duel
            _keep(bench, options, found, rule, bound)
            progress.note("what was won so far is kept")
        raise
    return _keep(bench, options, found, rule, bound)


def _is_within(bench: Workbench, bound: float, settings: Settings, beside: Settings, progress: Progress) -> bool:
    """Whether settings keep the quality; says what they cost, by what they change."""
    kl = bench.kl(settings)
    changes = {name: value for name, value in settings.items() if beside.get(name) != value}
    verdict = "passes" if kl <= bound else "fails"
    progress.note(f"{describe(changes) or 'the usual settings'}: {verdict} the quality check")
    logger.info("its KL divergence from exact arithmetic: %.2g nats, at most %.2g allowed", kl, bound)
    return kl <= bound


def _compare_with_rule(found: Found, rule: Settings, start: Settings, bench: Workbench) -> None:
    """What several stages won one after the other, once more and together."""
    if len(found.wins) < 2:
        return
    fought = duel(rule, found.best, bench.measure)
    if start == rule and not fought.is_won:
        found.best, found.wins, found.ratio = dict(rule), [], 1.0
    else:
        found.ratio = fought.ratio


def _keep(bench: Workbench, options: TuneOptions, found: Found, rule: Settings, bound: float) -> Tuned:
    seconds = bench.median_seconds(rule)
    if seconds is None:
        raise ResourceError(
            "the time was up before anything was compared", "give more of it, such as --budget 10; nothing was kept"
        )
    machine = read_machine()
    # Whose products serve is left to what is compiled then, unless the search decided otherwise.
    kept = {name: value for name, value in found.best.items() if name != INT4_KERNEL or rule.get(name) != value}
    tuned = Tuned(
        make_key(bench.artifact.folder, machine, *find_engine(bench.manifest), "CPU"),
        bench.artifact.folder.name,
        datetime.now(UTC).isoformat(timespec="seconds"),
        options.profile,
        kept,
        tuple(sorted(name for name, value in found.best.items() if rule.get(name) != value)),
        seconds,
        seconds * found.ratio,
        bench.kl(found.best),
        bound,
        found.complete,
    )
    save_tuned(tuned)
    return tuned


def require_memory(folder: Path, manifest: Manifest) -> None:
    """Refuse what does not fit: a machine that swaps measures its disk.

    Raises:
        ResourceError: with the numbers.
    """
    needed, available = estimate_running_bytes(manifest), available_memory_bytes()
    if needed > available:
        raise ResourceError(
            f"{folder.name} takes about {needed / 1e9:.1f} GB to run, and {available / 1e9:.1f} GB of memory are there",
            "close other programs, or tune smaller weights (int4)",
        )
