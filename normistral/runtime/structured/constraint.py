"""What may come next in one answer that follows a structure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from normistral.errors import UsageError
from normistral.runtime.structured.compile import CompiledStructure


class Constraint:
    """One answer's way through a structure, token by token.

    Args:
        compiled: may begin with a lead, such as reasoning.
    """

    def __init__(self, compiled: CompiledStructure) -> None:
        self._matcher = compiled.begin()
        self._size = compiled.vocabulary.size
        self._stop_ids = list(compiled.vocabulary.stop_token_ids)

    @property
    def complete(self) -> bool:
        """Whether the answer is whole and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> NDArray[np.bool_]:
        """Of each token [vocabulary] whether it may come next; a stop token may where the answer is whole.

        Raises:
            UsageError: no token may, or it takes too much to find out.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._require_working()
        allowed = np.unpackbits(packed, count=self._size, bitorder="little").view(np.bool_)
        if not self._matcher.is_accepting():
            allowed[self._stop_ids] = False
        if not allowed.any():
            raise UsageError(
                "the answer can go on with no token of this model that its structure allows",
                "write the structure so that every beginning can be finished",
            )
        return allowed

    def commit(self, token_id: int) -> None:
        """The answer goes on with an allowed token.

        Raises:
            UsageError: it takes too much to follow.
        """
        self._matcher.consume_token(token_id)
        self._require_working()

    def accepts(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens may come next, one after the other."""
        return self._matcher.validate_tokens(list(token_ids))

    def certain(self) -> list[int]:
        """Tokens that come next whatever the model says, as its tokenizer would write them; no stop tokens."""
        token_ids = self._matcher.compute_ff_tokens()
        self._require_working()
        return list(takewhile(lambda token_id: token_id not in self._stop_ids, token_ids))

    def _require_working(self) -> None:
        if self._matcher.is_error():
            raise UsageError(
                "the structure became too complex while the answer was written",
                "bound repetitions more tightly, or describe less with one regular expression",
            )


class WholePlaces:
    """Where an answer that is read piece by piece could end.

    Args:
        compiled: of the answer alone.
    """

    def __init__(self, compiled: CompiledStructure) -> None:
        self._matcher = compiled.begin()
        self._engine = compiled.vocabulary.engine

    def advance(self, text: str) -> bool:
        """Read on; whether the text so far is a whole answer."""
        if text:
            self._matcher.try_consume_tokens(self._engine.tokenize_str(text))
        return self._matcher.is_accepting()
