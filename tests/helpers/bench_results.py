"""Results for tests of what is made of them: figures of a made-up machine."""

import dataclasses

from normistral.evaluation.bench.machine import Bandwidth, MachineReport, ProcessMemory
from normistral.evaluation.bench.results import (
    AnswerResult,
    BandwidthResult,
    BenchResult,
    ConfigurationResult,
    DecodeResult,
    Figures,
    LoadResult,
    MemoryResult,
    PrefillResult,
    Spread,
)
from normistral.evaluation.bench.speed import SpeedPlan

PLAN = SpeedPlan(prefill_lengths=(128, 512), decode_contexts=(16, 2048))
WEIGHTS = 4_000_000_000
CEILING = 50.0  # GB/s


def steady(median: float) -> Spread:
    """Within 2 %."""
    return Spread(median, median * 0.99, median * 1.01, 5)


def make_figures(*, writes: float = 10.0, reads: float = 80.0, **changes) -> Figures:
    gb_per_s = writes * WEIGHTS / 1e9
    figures = Figures(
        engine="openvino",
        basis="tuned",
        threads=8,
        settings={"INFERENCE_NUM_THREADS": "8"},
        tokens_per_word=1.5,
        load=LoadResult(Spread(6.0, 6.0, 6.0, 1), *[Spread(2.0, 2.0, 2.0, 1)] * 3),
        answers=AnswerResult(Spread(4.0, 4.0, 4.0, 1), steady(2.5), steady(0.7), 231),
        prefill=(PrefillResult(128, steady(reads), None), PrefillResult(512, steady(reads * 1.1), None)),
        decode=(
            DecodeResult(16, steady(writes), gb_per_s, gb_per_s / CEILING, None),
            DecodeResult(2048, steady(writes * 0.8), gb_per_s * 0.8, gb_per_s * 0.8 / CEILING, None),
        ),
        memory=MemoryResult(
            8_100_000_000, 4_200_000_000, ProcessMemory(8_100_000_000, 8_000_000_000, 4_200_000_000, 1)
        ),
        output_sha256=("ab" * 32,),
        energy="not exposed by this machine",
        idle_cpu_share=0.0,
    )
    return dataclasses.replace(figures, **changes)


def make_configuration(label: str = "sju", figures: Figures | None = None, **changes) -> ConfigurationResult:
    one = ConfigurationResult(
        label=label,
        artifact=label,
        format="openvino",
        weights="int4",
        device="CPU",
        exact=False,
        given_settings={},
        total_bytes=WEIGHTS,
        weight_bytes_per_token=WEIGHTS,
        context_length=32768,
        figures=figures or make_figures(),
        problem=None,
    )
    return dataclasses.replace(one, **changes)


def make_result(*configurations: ConfigurationResult, **changes) -> BenchResult:
    best = Bandwidth(8, 2**30, CEILING, "dot of float32", {"dot of float32": CEILING})
    machine = MachineReport(
        cpu="Prosessor på Åsen",
        physical_cores=8,
        logical_cpus=16,
        cpu_quota=None,
        planned_threads=8,
        instruction_sets=("avx2", "fma"),
        total_memory_bytes=64 * 10**9,
        available_memory_bytes=60 * 10**9,
        last_level_cache_bytes=32 * 2**20,
        system="Linux",
        python="3.11.7",
        versions={"normistral": "0.1.0"},
    )
    result = BenchResult(
        created="2026-11-24T12:00:00+00:00",
        machine=machine,
        plan=PLAN,
        interleaving="together",
        bandwidth=(BandwidthResult(8, best, Spread(49.0, 47.0, CEILING, 6)),),
        configurations=configurations or (make_configuration(),),
    )
    return dataclasses.replace(result, **changes)
