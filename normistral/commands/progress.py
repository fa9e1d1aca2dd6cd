"""Progress of long work on stderr: moving bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from normistral.commands.console import colour, is_terminal, one_line, print_diagnostic
from normistral.commands.translate import translate, translate_number
from normistral.commands.wrapping import cell_width, crop, wrap_text
from normistral.progress import Progress, Stage, format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

_SPINNER_CELLS = 2  # it and the blank after it
_BAR_CELLS = 24  # at most; with room for less than a third of that there is none
_DONE = "32"
_BETWEEN_LINES_S = 30.0  # in a log
_WORTH_TELLING_S = 1.0  # stages shorter than this get no line about their time in a log


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A `Progress` that draws on stderr while the context is open."""
    if not is_terminal(sys.stderr):
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, SpinnerColumn
    from rich.table import Column
    from rich.text import Text

    class Row(ProgressColumn):
        """One running stage."""

        max_refresh = None

        def render(self, task: Task) -> Text:
            running = Running(
                task.description,
                task.fields["unit"],
                task.completed,
                task.total,
                task.speed,
                task.time_remaining
                if task.time_remaining is not None
                else estimate_left_s(task.completed, task.total, task.elapsed or 0.0),
                task.elapsed or 0.0,
            )
            return Text(fit_row(running, bars.console.width - _SPINNER_CELLS), no_wrap=True)

    # Only lines of ours may move the bars: what tools print on stdout goes where it always goes.
    with Bars(
        SpinnerColumn(),
        Row(table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as bars:
        yield BarProgress(bars)


@dataclass(frozen=True, slots=True)
class Running:
    """State of a running stage; None where a figure is not known."""

    title: str
    unit: str
    done: float
    total: float | None
    per_s: float | None
    remaining_s: float | None
    elapsed_s: float


def fit_row(stage: Running, cells: int) -> str:
    """A running stage in at most so many cells: title, share, remaining time, rate, amount, a bar, as many as fit.

    A title that is too long beside share and time loses words at its end.
    """
    facts = _facts(stage)  # the most important first
    for count in range(len(facts), 0, -1):
        row = "  ".join([stage.title, *facts[:count]])
        if cell_width(row) <= cells:
            return row + (_bar(stage, cells - cell_width(row)) if count == len(facts) else "")
    first = "".join(f"  {fact}" for fact in facts[:2])
    return crop(stage.title, max(1, cells - cell_width(first))) + first


def estimate_left_s(done: float, total: float | None, elapsed_s: float) -> float | None:
    """Seconds until a stage is done, at the mean pace so far; None before anything is done."""
    return elapsed_s * max(0.0, total - done) / done if done and total else None


def _facts(stage: Running) -> list[str]:
    if not stage.total:
        counted = [_amount(stage.done, stage.unit)] if stage.done else []
        return [format_duration(stage.elapsed_s), *counted]
    facts = [f"{min(1.0, stage.done / stage.total):.0%}"]
    if stage.remaining_s is not None:
        facts.append(translate(f"{format_duration(stage.remaining_s)} left"))
    if stage.done and stage.per_s and stage.per_s >= 1:
        facts.append(f"{_amount(stage.per_s, stage.unit)}/s")
    elif stage.elapsed_s >= _WORTH_TELLING_S:
        facts.append(translate(f"{format_duration(stage.elapsed_s)} so far"))
    done = _amount(stage.done, stage.unit).removesuffix(translate(stage.unit) if stage.unit != "bytes" else "").rstrip()
    return [*facts, translate(f"{done} of {_amount(stage.total, stage.unit)}")]


def _bar(stage: Running, cells: int) -> str:
    width = min(_BAR_CELLS, cells - 2)
    if not stage.total or width < _BAR_CELLS // 3:
        return ""
    done = round(width * min(1.0, stage.done / stage.total))
    return "  " + "━" * done + "─" * (width - done)


class PlainProgress:
    """A line when a stage begins, and one with its time if it took long; of a long one, where it is, twice a minute."""

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Announce the stage."""
        size = f" ({_amount(total, unit)})" if total else ""
        print_diagnostic(one_line(translate(title) + size))
        started = time.perf_counter()
        yield _Lines(unit, total)
        if (took := time.perf_counter() - started) >= _WORTH_TELLING_S:
            print_diagnostic(f"  {translate(f'done in {format_duration(took)}')}")

    def note(self, text: str) -> None:
        """Print it."""
        print_diagnostic(f"  {one_line(translate(text))}")


class _Lines:
    """A running stage in a log."""

    def __init__(self, unit: str, total: int | None) -> None:
        self._unit, self._total, self._done = unit, total, 0
        self._started = self._printed = time.perf_counter()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.perf_counter()
        if not self._total or now - self._printed < _BETWEEN_LINES_S:
            return
        self._printed = now
        elapsed = now - self._started
        left = estimate_left_s(self._done, self._total, elapsed)
        running = Running("", self._unit, self._done, self._total, self._done / elapsed, left, elapsed)
        print_diagnostic(f"  {', '.join(_facts(running))}")

    def set_total(self, total: int | None) -> None:
        self._total = total


class BarProgress:
    """A bar while a stage runs, and a line with its time when it is done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Draw the stage until it is done."""
        title = one_line(translate(title))
        task = self._bars.add_task(title, total=total, unit=unit)
        started = time.perf_counter()
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
        took = format_duration(time.perf_counter() - started)
        self._print(f"✓ {title}  {took}", mark=True)

    def note(self, text: str) -> None:
        """Print it above the bars."""
        self._print(f"  {one_line(translate(text))}")

    def _print(self, line: str, *, mark: bool = False) -> None:
        from rich.text import Text

        shown = wrap_text(line, self._bars.console.width, "  ")
        if mark:
            shown = colour(shown[:1], _DONE, sys.stderr) + shown[1:]
        self._bars.console.print(Text.from_ansi(shown), soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int) -> None:
        self._bars.advance(self._task, amount)

    def set_total(self, total: int | None) -> None:
        self._bars.update(self._task, total=total)


def format_duration(seconds: float) -> str:
    """A time in the two largest of seconds, minutes and hours."""
    if seconds < 10:
        return translate_number(f"{seconds:.1f} s")
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{minutes} min {whole % 60:02} s" if whole < 3600 else f"{hours} h {minutes % 60:02} min"


def _amount(count: float, unit: str) -> str:
    if unit == "bytes":
        return translate_number(translate(format_bytes(round(count))))
    if count >= 1e6:
        number = translate(f"{count / 1e6:,.1f} million")
    else:
        number = translate_number(f"{count:,.0f}" if count >= 10 else f"{count:.2g}")
    return f"{number} {translate(unit)}".rstrip()
