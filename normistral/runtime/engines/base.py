"""The protocol between the decode loop and an inference engine.

`Backend` is loaded weights; `Engine` is one sequence with its own KV cache on those weights. OpenVINO hides the cache
inside an infer request, onnxruntime hands it over as tensors; everything above sees only this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Basis = Literal["rule", "tuned", "exact"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do cheaply, and how it is set up.

    Attributes:
        name: "openvino", "onnxruntime" or "scripted".
        device: what it runs on, in the engine's own words.
        prefill_chunk: tokens to feed at most in one `forward` of a long prompt.
        settings: the engine's options in force, for reports: what it answers when asked after loading, as far as it
            can be asked.
        basis: where they come from: the rule for this kind of machine, `normistral tune` on this one, or the reference
            arithmetic.
        given: names of those that the caller chose over that.
    """

    name: str
    device: str
    prefill_chunk: int
    settings: dict[str, str]
    basis: Basis = "rule"
    given: tuple[str, ...] = ()


class Engine(Protocol):
    """One sequence: its tokens so far live in a KV cache.

    A call that raises, `KeyboardInterrupt` included, leaves the cache undefined: call `reset()` before the next.
    """

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        ...

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append `token_ids` to the sequence.

        Returns:
            logits of the last `last` positions: float32 [last, vocabulary], the caller's own.

        Raises:
            EngineError: the engine failed.
        """
        ...

    def trim(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def save(self) -> object:
        """A copy of the KV cache, to be given to `restore` of an engine of the same backend."""
        ...

    def restore(self, saved: object) -> None:
        """Continue from a saved KV cache."""
        ...

    def close(self) -> None:
        """Free the KV cache."""
        ...


class Backend(Protocol):
    """Loaded weights, from which engines are made. Engines of one backend may be used in turn, not at once."""

    @property
    def capabilities(self) -> Capabilities:
        """How these weights run."""
        ...

    def create_engine(self) -> Engine:
        """A new, empty sequence."""
        ...

    def close(self) -> None:
        """Free the weights; engines made from it must not be used any more."""
        ...
