"""Whether a worker process lives, by what it sends twice a second.

A worker that computes is left alone, however long a step takes: then either its thread beside the engine sends `Beat`s
that tell of processor time, or, where native code holds the interpreter, the system does. Time is counted in rounds of
the server's own event loop, so neither a suspended machine nor a server that is kept from its processor ends a worker.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from normistral.server.frames import Beat

BEAT_S = 0.5
_SILENT_S = 5.0  # without a beat, and without processor time
_STILL_S = 15.0  # of one step, without processor time
_HELD_S = 120.0  # without a beat: native code may hold the interpreter while it compiles
_STEP_S = 900.0  # of one step, whatever it does
_LOADING = 12  # times as long for reading weights from a slow disk
_WORKING_SHARE = 0.02  # of a processor; a beat takes a hundredth of that


class Pulse:
    """The worker's end: a thread that beats.

    Args:
        send: may be called from any thread.

    Attributes:
        busy: a step is being computed.
        steps: that have ended.
    """

    def __init__(self, send: Callable[[Beat], None]) -> None:
        self.busy, self.steps = True, 0
        self._send = send
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._send(Beat(self.busy, self.steps, time.process_time()))
            except OSError:  # the server is gone
                return
            time.sleep(BEAT_S)


class Vigil:
    """The server's end, of one process. Call `tick` every `BEAT_S`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = Beat(True, 0, 0.0)
        self._heard = False
        self._silent = self._held = self._still = self._same = 0  # ticks
        self._cpu_s = 0.0

    def hear(self, beat: Beat) -> None:
        """A beat came."""
        self._heard = True
        moved = not beat.busy or beat.steps != self._last.steps
        worked = beat.cpu_s - self._last.cpu_s > _WORKING_SHARE * BEAT_S
        self._still = 0 if moved or worked else self._still + 1
        self._same = 0 if moved else self._same + 1
        self._last = beat

    def tick(self, *, loading: bool) -> str | None:
        """Why the process has to be ended; None while it lives."""
        cpu_s = _processor_seconds(self._pid)
        worked = cpu_s is None or cpu_s - self._cpu_s > _WORKING_SHARE * BEAT_S
        self._cpu_s = cpu_s or 0.0
        self._held = 0 if self._heard else self._held + 1
        self._silent = 0 if self._heard or worked else self._silent + 1
        self._heard = False
        times = _LOADING if loading else 1
        for ticks, most_s, what in (
            (self._silent, _SILENT_S, "it stood still"),
            (self._held, _HELD_S, "it gave no sign of life"),
            (self._still, _STILL_S, "its engine stood still"),
            (self._same, _STEP_S, "one step did not end"),
        ):
            if ticks * BEAT_S >= times * most_s:
                return f"{what} for {times * most_s:g} s"
        return None


def _processor_seconds(pid: int) -> float | None:
    """User and system time of a process and all its threads (proc(5)); None where it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
