"""Sentences about a result, computed from its figures: speed, what limits it, which hardware would help, doubts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from normistral.evaluation.bench.results import BenchResult, ConfigurationResult, Figures, Spread
from normistral.evaluation.bench.tables import bytes_, seconds, significant

PAGE_WORDS = 400  # a page of prose
READING_WORDS_PER_S = 4  # silent reading: 238 words a minute (Brysbaert 2019, doi:10.1016/j.jml.2019.104047)
_MEMORY_BOUND, _COMPUTE_BOUND = 0.7, 0.4  # shares of the read bandwidth
_CACHE_TIMES = 4  # weights of less than so many caches are partly read from there
_NOISY_SPEED, _NOISY_BANDWIDTH = 0.15, 0.25  # widths of a spread
_IMPOSSIBLE = 1.05  # a share that memory cannot give
_BUSY_IDLE = 0.05  # of a processor

Bound = Literal["memory", "both", "compute"]


def judge_bound(share: float) -> Bound:
    """The limit of decoding that reaches this share of the read bandwidth."""
    if share >= _MEMORY_BOUND:
        return "memory"
    return "both" if share >= _COMPUTE_BOUND else "compute"


@dataclass(frozen=True, slots=True)
class BenchSummary:
    """Sentences about the figures.

    Attributes:
        comparison: of the fastest ones; empty where there is nothing to compare.
        configurations: label -> what to expect of it.
        doubts: why the figures may not be those of the machine.
    """

    comparison: tuple[str, ...]
    configurations: dict[str, tuple[str, ...]]
    doubts: tuple[str, ...]


def summarise(result: BenchResult) -> BenchSummary:
    """The sentences that a report begins with."""
    configurations = {one.label: tuple(_describe(one, result)) for one in result.configurations}
    return BenchSummary(tuple(_compare(result)), configurations, tuple(find_doubts(result)))


def _describe(one: ConfigurationResult, result: BenchResult) -> Iterator[str]:
    figures = one.figures
    if figures is None:
        yield f"It could not be measured: {one.problem}."
        return
    yield describe_writing(figures)
    yield describe_reading(figures)
    memory = "" if figures.memory.peak is None else f"takes {bytes_(figures.memory.peak)} of memory at most and "
    yield f"It {memory}is ready {seconds(figures.load.ready_s.median)} after its start."
    joules = figures.decode[0].tokens_per_joule
    if joules is not None:
        yield f"A watt-hour writes about {significant(joules.median / figures.tokens_per_word * 3600)} words."
    yield describe_bound(one, figures, result)


def describe_writing(figures: Figures) -> str:
    """Decode speed, and how it falls with the context."""
    short, long = figures.decode[0], figures.decode[-1]
    words = short.tokens_per_s.median / figures.tokens_per_word
    text = (
        f"It writes {significant(short.tokens_per_s.median)} tokens a second, about {_estimate(words)} Norwegian words "
        f"({_beside_reading(words)})"
    )
    if long.context > short.context and not long.tokens_per_s.overlaps(short.tokens_per_s):
        text += f", and {significant(long.tokens_per_s.median)} after {long.context:,} tokens of conversation"
    return f"{text}."


def _beside_reading(words_per_s: float) -> str:
    if words_per_s > 1.25 * READING_WORDS_PER_S:
        return "faster than people read"
    return "slower than people read" if words_per_s < 0.8 * READING_WORDS_PER_S else "about as fast as people read"


def _estimate(words: float) -> str:
    """At most two digits: tokens per word differ from text to text."""
    return f"{words:.0f}" if words >= 9.95 else f"{words:.1f}"


def describe_reading(figures: Figures) -> str:
    """Prefill speed as a page's time, and the time to first token."""
    page_tokens = PAGE_WORDS * figures.tokens_per_word
    closest = min(figures.prefill, key=lambda one: abs(one.length - page_tokens))
    page_s = page_tokens / closest.tokens_per_s.median
    answers = figures.answers
    return (
        f"It reads a page ({PAGE_WORDS} words) in {seconds(page_s)}, begins to answer a question after "
        f"{seconds(answers.question_s.median)}, and the next one after {seconds(answers.second_turn_s.median)}."
    )


def describe_bound(one: ConfigurationResult, figures: Figures, result: BenchResult) -> str:
    """The limit of decoding, and the hardware that would help."""
    decode = figures.decode[0]
    if decode.share is None:
        return f"The memory of {one.device} was not measured, so nothing is said of what limits it."
    ceiling = next(found.best.gb_per_s for found in result.bandwidth if found.threads == figures.threads)
    if decode.bandwidth_gb_per_s is not None:
        ceiling = decode.bandwidth_gb_per_s.median
    reached = f"Writing reads weights at {decode.weight_gb_per_s:.1f} GB/s, {decode.share:.0%} of what memory gives "
    reached += f"({ceiling:.1f} GB/s)"
    if _is_cached(one, result):
        return f"{reached}. So small a model lies partly in the processor's caches: this says little of larger ones."
    match judge_bound(decode.share):
        case "memory":
            return f"{reached}: faster memory, or smaller weights, would help; more cores would not."
        case "both":
            return f"{reached}: both hold it back; faster memory would help somewhat, and so would more cores."
        case "compute":
            return f"{reached}: arithmetic is the limit; more or faster cores would help, faster memory hardly."


def _is_cached(one: ConfigurationResult, result: BenchResult) -> bool:
    return one.weight_bytes_per_token < _CACHE_TIMES * result.machine.last_level_cache_bytes


def _compare(result: BenchResult) -> Iterator[str]:
    """The fastest configuration, where the measurements tell."""
    if len(result.measured) < 2:
        return
    kinds: list[tuple[str, Callable[[Figures], Spread]]] = [
        ("writes", lambda figures: figures.decode[0].tokens_per_s),
        ("reads", lambda figures: figures.prefill[-1].tokens_per_s),
    ]
    for verb, speed in kinds:
        ranked = sorted(result.measured, key=lambda pair: -speed(pair[1]).median)
        (first, first_figures), (second, second_figures) = ranked[:2]
        fastest, next_one = speed(first_figures), speed(second_figures)
        memory = [found.decode[0].bandwidth_gb_per_s for found in (first_figures, second_figures)]
        apart = verb == "writes" and memory[0] and memory[1] and not memory[0].overlaps(memory[1])
        if fastest.overlaps(next_one) or apart:
            yield f"{first.label} and {second.label}: which {verb} faster cannot be told from these measurements."
        else:
            times = fastest.median / next_one.median
            yield f"{first.label} {verb} fastest, {times:.2f} times as fast as {second.label}."


def find_doubts(result: BenchResult) -> Iterator[str]:
    """Why the figures may not be those of the machine."""
    for one, figures in result.measured:
        dropped = sum(point.dropped for point in figures.decode)
        if dropped:
            yield (
                f"{one.label}: {dropped} decode measurements did not count, because memory changed its speed meanwhile."
            )
        noisy = [point for point in figures.decode if point.tokens_per_s.width > _NOISY_SPEED]
        if noisy:
            widest = max(noisy, key=lambda point: point.tokens_per_s.width)
            yield (
                f"{one.label} wrote between {significant(widest.tokens_per_s.low)} and "
                f"{significant(widest.tokens_per_s.high)} tokens a second after the same {widest.context:,} tokens: "
                "the machine was busy or changed its clock. Measure again when it is quiet."
            )
        if (figures.decode[0].share or 0) > _IMPOSSIBLE and not _is_cached(one, result):
            yield f"{one.label} read its weights faster than memory was read before: that figure is too low."
        if len(figures.output_sha256) > 1:
            yield f"{one.label} did not always write the same tokens after the same prompt."
        if result.interleaving == "together" and figures.idle_cpu_share > _BUSY_IDLE:  # else nobody else was measured
            yield f"{one.label} kept a processor {figures.idle_cpu_share:.0%} busy while others were measured."
    for found in result.bandwidth:
        if found.gb_per_s.width > _NOISY_BANDWIDTH:
            yield (
                f"Memory was read at {found.gb_per_s.low:.1f} to {found.gb_per_s.high:.1f} GB/s with "
                f"{found.threads} threads during the run."
            )
    cache_bytes = result.machine.last_level_cache_bytes
    if any(found.best.buffer_bytes < _CACHE_TIMES * cache_bytes for found in result.bandwidth):
        yield "There was too little memory to measure it with four times the cache; its figure may be too high."
