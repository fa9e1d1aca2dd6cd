"""One configuration in a process of its own: `Worker` starts it, `main` runs in it.

A request is the name of a method of `Measurer` and its arguments, pickled, on the process's stdin. The answer, on its
stdout, is the method's result, or an error of the package, after which the process goes on. It ends when stdin does.
What engines print goes to stderr.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

from normistral.errors import EngineError, NormistralError, first_line
from normistral.evaluation.bench import speed
from normistral.evaluation.bench.machine import (
    SINGLE_THREADED_BLAS,
    Bandwidth,
    EnergyCounter,
    ProcessMemory,
    find_energy_counter,
    measure_read_bandwidth,
    read_process_memory,
)
from normistral.processes import main_command, signal_name
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.model import Model

_MODULE = "normistral.evaluation.bench.worker"
_ENDS_IN_S = 10.0
_ENGINE_MODULES = {"openvino": "openvino", "onnx": "onnxruntime"}
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelLoaded:
    """A model that is ready.

    Attributes:
        import_s: importing the engine.
        load_s: opening, preparing and warming up.
        engine, basis, settings: as its capabilities say.
        energy: why no joules are counted; None where they are.
    """

    import_s: float
    load_s: float
    engine: str
    basis: str
    settings: dict[str, str]
    tokens_per_word: float
    energy: str | None


@dataclass(frozen=True, slots=True)
class Account:
    """Resources that the process has used so far.

    Attributes:
        peak_anonymous: the largest of those after each request.
        idle_cpu_s, idle_s: processor time, and time, between an answer and the next request.
    """

    memory: ProcessMemory
    peak_anonymous: int | None
    idle_cpu_s: float
    idle_s: float


class Measurer:
    """The measurements of one process; all but `read_bandwidth` and `account` need a model, so `load` comes first."""

    def __init__(self) -> None:
        self._model: Model | None = None
        self._counter: EnergyCounter | None = None
        self._meter: Worker | None = None  # of the bandwidth: a process with BLAS on one thread, which ends with this
        self._peak_anonymous: int | None = None
        self._idle_cpu_s = self._idle_s = 0.0

    def load(self, folder: Path, format: str, config: EngineConfig) -> ModelLoaded:
        """Load an artifact."""
        from normistral.runtime import loading

        start = time.perf_counter()
        with suppress(ImportError):  # `load` says what to install
            importlib.import_module(_ENGINE_MODULES[format])
        imported = time.perf_counter()
        self._model = model = loading.load(folder, config.device, exact=config.exact, settings=config.settings)
        ready = time.perf_counter()
        counter = find_energy_counter()
        self._counter = None if isinstance(counter, str) else counter
        return ModelLoaded(
            import_s=imported - start,
            load_s=ready - imported,
            engine=model.capabilities.name,
            basis=model.capabilities.settings_source,
            settings=model.capabilities.settings,
            tokens_per_word=speed.tokens_per_word(model.tokenizer),
            energy=counter if isinstance(counter, str) else None,
        )

    def first_token(self, question_tokens: int, seed: int) -> float:
        """As `speed.measure_first_token`."""
        return speed.measure_first_token(self._loaded, question_tokens, seed)

    def one_pass(self, length: int, decode_tokens: int, seed: int, meter: tuple[int, int] | None = None) -> speed.Pass:
        """As `speed.measure_pass`; `meter` is what `read_bandwidth` takes to measure the memory around the decode."""

        def gb_per_s() -> float:
            assert meter is not None
            self._meter = self._meter or Worker("the read bandwidth", SINGLE_THREADED_BLAS)
            return self._meter.ask(Measurer.read_bandwidth, *meter).gb_per_s

        around = None if meter is None else gb_per_s
        return speed.measure_pass(self._loaded, length, decode_tokens, seed, self._counter, around)

    def conversation(self, plan: speed.SpeedPlan, seed: int) -> speed.ConversationPass:
        """As `speed.measure_conversation`."""
        return speed.measure_conversation(self._loaded, plan, seed)

    def fingerprint(self) -> str:
        """As `speed.fingerprint`."""
        return speed.fingerprint(self._loaded)

    def read_bandwidth(self, threads: int, buffer_bytes: int) -> Bandwidth:
        """As `machine.measure_read_bandwidth`."""
        return measure_read_bandwidth(threads, buffer_bytes)

    def account(self) -> Account:
        """What this process has used so far."""
        return Account(read_process_memory(), self._peak_anonymous, self._idle_cpu_s, self._idle_s)

    def serve(self, requests: BinaryIO, answers: BinaryIO) -> None:
        """Answer requests until there are no more."""
        answered: tuple[float, float] | None = None  # processor time and time of the last answer
        with suppress(EOFError):
            while True:
                method, arguments, keywords = pickle.load(requests)
                if answered is not None:
                    self._idle_cpu_s += time.process_time() - answered[0]
                    self._idle_s += time.perf_counter() - answered[1]
                answer: tuple[Any, tuple[str, str] | None]
                try:
                    answer = getattr(self, method)(*arguments, **keywords), None
                except NormistralError as error:
                    answer = None, (error.message, error.hint)
                if (anonymous := read_process_memory().anonymous) is not None:
                    self._peak_anonymous = max(anonymous, self._peak_anonymous or 0)
                pickle.dump(answer, answers)
                answers.flush()
                answered = time.process_time(), time.perf_counter()
        if self._model is not None:
            self._model.close()

    @property
    def _loaded(self) -> Model:
        assert self._model is not None, "load comes first"
        return self._model


def main() -> None:
    """Serve this process's stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures: it ends this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # an engine's own words are no answers
    Measurer().serve(sys.stdin.buffer, answers)


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
            main_command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, method: Callable[Concatenate[Measurer, P], T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """What a method of `Measurer` returns in the process.

        Raises:
            NormistralError: what went wrong there, or that the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump((method.__name__, arguments, keywords), stdin)
            stdin.flush()
            answer: tuple[T, tuple[str, str] | None] = pickle.load(stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as exc:
            raise self._ended() from exc
        result, error = answer
        if error is not None:
            raise EngineError(f"{self.name}: {error[0]}", error[1])
        return result

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

    def __exit__(self, *exc: object) -> None:
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
                f"{self.name}: its process crashed ({signal_name(-code)})",
                "see with `normistral doctor` whether the engine works on this machine",
            )
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        reason = said[-1] if said else f"status {code}"
        return EngineError(f"{self.name}: its process ended: {first_line(Exception(reason))}", "report this")


if __name__ == "__main__":
    main()
