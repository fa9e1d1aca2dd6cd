"""One configuration in a process of its own: `Worker` starts it, `main` runs in it.

Requests go to its stdin, answers come from its stdout, one line of JSON each.

A request names its kind in "type". An answer is {"result": ...} or {"error": ..., "hint": ...}; after an error of the
package the process goes on, and it ends when stdin does. What engines print goes to stderr.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import msgspec

from normistral.errors import EngineError, NormistralError, first_line
from normistral.evaluation.bench.machine import (
    SINGLE_THREADED_BLAS,
    Bandwidth,
    EnergyCounter,
    ProcessMemory,
    find_energy_counter,
    measure_read_bandwidth,
    read_process_memory,
)
from normistral.evaluation.bench.speed import (
    Pass,
    SpeedPlan,
    fingerprint,
    measure_conversation,
    measure_first_token,
    measure_pass,
    tokens_per_word,
)
from normistral.processes import main_command, signal_name
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.model import Model

_MODULE = "normistral.evaluation.bench.worker"
_ENDS_IN_S = 10.0
_ENGINE_MODULES = {"openvino": "openvino", "onnx": "onnxruntime"}
T = TypeVar("T")


class LoadModel(msgspec.Struct, tag=True):
    """LoadModel a model; answered with `ModelLoaded`."""

    folder: str
    format: str
    config: EngineConfig


class MeasureFirstToken(msgspec.Struct, tag=True):
    """Answered with seconds."""

    question_tokens: int
    seed: int


class MeasureBandwidth(msgspec.Struct, tag=True):
    """Answered with a `bandwidth.Bandwidth`; needs no model."""

    threads: int
    buffer_bytes: int


class MeasurePass(msgspec.Struct, tag=True):
    """Answered with a `speed.Pass`; with `bandwidth`, the memory is measured around the decode."""

    length: int
    decode_tokens: int
    seed: int
    bandwidth: MeasureBandwidth | None = None


class MeasureConversation(msgspec.Struct, tag=True):
    """Answered with a `speed.ConversationPass`."""

    plan: SpeedPlan
    seed: int


class Fingerprint(msgspec.Struct, tag=True):
    """Answered with the hash of what it writes."""


class LookAtProcess(msgspec.Struct, tag=True):
    """Answered with an `Account`."""


Request = (
    LoadModel | MeasureFirstToken | MeasurePass | MeasureConversation | Fingerprint | LookAtProcess | MeasureBandwidth
)


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


@dataclass(slots=True)
class _State:
    model: Model | None = None
    counter: EnergyCounter | None = None
    meter: Worker | None = None  # of the bandwidth: a process with BLAS on one thread, which ends with this one
    peak_anonymous: int | None = None
    idle_cpu_s: float = 0.0
    idle_s: float = 0.0
    answered: tuple[float, float] | None = field(default=None)  # processor time and time of the last answer

    def need_model(self) -> Model:
        assert self.model is not None, "LoadModel comes first"
        return self.model


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    decoder = msgspec.json.Decoder(Request)
    state = _State()
    for line in requests:
        if state.answered is not None:
            state.idle_cpu_s += time.process_time() - state.answered[0]
            state.idle_s += time.perf_counter() - state.answered[1]
        try:
            answer: dict[str, Any] = {"result": _answer(decoder.decode(line), state)}
        except NormistralError as error:
            answer = {"error": error.message, "hint": error.hint}
        anonymous = read_process_memory().anonymous
        if anonymous is not None:
            state.peak_anonymous = max(anonymous, state.peak_anonymous or 0)
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
        state.answered = (time.process_time(), time.perf_counter())
    if state.model is not None:
        state.model.close()


def _answer(request: Request, state: _State) -> Any:
    match request:
        case LoadModel():
            return _load(request, state)
        case MeasureFirstToken():
            return measure_first_token(state.need_model(), request.question_tokens, request.seed)
        case MeasurePass():
            return _measure_pass(request, state)
        case MeasureConversation():
            return measure_conversation(state.need_model(), request.plan, request.seed)
        case Fingerprint():
            return fingerprint(state.need_model())
        case LookAtProcess():
            return Account(read_process_memory(), state.peak_anonymous, state.idle_cpu_s, state.idle_s)
        case MeasureBandwidth():
            return measure_read_bandwidth(request.threads, request.buffer_bytes)


def _measure_pass(request: MeasurePass, state: _State) -> Pass:
    def gb_per_s(wanted: MeasureBandwidth) -> float:
        state.meter = state.meter or Worker("the read bandwidth", SINGLE_THREADED_BLAS)
        return state.meter.ask(wanted, Bandwidth).gb_per_s

    around = partial(gb_per_s, request.bandwidth) if request.bandwidth else None
    return measure_pass(state.need_model(), request.length, request.decode_tokens, request.seed, state.counter, around)


def _load(request: LoadModel, state: _State) -> ModelLoaded:
    from normistral.runtime import loading

    start = time.perf_counter()
    with suppress(ImportError):  # `load` says what to install
        importlib.import_module(_ENGINE_MODULES[request.format])
    imported = time.perf_counter()
    config = request.config
    model = loading.load(Path(request.folder), config.device, exact=config.exact, settings=config.settings)
    ready = time.perf_counter()
    counter = find_energy_counter()
    state.model, state.counter = model, None if isinstance(counter, str) else counter
    return ModelLoaded(
        import_s=imported - start,
        load_s=ready - imported,
        engine=model.capabilities.name,
        basis=model.capabilities.settings_source,
        settings=model.capabilities.settings,
        tokens_per_word=tokens_per_word(model.tokenizer),
        energy=counter if isinstance(counter, str) else None,
    )


def main() -> None:
    """Serve this process's stdin and stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures: it ends this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # an engine's own words are no answers
    serve(sys.stdin.buffer, answers)


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
            main_command(module),
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
                f"{self.name}: its process crashed ({signal_name(-code)})",
                "see with `normistral doctor` whether the engine works on this machine",
            )
        self._stderr.seek(0)
        said = [line for line in self._stderr.read().decode("utf-8", "replace").splitlines() if line.strip()]
        reason = said[-1] if said else f"status {code}"
        return EngineError(f"{self.name}: its process ended: {first_line(Exception(reason))}", "report this")


if __name__ == "__main__":
    main()
