"""A stack's process: it runs only while it is asked, and what it takes of memory is watched from outside."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[1]))
from watch import PRIVATE, descendants, read_memory

SAMPLE_S = 0.05
PATIENCE_S = 3600.0
LAST_WORDS = 2000  # characters
PR_SET_PDEATHSIG = 1  # prctl(2)
# This checkout is what is measured, wherever an environment was made; and nothing else comes in from outside.
VARIABLES = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


class StackError(Exception):
    """The process ended, or does not answer; with its last words."""


class Process:
    """Started and stopped with the context.

    Attributes:
        started: when, by time.perf_counter().
        peak_resident_bytes: mapped weights included, as the kernel counts it.
        peak_anonymous_bytes: what cannot be dropped, over the process and its children, 20 times a second.
    """

    def __init__(self, command: list[str]) -> None:
        self.started = time.perf_counter()
        self.peak_resident_bytes = self.peak_anonymous_bytes = 0
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed with this context
        # A stopped process outlives whoever started it, with all its memory: the kernel ends it with this one.
        libc = ctypes.CDLL(None)
        pipe, variables = subprocess.PIPE, os.environ | VARIABLES
        self._received = b""
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=self._errors,
            env=variables,
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()  # a stopped process cannot say goodbye
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # a request that it no longer read
            self._process.stdin.close()
        self._errors.close()

    def ask(self, request: dict[str, Any], at_mark: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Let it run, and wait for its answer. Loading is watched all the time, measuring only at its end.

        Args:
            at_mark: called while it stands still at the beginning of each segment.

        Raises:
            StackError: there will be no answer.
        """
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise StackError(self._last_words()) from None
        while True:
            reply: dict[str, Any] = json.loads(self._read_line(watched=request["do"] == "load"))
            if "mark" not in reply:
                self._process.send_signal(signal.SIGSTOP)  # at a mark it stops itself, at the token
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if self._process.poll() is not None:
                raise StackError(self._last_words())
            if "mark" not in reply:
                break
            at_mark()
            self._process.send_signal(signal.SIGCONT)
        self._sample()
        return reply

    def _read_line(self, *, watched: bool) -> bytes:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + PATIENCE_S
        while b"\n" not in self._received:
            if time.monotonic() > deadline:
                raise StackError(f"no answer within {PATIENCE_S:.0f} s")
            if watched:
                self._sample()
            if select.select([pipe], [], [], SAMPLE_S if watched else PATIENCE_S)[0]:
                more = os.read(pipe, 2**20)
                if not more:
                    raise StackError(self._last_words())
                self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line

    def cpu_s(self) -> float:
        """Processor time that it has taken."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _sample(self) -> None:
        if self._process.poll() is not None:
            return
        memory = [read_memory(pid) for pid in descendants(self._process.pid)]
        anonymous = sum(kinds[kind] for kinds in memory for kind in PRIVATE)
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous)
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
        self.peak_resident_bytes = max([self.peak_resident_bytes, *peaks])

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return f"it ended with {code}:\n{self._errors.read()[-LAST_WORDS:].strip()}"


def machine_cpu_s() -> float:
    """Processor time that all processes took, time stolen by the host included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, interrupts, soft, stolen = map(int, fields[:8])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
