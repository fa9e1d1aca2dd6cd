"""An engine whose logits are given: for tests of everything above the engine, ours and users'.

    backend = ScriptedBackend(answers([hello, goodbye], after=template_tail, stop_id=4), vocabulary=512)

It keeps no state but the tokens, so whatever it returns depends on the whole sequence, as a model's logits do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from normistral.errors import ClosedError
from normistral.runtime.engines.base import CacheTensor, EngineInfo, Logits, check_cache_tensors

_TOKENS = "tokens"

NextLogits = Callable[[Sequence[int]], Logits]
"""Maps the sequence so far to the logits [vocabulary] of the next token."""


class ScriptedBackend:
    """Serves engines that answer with `next_logits`."""

    def __init__(self, next_logits: NextLogits, prefill_chunk: int = 64) -> None:
        self.next_logits = next_logits
        self.capabilities = EngineInfo("scripted", "none", prefill_chunk, {}, "exact")
        self.forwarded: list[list[int]] = []  # tokens of every forward call, in order: what a test wants to know
        self.closed = False

    def create_engine(self) -> ScriptedEngine:
        """A new, empty sequence."""
        if self.closed:
            raise ClosedError
        return ScriptedEngine(self)

    def close(self) -> None:
        """No more engines."""
        self.closed = True


class ScriptedEngine:
    """One sequence of a `ScriptedBackend`."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend
        self.token_ids: list[int] = []
        self.batch_invariant = False  # one sequence at a time

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.token_ids)

    def forward(self, token_ids: Sequence[int], last: int = 1) -> Logits:
        """Append tokens; scripted logits [last, vocabulary]."""
        self._backend.forwarded.append(list(token_ids))
        self.token_ids.extend(token_ids)
        ends = range(len(self.token_ids) - last + 1, len(self.token_ids) + 1)
        return np.stack([self._backend.next_logits(self.token_ids[:end]) for end in ends])

    @property
    def intact(self) -> int:
        """All of them."""
        return self.length

    def trim(self, length: int, *, exactly: bool = False) -> None:
        """Keep the first `length` tokens."""
        del self.token_ids[length:]

    def reset(self) -> None:
        """Forget everything."""
        self.token_ids.clear()

    def save(self, length: int) -> Iterator[CacheTensor]:
        """The first `length` tokens, which are all there is."""
        yield CacheTensor(_TOKENS, np.array(self.token_ids[:length], np.int64))

    def restore(self, length: int, tensors: Iterable[CacheTensor]) -> None:
        """Continue from what `save` gave."""
        for tensor in check_cache_tensors(tensors, {_TOKENS: [(np.dtype(np.int64), (length,))]}):
            self.token_ids = tensor.array.tolist()

    def close(self) -> None:
        """Nothing to free."""


def answers(texts: Sequence[Sequence[int]], *, after: Sequence[int], stop_id: int, vocabulary: int) -> NextLogits:
    """Logits that write one given answer after each occurrence of a marker.

    Args:
        texts: token ids of the answers, in the order of the turns; the last one serves all later turns.
        after: token ids that open an answer (what the template puts after `add_generation_prompt`).
        stop_id: follows each answer.
        vocabulary: length of the logits.
    """
    marker = list(after)

    def next_logits(token_ids: Sequence[int]) -> Logits:
        sequence = list(token_ids)
        starts = [i + len(marker) for i in range(len(sequence)) if sequence[i : i + len(marker)] == marker]
        answer = [*texts[min(len(starts), len(texts)) - 1], stop_id] if starts else [stop_id]
        written = len(sequence) - starts[-1] if starts else 0
        logits = np.zeros(vocabulary, np.float32)
        logits[answer[min(written, len(answer) - 1)]] = 20.0
        return logits

    return next_logits


def random_logits(vocabulary: int, seed: int = 0) -> NextLogits:
    """Logits that look random but depend only on the sequence: a model without structure, for comparing two runs."""

    def next_logits(token_ids: Sequence[int]) -> Logits:
        noise = np.random.default_rng([seed, *token_ids])
        return noise.normal(0.0, 3.0, vocabulary).astype(np.float32)

    return next_logits
