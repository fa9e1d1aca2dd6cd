"""Protocol between a scheduler of many sequences and an engine that computes them in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from normistral.runtime.engines.base import Backend, Engine, Logits

E = TypeVar("E")


class BatchCall(NamedTuple, Generic[E]):
    """One sequence's part of a forward.

    Attributes:
        token_ids: to append.
        last: positions whose logits are wanted; 0 for a piece of a prompt that goes on.
    """

    engine: E
    token_ids: Sequence[int]
    last: int


class BatchEngine(Engine, Protocol):
    """One sequence, whose full blocks (`block_pool.block_hashes`) others may begin with."""

    def share(self, hashes: Sequence[bytes]) -> int:
        """Begin an empty sequence with the published blocks of these hashes; how many tokens are there now."""

    def publish(self, hashes: Sequence[bytes]) -> None:
        """Let others begin with the full blocks of this sequence, whose tokens have these hashes."""


class BatchingBackend(Backend, Protocol):
    """Loaded weights, from which sequences are made that may be computed together.

    Attributes:
        submit: computes the forwards of its engines (logits as of `Engine.forward`), in place of one at a time.
    """

    submit: Callable[[BatchCall[Any]], Logits] | None

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in the KV cache, keys and values of all layers and heads."""

    def create_engine(self) -> BatchEngine:
        """A new, empty sequence."""

    def forward_batch(self, calls: Sequence[BatchCall[Any]]) -> list[Logits]:
        """Compute the calls of several sequences; logits [last, vocabulary] of each.

        Raises:
            EngineError: the engine failed; no sequence is longer than before.
        """

    def reserve_blocks(self, blocks: int) -> None:
        """Have a KV cache of so many blocks, all sequences together."""

    def measure_batch_invariance(self) -> bool:
        """Whether `Engine.batch_invariant` holds beside other sequences."""
