"""A prompt prefix computed once, for many completions without a chat template."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from normistral.errors import UsageError
from normistral.progress import OnBytes, ignore_bytes
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.options import GenerationConfig
from normistral.runtime.runner import NonBlockingLock, Runner
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.sessions import save_sequence


class Prefix:
    """A text (or token ids) whose KV cache is kept; made by `Model.prefill` and `Model.restore_prefix`.

    Every completion is that of prefix and continuation together, tokenised as one text, whatever was asked before; to
    the last bit with a seed, and else but for the rounding of the arithmetic.

    Attributes:
        prompt: the text or token ids.
    """

    def __init__(self, runner: Runner, prompt: str | list[int], sequence: CachedSequence | None = None) -> None:
        self.prompt = prompt
        self._runner, self._sequence = runner, sequence
        self._busy = NonBlockingLock(
            "this prefix is being completed",
            "read that to its end, or close() its iterator; the model's cancel() makes it end soon",
        )

    def generate(self, continuation: str | Sequence[int], **options: Any) -> Completion:
        """Complete prefix and continuation; arguments and errors as in `stream`."""
        return Completion.from_chunks(self.stream(continuation, **options))

    def stream(self, continuation: str | Sequence[int], **options: Any) -> Generator[Chunk, None, None]:
        """Complete prefix and continuation, chunk by chunk.

        Args:
            continuation: text after a text, token ids after token ids.
            options: fields of `GenerationConfig`.

        Raises:
            UsageError: as `Model.stream`; or a text was to follow token ids, or ids a text.
            ContextLengthError: together they leave no room in the model's context.
            BusyError: this prefix is still being completed.
            ClosedError: the model was closed.
        """
        config = self._runner.resolve(options)
        self._runner.require_open()
        self._busy.require_free()
        prompt_ids = self._runner.encode(self._joined(continuation))
        self._runner.require_fit(len(prompt_ids), "the prompt")
        return self._complete(prompt_ids, config)

    def compute(self) -> None:
        """For `Model.prefill`: make the cache hold the prefix and nothing else."""
        self._sequence = self._sequence or self._runner.create_sequence()
        prompt_ids = self._runner.encode(self.prompt)
        with self._runner.cancellation() as event:
            self._sequence.reuse(prompt_ids)
            self._sequence.prefill(prompt_ids, event.is_set)

    def save(self, path: str | Path, on_bytes: OnBytes = ignore_bytes) -> None:
        """Write prefix and KV cache to a file, for `Model.restore_prefix`; arguments and errors as in `Chat.save`."""
        with self._busy.held():
            self.compute()
            assert self._sequence is not None
            save_sequence(self._runner, self._sequence, path, on_bytes, kind="prefix", prefix=self.prompt)

    def close(self) -> None:
        """Free the KV cache; the prefix can still be used, and is then computed anew."""
        with self._busy.held():
            if self._sequence is not None:
                self._sequence.close()
                self._sequence = None

    def _complete(self, prompt_ids: list[int], config: GenerationConfig) -> Generator[Chunk, None, None]:
        with self._busy.held(), self._runner.cancellation() as event:
            self._sequence = self._sequence or self._runner.create_sequence()
            yield from self._runner.run(self._sequence, prompt_ids, config, event.is_set)

    def _joined(self, continuation: str | Sequence[int]) -> str | list[int]:
        if isinstance(self.prompt, str) and isinstance(continuation, str):
            return self.prompt + continuation
        if not isinstance(self.prompt, str) and not isinstance(continuation, str):
            self._runner.require_token_ids(continuation)
            return [*self.prompt, *continuation]
        wanted = "a text" if isinstance(self.prompt, str) else "token ids"
        raise UsageError(f"this prefix is {wanted}, and its continuation is not", f"continue it with {wanted}")
