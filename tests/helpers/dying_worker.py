"""A worker that closes its output and ends a moment later, in the way that the job's environment names."""

from __future__ import annotations

import os
import signal
import time


def main() -> None:
    os.close(1)
    time.sleep(0.1)
    if name := os.environ["DYING_WORKER_SIGNAL"]:
        os.kill(os.getpid(), signal.Signals[name])
    os._exit(7)
