"""A loaded model: what `normistral.load` gives."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Self

from normistral.errors import ContextLengthError, UsageError
from normistral.progress import OnBytes, ignore_bytes
from normistral.runtime.chat import Chat
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.interpreter_exit import computing
from normistral.runtime.options import GenerationConfig
from normistral.runtime.overflow import Overflow
from normistral.runtime.prefix import Prefix
from normistral.runtime.runner import Prompt, Runner
from normistral.runtime.sampling import TokenScores, score_tokens
from normistral.runtime.sessions import restore_sequence


class Model(Runner):
    """Weights, tokenizer and template of one artifact, ready to generate.

    Chats and calls each have a KV cache of their own, so they may run in turn in any order, and from several threads:
    their forwards are serialised. Close it, or use it as a context manager, to give the memory back.
    """

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Complete a prompt; arguments and errors as in `stream`."""
        return Completion.from_chunks(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """Complete a prompt, chunk by chunk, without a chat template.

        Args:
            prompt: text, tokenised as the checkpoint's tokenizer does it; or token ids, taken as they are.
            options: fields of `GenerationConfig`.

        Raises:
            UsageError: an unknown option or wrong value, one that means nothing to this model, or an empty prompt.
            ContextLengthError: the prompt leaves no room in the model's context.
            ClosedError: the model was closed.
        """
        config = self.resolve(options)
        self.require_open()
        prompt_ids = self.encode(prompt)
        self.require_fit(len(prompt_ids), "the prompt")
        return self._stream_once(prompt_ids, config)

    def chat(self, system: str | None = None, overflow: Overflow = "error") -> Chat:
        """Start a conversation.

        Args:
            system: system message, or None for the template's own default.
            overflow: what to do when the conversation outgrows the context: "error" raises; "drop-oldest" leaves out
                whole exchanges from the beginning, "cut-middle" the middle of the longest messages. `Chat.left_out`
                says how many tokens, and from where.

        Raises:
            UsageError: this is a base model, or a wrong `overflow`.
        """
        self.require_open()
        if self.chat_template is None:
            raise UsageError(
                f"{self.name} is a base model: it completes text and knows no conversation",
                "use generate (normistral generate ARTIFACT --prompt TEXT)",
            )
        return Chat(self, self.chat_template, system, overflow)

    def prefill(self, prompt: Prompt) -> Prefix:
        """Compute the beginning of many prompts once: a document that questions will be asked about, or examples.

        Raises:
            UsageError, ContextLengthError, ClosedError: as `stream`.
            EngineError: the engine failed.
        """
        self.require_open()
        prompt_ids = self.encode(prompt)
        self.require_fit(len(prompt_ids), "the prompt")
        prefix = Prefix(self, prompt if isinstance(prompt, str) else prompt_ids)
        prefix.compute()
        return prefix

    def restore_chat(self, path: str | Path, overflow: Overflow = "error", on_bytes: OnBytes = ignore_bytes) -> Chat:
        """Go on with a conversation that `Chat.save` wrote; none of it is computed again.

        Args:
            overflow: as `chat` takes it.
            on_bytes: called with the number of bytes just read, for a progress bar.

        Raises:
            UsageError: there is no such file, it holds no conversation, or this is a base model.
            SessionError: it is damaged, from a newer version, or was saved with another artifact, engine or settings.
            EngineError: the engine failed.
            ClosedError: the model was closed.
        """
        chat = self.chat(overflow=overflow)
        chat.restore(path, on_bytes)
        return chat

    def restore_prefix(self, path: str | Path, on_bytes: OnBytes = ignore_bytes) -> Prefix:
        """Go on with what `Prefix.save` wrote; none of it is computed again. Arguments and errors as `restore_chat`."""
        self.require_open()
        header, sequence = restore_sequence(self, path, "prefix", on_bytes)
        assert header.prefix is not None
        return Prefix(self, header.prefix, sequence)

    def score(self, token_ids: Sequence[int], last: int | None = None) -> TokenScores:
        """Log-probabilities of given tokens, each after those before it.

        Calls that begin with the same tokens as the one before compute those once.

        Args:
            token_ids: taken as they are, so a BOS has to be among them.
            last: score the last `last` tokens; None scores all but the first, before which there is nothing.

        Raises:
            UsageError: ids outside the vocabulary, or no token before the first scored one.
            ContextLengthError: the tokens, without the last, exceed the model's context.
            EngineError: the engine failed, or gave logits that are not finite.
            ClosedError: the model was closed.
        """
        self.require_open()
        self.require_token_ids(token_ids)
        count = len(token_ids) - 1 if last is None else last
        if not 1 <= count < len(token_ids):
            raise UsageError(
                f"cannot score {count} of {len(token_ids)} tokens",
                "there has to be a token before the first scored one",
            )
        if len(token_ids) - 1 > self.context_length:  # the last token is scored, and never fed
            raise ContextLengthError(
                f"{len(token_ids)} tokens cannot be scored at once; {self.name} has room for {self.context_length}",
                "score them in windows",
            )
        with computing(), self.borrow_sequence() as sequence:
            return score_tokens(sequence.logits_of_last(token_ids[:-1], count), token_ids[-count:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stream_once(self, prompt_ids: list[int], config: GenerationConfig) -> Generator[Chunk, None, None]:
        with self.borrow_sequence() as sequence, self.cancellation() as event:
            yield from self.run(sequence, prompt_ids, config, event.is_set)
