"""A result in words: sentences computed from its figures, tables as rows of text, and the formats of figures.

The sentences are of speed, what limits it, which hardware would help, and doubts. A table's first row is the heading.
Terminal, Markdown and HTML show the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from normistral.evaluation.bench.results import BenchResult, ConfigurationResult, DecodeResult, Figures, Spread

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


_SHOWN_HASH = 12
_Cells = Callable[[ConfigurationResult, Figures], Iterable[str]]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A title, and rows; the columns behind the first `text_columns` hold numbers."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


def speed_tables(result: BenchResult) -> list[ReportTable]:
    """Tables of the measurements, a row for each configuration."""
    if not result.measured:
        return []
    contexts = [f"{n:,}" for n in result.plan.decode_contexts]
    prompts = [f"{n:,}" for n in result.plan.prefill_lengths]
    answers = [f"question of {result.plan.question_tokens}", "first after loading", "second turn"]

    def table(title: str, corner: str, columns: Sequence[str], cells: _Cells) -> ReportTable:
        rows = [(one.label, *cells(one, figures)) for one, figures in result.measured]
        return ReportTable(title, ((corner, *columns), *rows))

    tables = [
        table(
            "Writing, tokens/s",
            "after tokens",
            contexts,
            lambda one, figures: [with_range(point.tokens_per_s) for point in figures.decode],
        ),
        table(
            "Share of the read bandwidth",
            "after tokens",
            contexts,
            lambda one, figures: map(_share, figures.decode),
        ),
        table(
            "Reading, tokens/s",
            "prompt of",
            prompts,
            lambda one, figures: [with_range(point.tokens_per_s) for point in figures.prefill],
        ),
        table("Time to first token", "", answers, _answer_cells),
        table("Starting", "", ["ready after", "Python", "engine's import", "model"], _load_cells),
        table("Memory", "", ["peak", "of it not from files", "the files"], _memory_cells),
    ]
    if any(point.tokens_per_joule for _, figures in result.measured for point in figures.decode):
        tables.append(
            table(
                "Writing, tokens/joule",
                "after tokens",
                contexts,
                lambda one, figures: [with_range(point.tokens_per_joule) for point in figures.decode],
            )
        )
    return tables


def describe_machine(result: BenchResult) -> str:
    """The machine in a few words, for a title."""
    cores = f"{result.machine.physical_cores} core{'s' if result.machine.physical_cores > 1 else ''}"
    return f"{result.machine.cpu}, {cores}, {bytes_(result.machine.total_memory_bytes)} of memory"


def machine_table(result: BenchResult) -> ReportTable:
    """Table of the machine."""
    machine = result.machine
    quota = "none" if machine.cpu_quota is None else f"{machine.cpu_quota:g} CPUs"
    bandwidth = [
        (
            f"read bandwidth, {found.threads} thread{'s' if found.threads > 1 else ''}",
            f"{found.best.gb_per_s:.1f} GB/s ({found.best.kernel}, {bytes_(found.best.buffer_bytes)}); "
            f"{found.gb_per_s.low:.1f} to {found.gb_per_s.high:.1f} in {found.gb_per_s.n} measurements",
        )
        for found in result.bandwidth
    ]
    energy = sorted({figures.energy or "counted" for _, figures in result.measured})
    rows = [
        ("processor", machine.cpu),
        ("cores", f"{machine.physical_cores} ({machine.logical_cpus} logical CPUs)"),
        ("container's CPU limit", quota),
        ("instructions", " ".join(machine.instruction_sets) or "not known here"),
        ("last-level cache", bytes_(machine.last_level_cache_bytes) if machine.last_level_cache_bytes else "not told"),
        (
            "memory",
            f"{bytes_(machine.total_memory_bytes)}, {bytes_(machine.available_memory_bytes)} of it available",
        ),
        *bandwidth,
        *((("joules", ", ".join(energy)),) if energy else ()),
        ("system", machine.system),
        (
            "versions",
            ", ".join(f"{name} {found}" for name, found in {"python": machine.python, **machine.versions}.items()),
        ),
        ("measured", result.created),
    ]
    return ReportTable("Machine", (("", ""), *rows), text_columns=2)


def configuration_table(result: BenchResult) -> ReportTable:
    """Table of the configurations, with the hash of the output of each."""
    rows = []
    for one in result.configurations:
        figures = one.figures
        basis = (
            "" if figures is None else {"rule": ", default", "tuned": ", tuned here", "exact": ", exact"}[figures.basis]
        )
        settings = "" if figures is None else ", ".join(f"{key}={value}" for key, value in figures.settings.items())
        written = "" if figures is None else ", ".join(found[:_SHOWN_HASH] for found in figures.output_sha256)
        rows.append(
            (
                one.label,
                f"{one.format} {one.weights}, {one.device}{basis}",
                bytes_(one.weight_bytes_per_token),
                written,
                settings or (one.problem or ""),
            )
        )
    return ReportTable("Compared", (("", "kind", "weights/token", "output's hash", "settings in force"), *rows), 5)


def describe_method(result: BenchResult) -> list[str]:
    """Paragraphs on the method, to judge or repeat the measurements."""
    plan = result.plan
    turns = (
        "All models stood in memory and took turns at every single measurement, in another order each round."
        if result.interleaving == "together"
        else "The models did not fit into memory together: every round loaded them one after the other."
    )
    if len(result.configurations) == 1:
        turns = "There was one configuration, so nothing had to take turns."
    return [
        f"Medians of {plan.repeats} measurements after {plan.warm_ups} that did not count; in parentheses the least "
        f"and the largest. {turns} Each configuration ran in a process of its own.",
        f"Prompts are random tokens, always the same; nothing is drafted; {plan.decode_tokens} tokens are decoded "
        f"greedily at each context. The second turn adds {plan.follow_up_tokens} tokens to a question of "
        f"{plan.question_tokens} and its answer of {plan.answer_tokens}, which are in the KV cache.",
        "The read bandwidth is the best of three read kernels, measured first, before each round, and just before and "
        "after each decode, with as many threads as the engine has. A decode counts where the two agree within 10 %; "
        "else it is repeated, at most twice. A decoded token reads all weights but an input embedding that is not tied "
        "to the output layer, and the KV cache; the share is of the bandwidth around each measurement.",
        "First use is the first question after loading. Memory is of the whole process; its peak counts mapped files "
        "as far as they were resident, “not from files” what the kernel cannot drop. The output's hash is SHA-256 of "
        "the tokens written after a fixed Norwegian prompt: equal hashes, equal output.",
    ]


def _share(point: DecodeResult) -> str:
    if point.share is None:
        return f"{point.weight_gb_per_s:.1f} GB/s"
    if point.bandwidth_gb_per_s is None:
        return f"{point.share:.0%} ({point.weight_gb_per_s:.1f} GB/s)"
    return f"{point.share:.0%} of {with_range(point.bandwidth_gb_per_s)} GB/s"


def _answer_cells(one: ConfigurationResult, figures: Figures) -> Iterable[str]:
    answers = figures.answers
    return map(_timed, (answers.question_s, answers.first_use_s, answers.second_turn_s))


def _load_cells(one: ConfigurationResult, figures: Figures) -> Iterable[str]:
    load = figures.load
    return map(_timed, (load.ready_s, load.python_s, load.engine_import_s, load.model_s))


def _memory_cells(one: ConfigurationResult, figures: Figures) -> Iterable[str]:
    return map(bytes_, (figures.memory.peak, figures.memory.peak_anonymous, one.total_bytes))


def _timed(spread: Spread) -> str:
    if spread.n == 1:
        return seconds(spread.median)
    return f"{seconds(spread.median)} ({seconds(spread.low).removesuffix(' s')} to {seconds(spread.high)})"


def significant(value: float) -> str:
    """Three significant digits without an exponent: 0.0123, 1.23, 123, 1,230."""
    if value == 0:
        return "0"
    shown = float(f"{value:.3g}")
    if abs(shown) >= 100:
        return f"{shown:,.0f}"
    text = f"{shown:.12f}".rstrip("0")
    digits = 3 - len(text.lstrip("-0.").replace(".", ""))
    return (text + "0" * digits if digits > 0 else text).removesuffix(".")


def with_range(spread: Spread | None) -> str:
    """`12.3 (11.9 to 12.8)`; without the range where there was only one measurement."""
    if spread is None:
        return "–"
    if spread.n == 1:
        return significant(spread.median)
    return f"{significant(spread.median)} ({significant(spread.low)} to {significant(spread.high)})"


def seconds(value: float) -> str:
    """`3.2 ms`, `0.35 s`, `2.1 s`, `12 s`, `3 min`: as precise as a person cares."""
    if value < 0.00995:
        return f"{value * 1000:.1f} ms"
    if value >= 120:
        return f"{value / 60:.0f} min"
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f} s"


def bytes_(count: int | None) -> str:
    """In 10^9 or 10^6 bytes; a dash where it is not known."""
    if count is None:
        return "–"
    return f"{significant(count / 1e9)} GB" if count >= 1e9 else f"{significant(count / 1e6)} MB"
