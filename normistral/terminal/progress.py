"""Progress of long work on stderr: moving bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from normistral.export.progress import Progress, Stage, Uncounted
from normistral.terminal.console import colour, is_terminal, one_line, print_diagnostic

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_DONE = "32"
_WORTH_TELLING_S = 1.0  # stages shorter than this get no line about their time in a log


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A `Progress` that draws on stderr while the context is open."""
    if not is_terminal(sys.stderr):
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
    )
    # Only lines of ours may move the bars: what tools print on stdout goes where it always goes.
    with Bars(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bars:
        yield BarProgress(bars)


class PlainProgress:
    """A line when a stage begins, and one with its time if it took long."""

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Announce the stage; a log has no use for more."""
        size = f" ({_amount(total, unit)})" if total else ""
        print_diagnostic(one_line(title + size))
        started = time.perf_counter()
        yield Uncounted()
        if (took := time.perf_counter() - started) >= _WORTH_TELLING_S:
            print_diagnostic(f"  done in {took:.1f} s")

    def note(self, text: str) -> None:
        """Print it."""
        print_diagnostic(f"  {one_line(text)}")


class BarProgress:
    """A bar while a stage runs, and a line with its time when it is done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Draw the stage until it is done."""
        task = self._bars.add_task(one_line(title), total=total, amount="")
        started = time.perf_counter()
        try:
            yield _Bar(self._bars, task, unit)
        finally:
            self._bars.remove_task(task)
        took = time.perf_counter() - started
        self._print(f"{colour('✓', _DONE, sys.stderr)} {one_line(title)}  {took:.1f} s")

    def note(self, text: str) -> None:
        """Print it above the bars."""
        self._print(f"  {one_line(text)}")

    def _print(self, line: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text.from_ansi(line), soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit
        self._done, self._total = 0, bars.tasks[bars.task_ids.index(task)].total

    def advance(self, amount: int) -> None:
        self._done += amount
        self._bars.update(self._task, completed=self._done, amount=self._text())

    def set_total(self, total: int | None) -> None:
        self._total = total
        self._bars.update(self._task, total=total, amount=self._text())

    def _text(self) -> str:
        done = _amount(self._done, self._unit)
        return f"{done} of {_amount(int(self._total), self._unit)}" if self._total else done


def format_bytes(count: int) -> str:
    """`count` bytes in the unit that gives one to three digits before the point (powers of 1000)."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _amount(count: int, unit: str) -> str:
    return format_bytes(count) if unit == "bytes" else f"{count:,} {unit}".rstrip()
