"""The other end of a worker: starts its process, asks it, and turns what becomes of it into errors of the package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from normistral.errors import EngineError, NormistralError, first_line
from normistral.evaluation.bench.worker import Request

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
_MODULE = "normistral.evaluation.bench.worker"
_ENDS_IN_S = 10.0
T = TypeVar("T")


class _Answer(msgspec.Struct):
    result: Any = None
    error: str | None = None
    hint: str = ""


class Worker:
    """A process that measures. Use it as a context manager: leaving ends the process, whatever it is doing.

    Args:
        environment: set in the process, beside this one's.
        module: whose `main` it runs.
    """

    def __init__(self, name: str, environment: Mapping[str, str] | None = None, module: str = _MODULE) -> None:
        self.name = name
        self.started = time.perf_counter()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(module=module), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, request: Request, answer_type: type[T]) -> T:
        """The answer to a request.

        Raises:
            NormistralError: what went wrong in the process, or that it ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(msgspec.json.encode(request) + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._ended()
        answer = msgspec.json.decode(line, type=_Answer)
        if answer.error is not None:
            raise EngineError(f"{self.name}: {answer.error}", answer.hint)
        return msgspec.convert(answer.result, answer_type)

    def close(self) -> None:
        """End the process: it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass  # a request that nobody read

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ended(self) -> NormistralError:
        try:
            code = self._process.wait(_ENDS_IN_S)
        except subprocess.TimeoutExpired:
            return EngineError(f"{self.name}: its process closed its output", "report this")
        if code == -signal.SIGKILL:
            return EngineError(
                f"{self.name}: its process was killed, most likely because the memory was used up",
                "close other programs, or take smaller weights (int4)",
            )
        if code < 0:
            return EngineError(
                f"{self.name}: its process crashed ({_signal_name(-code)})",
                "see with `normistral doctor` whether the engine works on this machine",
            )
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        reason = said[-1] if said else f"status {code}"
        return EngineError(f"{self.name}: its process ended: {first_line(Exception(reason))}", "report this")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
