"""Tables of a result as rows of text, the first one the heading; and the formats of its figures.

Terminal, Markdown and HTML show the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normistral.evaluation.bench.results import BenchResult, ConfigurationResult, Figures, Spread

_SHOWN_HASH = 12
_Cells = Callable[[ConfigurationResult, Figures], Sequence[str]]


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A title, and rows; the columns behind the first `text_columns` hold numbers."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1


def speed_tables(result: BenchResult) -> list[ReportTable]:
    """Tables of the measurements."""
    if not result.measured:
        return []
    tables = [
        _by_configuration(
            "Writing, tokens/s", "after tokens", result, [f"{n:,}" for n in result.plan.decode_contexts], _decode_cells
        ),
        _by_configuration(
            "Share of the read bandwidth",
            "after tokens",
            result,
            [f"{n:,}" for n in result.plan.decode_contexts],
            _share_cells,
        ),
        _by_configuration(
            "Reading, tokens/s", "prompt of", result, [f"{n:,}" for n in result.plan.prefill_lengths], _prefill_cells
        ),
        _by_configuration(
            "Time to first token",
            "",
            result,
            [f"question of {result.plan.question_tokens}", "first after loading", "second turn"],
            _answer_cells,
        ),
        _by_configuration(
            "Starting",
            "",
            result,
            ["ready after", "Python", "engine's import", "model"],
            _load_cells,
        ),
        _by_configuration("Memory", "", result, ["peak", "of it not from files", "the files"], _memory_cells),
    ]
    if any(point.tokens_per_joule for _, figures in result.measured for point in figures.decode):
        contexts = [f"{n:,}" for n in result.plan.decode_contexts]
        tables.append(_by_configuration("Writing, tokens/joule", "after tokens", result, contexts, _joule_cells))
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


def _by_configuration(
    title: str, corner: str, result: BenchResult, columns: Sequence[str], cells: _Cells
) -> ReportTable:
    rows = [(one.label, *cells(one, figures)) for one, figures in result.measured]
    return ReportTable(title, ((corner, *columns), *rows))


def _decode_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    return [with_range(point.tokens_per_s) for point in figures.decode]


def _share_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    return [
        f"{point.weight_gb_per_s:.1f} GB/s"
        if point.share is None
        else f"{point.share:.0%} ({point.weight_gb_per_s:.1f} GB/s)"
        if point.bandwidth_gb_per_s is None
        else f"{point.share:.0%} of {with_range(point.bandwidth_gb_per_s)} GB/s"
        for point in figures.decode
    ]


def _prefill_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    return [with_range(point.tokens_per_s) for point in figures.prefill]


def _answer_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    answers = figures.answers
    return [_timed(answers.question_s), _timed(answers.first_use_s), _timed(answers.second_turn_s)]


def _load_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    load = figures.load
    return [_timed(load.ready_s), _timed(load.python_s), _timed(load.engine_import_s), _timed(load.model_s)]


def _memory_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    memory = figures.memory
    counts = (memory.peak, memory.peak_anonymous, one.total_bytes)
    return [bytes_(count) for count in counts]


def _joule_cells(one: ConfigurationResult, figures: Figures) -> Sequence[str]:
    return [with_range(point.tokens_per_joule) for point in figures.decode]


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
