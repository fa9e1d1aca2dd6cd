"""The protocol between the decode loop and an inference engine.

`Backend` is loaded weights; `Engine` is one sequence with its own KV cache on those weights. OpenVINO hides the cache
inside an infer request, onnxruntime hands it over as tensors; everything above sees only this.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ClosedError, EngineError
from normistral.hardware import available_memory_bytes, read_machine
from normistral.runtime.engines.settings import SettingsSource

Logits = NDArray[np.float32]
T = TypeVar("T")


class CacheTensor(NamedTuple):
    """One named part of a KV cache, as the engine wants it kept."""

    name: str
    array: NDArray[Any]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """An engine, its device and its settings in force.

    Attributes:
        name: "openvino", "onnxruntime" or "scripted".
        device: what it runs on, in the engine's own words.
        prefill_chunk: tokens to feed at most in one `forward` of a long prompt.
        settings: the engine's options in force, for reports: what it answers when asked after loading, as far as it
            can be asked.
        settings_source: where they come from: the rule for this kind of machine, `normistral tune` on this one, or the
            reference arithmetic.
        overrides: names of those that the caller chose over that.
        kv_cache_key: those that change the numbers; a KV cache is good only under the same.
    """

    name: str
    device: str
    prefill_chunk: int
    settings: dict[str, str]
    settings_source: SettingsSource = "rule"
    overrides: tuple[str, ...] = ()
    kv_cache_key: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Reference arithmetic: a step of n tokens computes what n steps of one do, but for the last bits.

        Without it, activations may be rounded while running, and how a sequence was cut can be seen in the logits.
        """
        return self.settings_source == "exact"


def describe_arithmetic(capabilities: EngineInfo) -> str:
    """SHA-256 of engine, device, settings in force (threads and prefill chunk among them), versions and processor."""
    machine = read_machine()
    engine = sys.modules.get(capabilities.name)  # the scripted one is no package
    named = (
        capabilities.name,
        str(getattr(engine, "__version__", "")),
        version("normistral"),
        capabilities.device,
        sorted(capabilities.settings.items()),
        sorted(capabilities.kv_cache_key.items()),
        machine.cpu,
        sorted(machine.instruction_sets),
    )
    return hashlib.sha256(repr(named).encode()).hexdigest()


def load_hint(said: str) -> str:
    """Hint for an artifact that an engine could not load.

    Args:
        said: its own words; "std::bad_alloc", "Failed to allocate memory" and the like tell of too little memory.
    """
    if "alloc" in said:
        gib = available_memory_bytes() / 2**30
        return f"it was refused memory: free some ({gib:.1f} GiB are available), or raise this process's limit"
    return "check the artifact with: normistral info ARTIFACT --check"


class Engine(Protocol):
    """One sequence: its tokens so far live in a KV cache.

    A call that raises, `KeyboardInterrupt` included, leaves the cache undefined: call `reset()` before the next.

    Attributes:
        batch_invariant: set it to get logits whose bits do not depend on the sequences that are computed with this one.
            An engine that computes one at a time need not heed it.
    """

    batch_invariant: bool

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""

    @property
    def intact(self) -> int:
        """Leading tokens whose cache entries are the very bits that were computed, with nothing masked between them."""

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append `token_ids` to the sequence.

        Returns:
            logits of the last `last` positions: float32 [last, vocabulary], the caller's own.

        Raises:
            EngineError: the engine failed.
        """

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Forget everything after the first `length` tokens.

        Args:
            exactly: leave nothing behind. Otherwise an engine may keep the others behind a mask: that costs nothing
                now, and changes the order of sums in later steps.
        """

    def reset(self) -> None:
        """Forget everything."""

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens of the KV cache, without loss, one tensor after the other.

        Each is read when it is asked for, so that they are never all in memory; the engine must not be used in between.

        Raises:
            EngineError: the engine failed.
        """

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from `length` tokens that `save` of an engine with the same weights and `kv_cache_key` gave.

        Raises:
            EngineError: the engine failed, or they are not the tensors of this cache.
        """

    def close(self) -> None:
        """Free the KV cache."""


class Backend(Protocol):
    """Loaded weights, from which engines are made. Engines of one backend may be used in turn, not at once."""

    @property
    def capabilities(self) -> EngineInfo:
        """How these weights run."""

    def create_engine(self) -> Engine:
        """A new, empty sequence."""

    def close(self) -> None:
        """Free the weights; engines made from it must not be used any more."""


class UnmaskedEngine:
    """An `Engine` whose cache masks nothing, and gives back the very bits that were computed."""

    length = 0
    batch_invariant = False

    @property
    def intact(self) -> int:
        """All of them."""
        return self.length


def opened(resource: T | None) -> T:
    """What a closed engine or backend no longer has; raises ClosedError where it is None."""
    if resource is None:
        raise ClosedError
    return resource


_WARM_UP_LENGTHS = (8, 1)  # kernels for a prompt and for one token are compiled at first use: do that at load


def warm_up(backend: Backend) -> None:
    """Run a short prompt and one token, so that the first answer does not pay for compiling kernels."""
    engine = backend.create_engine()
    for length in _WARM_UP_LENGTHS:
        engine.forward([0] * length)
    engine.close()


_BEGIN_ANEW = "begin a new session in another file"
TensorKinds = dict[str, list[tuple[np.dtype[Any], tuple[int, ...]]]]
"""For each tensor's name, the types and shapes in which it may come."""


def check_cache_tensors(tensors: Iterable[CacheTensor], kinds: TensorKinds) -> Iterator[CacheTensor]:
    """Check tensors that are to be restored, and pass them on: a native library does not check them.

    Raises:
        EngineError: one is unknown, comes twice, is missing, or has another type or shape.
    """
    missing = dict(kinds)
    for tensor in tensors:
        kind = (tensor.array.dtype, tensor.array.shape)
        if kind not in missing.pop(tensor.name, []):
            raise EngineError(
                f"the KV cache to be restored is not this model's: {tensor.name[:80]!r} is {kind[0]} {kind[1]}",
                _BEGIN_ANEW,
            )
        yield tensor
    if missing:
        raise EngineError(f"the KV cache to be restored has no {next(iter(missing))}", _BEGIN_ANEW)
