"""A worker that is loaded and then stands still in the way that STILL_WORKER says; the next process only waits."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from normistral.server.ipc import HeartbeatSender, Loaded, encode_message


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    answers.write(encode_message(Loaded(1, "still", "CPU", {}, "in turns", 1, 1)))
    marker = Path(os.environ["STILL_WORKER_MARKER"])
    how = "idle" if marker.exists() else os.environ["STILL_WORKER"]
    marker.touch()
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "silent":
        time.sleep(60)
    heartbeat = HeartbeatSender(lambda beat: answers.write(encode_message(beat)))
    if how == "works":
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sum(range(1000))
    heartbeat.busy = how != "idle"
    time.sleep(60)
