"""Runs a benchmark: every configuration in a process of its own, interleaved, so that drift does not decide.

A machine gets slower when it gets warm or busy. So no configuration is measured to its end before the next: where
all models fit into memory together they take turns at every single measurement, in an order that moves on by one
each round; otherwise every round loads them one after the other. The read bandwidth is measured first, and again
before each round, by a process that holds no model; and just before and after each decode, which counts where the two
agree: the memory of virtual machines changes its speed within a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter

from normistral.errors import NormistralError, ResourceError
from normistral.evaluation.bench.configuration import Configuration, Samples
from normistral.evaluation.bench.machine import SINGLE_THREADED_BLAS, Bandwidth, choose_buffer_bytes, report_machine
from normistral.evaluation.bench.results import BandwidthResult, BenchResult, Interleaving, Spread
from normistral.evaluation.bench.speed import SpeedPlan
from normistral.evaluation.bench.worker import Measurer, Worker
from normistral.hardware import available_memory_bytes
from normistral.progress import NoProgress, Progress, Stage

_RESERVE_BYTES = 2**30  # for everything else while models share the memory
_MEASURABLE_DEVICE = "CPU"  # the bandwidth of other devices' memory is not measured


@dataclass(slots=True)
class _Run:
    plan: SpeedPlan
    planned_threads: int
    cache_bytes: int
    samples: list[Samples]
    stage: Stage
    bandwidths: dict[int, list[Bandwidth]] = field(default_factory=dict)
    seed: int = 0

    @property
    def alive(self) -> list[Samples]:
        return [samples for samples in self.samples if samples.problem is None]

    def next_seed(self) -> int:
        self.seed += 1
        return self.seed


def count_measurements(plan: SpeedPlan, configurations: int, interleaving: Interleaving) -> int:
    """Of all rounds, warm-ups included: passes and conversations. A model that is loaded again is warmed up again."""
    rounds = plan.repeats + plan.warm_ups if interleaving == "together" else plan.repeats * (1 + plan.warm_ups)
    return rounds * (len(plan.points) + 1) * configurations


def run_benchmark(
    configurations: Sequence[Configuration], plan: SpeedPlan, progress: Progress | None = None
) -> BenchResult:
    """Measure all configurations.

    One that fails is left out of the remaining rounds, and the result says why.

    Raises:
        ResourceError: there is not enough memory for one of them.
        NormistralError: the read bandwidth could not be measured.
    """
    machine, progress = report_machine(), progress or NoProgress()
    interleaving = choose_interleaving(configurations, plan, available_memory_bytes())
    samples = [Samples(configuration) for configuration in configurations]
    count = count_measurements(plan, len(configurations), interleaving)
    with progress.stage("measuring", count, "measurements") as stage:
        run = _Run(plan, machine.planned_threads, machine.last_level_cache_bytes, samples, stage)
        if interleaving == "reloaded":
            progress.note("the models do not fit into memory together: every round loads them one after the other")
        _measure_bandwidth(run)
        best = max(one.gb_per_s for found in run.bandwidths.values() for one in found)
        progress.note(f"memory is read at {best:.1f} GB/s")
        (_take_turns if interleaving == "together" else _load_in_turns)(run)
        if not _thread_counts(run) <= run.bandwidths.keys():  # settings that were tuned earlier are known once loaded
            _measure_bandwidth(run)
    ceilings = {threads: max(one.gb_per_s for one in found) for threads, found in run.bandwidths.items()}
    return BenchResult(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        plan=plan,
        interleaving=interleaving,
        bandwidth=tuple(_summarise_bandwidth(found) for _, found in sorted(run.bandwidths.items())),
        configurations=tuple(
            samples.result(plan, _ceiling(samples, ceilings, run.planned_threads), run.planned_threads)
            for samples in run.samples
        ),
    )


def choose_interleaving(configurations: Sequence[Configuration], plan: SpeedPlan, available_bytes: int) -> Interleaving:
    """ "together" if all models fit into memory at once, else "reloaded".

    Raises:
        ResourceError: one of them does not fit by itself.
    """
    tokens = plan.most_tokens
    for configuration in configurations:
        if configuration.least_bytes(tokens) > available_bytes:
            raise ResourceError(
                f"{configuration.label} needs at least {configuration.least_bytes(tokens) / 1e9:.1f} GB of memory; "
                f"{available_bytes / 1e9:.1f} GB are available",
                "close other programs, take smaller weights (int4), or measure at shorter contexts",
            )
    needed = sum(configuration.likely_bytes(tokens) for configuration in configurations)
    return "together" if len(configurations) == 1 or needed + _RESERVE_BYTES <= available_bytes else "reloaded"


def _take_turns(run: _Run) -> None:
    """All models in memory; each measurement of one is followed by the same of the next."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for samples in run.samples:
            worker = stack.enter_context(Worker(samples.configuration.label))
            workers[samples.configuration.label] = worker
            with _failing(samples, worker):
                _start(worker, samples, run)
        for number in range(-run.plan.warm_ups, run.plan.repeats):
            if number >= 0:
                _measure_bandwidth(run)
            for point in [*run.plan.points, None]:
                for samples in _rotated(run.alive, number):
                    worker = workers[samples.configuration.label]
                    with _failing(samples, worker):
                        _measure(worker, samples, point, run, keep=number >= 0)
                    run.stage.advance(1)
        for samples in run.alive:
            with _failing(samples):
                _finish(workers[samples.configuration.label], samples)


def _load_in_turns(run: _Run) -> None:
    """One model in memory at a time; every round loads them all, one after the other."""
    for number in range(run.plan.repeats):
        _measure_bandwidth(run)
        for samples in _rotated(run.alive, number):
            with _failing(samples), Worker(samples.configuration.label) as worker:
                _start(worker, samples, run)
                for warm in range(-run.plan.warm_ups, 1):
                    for point in [*run.plan.points, None]:
                        _measure(worker, samples, point, run, keep=warm == 0)
                        run.stage.advance(1)
                _finish(worker, samples)


def _start(worker: Worker, samples: Samples, run: _Run) -> None:
    one = samples.configuration
    loaded = worker.ask(Measurer.load, one.folder, one.manifest.format, one.engine)
    samples.loads.append((perf_counter() - worker.started, loaded))
    samples.first_uses.append(worker.ask(Measurer.first_token, run.plan.question_tokens, run.next_seed()))
    samples.fingerprints.append(worker.ask(Measurer.fingerprint))


def _measure(worker: Worker, samples: Samples, point: tuple[int, int] | None, run: _Run, *, keep: bool) -> None:
    """One pass, or without a point the conversation."""
    if point is None:
        conversation = worker.ask(Measurer.conversation, run.plan, run.next_seed())
        if keep:
            samples.conversations.append(conversation)
        return
    length, decode_tokens = point
    meter = None
    if keep and decode_tokens and samples.configuration.engine.device == _MEASURABLE_DEVICE:
        meter = samples.threads(run.planned_threads), _buffer_bytes(run)
    measured = worker.ask(Measurer.one_pass, length, decode_tokens, run.next_seed(), meter)
    if keep:
        samples.passes[length].append(measured)


def _finish(worker: Worker, samples: Samples) -> None:
    samples.fingerprints.append(worker.ask(Measurer.fingerprint))
    samples.accounts.append(worker.ask(Measurer.account))


@contextmanager
def _failing(samples: Samples, worker: Worker | None = None) -> Iterator[None]:
    """An error in the block ends this configuration, with its process, and no other."""
    try:
        yield
    except NormistralError as error:
        samples.problem = f"{error.message} ({error.hint})" if error.hint else error.message
        if worker is not None:
            worker.close()


def _rotated(samples: list[Samples], number: int) -> list[Samples]:
    start = number % len(samples) if samples else 0
    return samples[start:] + samples[:start]


def _measure_bandwidth(run: _Run) -> None:
    """Once for each number of threads that is computed with."""
    buffer_bytes = _buffer_bytes(run)
    with Worker("the read bandwidth", SINGLE_THREADED_BLAS) as worker:
        for threads in sorted(_thread_counts(run)):
            run.bandwidths.setdefault(threads, []).append(worker.ask(Measurer.read_bandwidth, threads, buffer_bytes))


def _buffer_bytes(run: _Run) -> int:
    return choose_buffer_bytes(run.cache_bytes, available_memory_bytes())


def _thread_counts(run: _Run) -> set[int]:
    return {samples.threads(run.planned_threads) for samples in run.samples}


def _summarise_bandwidth(found: list[Bandwidth]) -> BandwidthResult:
    spread = Spread.of(one.gb_per_s for one in found)
    assert spread is not None
    best = max(found, key=lambda one: one.gb_per_s)
    return BandwidthResult(best.threads, best, spread)


def _ceiling(samples: Samples, ceilings: dict[int, float], planned_threads: int) -> float | None:
    if samples.configuration.engine.device != _MEASURABLE_DEVICE:
        return None
    return ceilings[samples.threads(planned_threads)]
