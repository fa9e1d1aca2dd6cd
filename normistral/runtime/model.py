"""A loaded model: what `normistral.load` gives."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ClosedError, ContextLengthError, UsageError
from normistral.runtime.chat import Chat, Overflow
from normistral.runtime.chunks import Chunk, Completion
from normistral.runtime.detokenizer import StreamDetokenizer
from normistral.runtime.drafting.decoder import Decoder, Drafting, PlainDecoder
from normistral.runtime.engines.base import Backend, Capabilities
from normistral.runtime.generate import Limits, generate_tokens, stream_text
from normistral.runtime.interpreter_exit import close_at_exit, computing, computing_each
from normistral.runtime.options import GenerationConfig, require_applicable, resolve_options
from normistral.runtime.prefix import Prefix
from normistral.runtime.reasoning import ReasoningBudget, ReasoningSplitter, encode_close_tag
from normistral.runtime.scoring import TokenScores, score_tokens
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.session_file import OnBytes
from normistral.runtime.sessions import restore_sequence
from normistral.runtime.stopping import StopTexts
from normistral.runtime.structured.cache import Structures
from normistral.runtime.structured.constraint import Constraint
from normistral.runtime.structured.vocabulary import GrammarVocabulary
from normistral.runtime.text_stream import TextStream

Prompt = str | Sequence[int]


class Model:
    """Weights, tokenizer and template of one artifact, ready to generate.

    Chats and calls each have a KV cache of their own, so they may run in turn in any order, and from several threads:
    their forwards are serialised. Close it, or use it as a context manager, to give the memory back.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        tokenizer: Tokenizer,
        name: str = "model",
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.name = name
        self._backend = backend
        self.structures = Structures(
            GrammarVocabulary(tokenizer, manifest.architecture.vocabulary, manifest.stop_token_ids)
        )
        self._drafting = Drafting()
        self._forward_lock = threading.Lock()
        self._list_lock = threading.Lock()  # of what is alive and what is idle
        self._idle: CachedSequence | None = None  # kept between calls, so that prompts with one beginning share it
        self._sequences: weakref.WeakSet[CachedSequence] = weakref.WeakSet()
        self._running: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._closed = False
        self.chat_template: ChatTemplate | None = None
        if manifest.template is not None:
            self.chat_template = ChatTemplate(manifest.template, tokenizer, manifest.reasoning)
        close_at_exit(self)

    @property
    def capabilities(self) -> Capabilities:
        """The engine, its device and its settings."""
        return self._backend.capabilities

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer may take together."""
        return self.manifest.context_length

    def generate(self, prompt: Prompt, **options: Any) -> Completion:
        """Complete a prompt; arguments and errors as in `stream`."""
        return Completion.from_chunks(self.stream(prompt, **options))

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
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
                whole exchanges from the beginning and counts them in `Chat.dropped`.

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

    def restore_chat(
        self, path: str | Path, overflow: Overflow = "error", on_bytes: OnBytes = lambda count: None
    ) -> Chat:
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

    def restore_prefix(self, path: str | Path, on_bytes: OnBytes = lambda count: None) -> Prefix:
        """Go on with what `Prefix.save` wrote; none of it is computed again. Arguments and errors as `restore_chat`."""
        self.require_open()
        header, sequence = restore_sequence(self, path, "prefix", on_bytes)
        assert header.prefix is not None
        return Prefix(self, header.prefix, sequence)

    def score(self, token_ids: Sequence[int], last: int | None = None) -> TokenScores:
        """How likely the model finds given tokens, each after those before it.

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
        self._require_token_ids(token_ids)
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
        with computing(), self._borrow_sequence() as sequence:
            return score_tokens(sequence.logits_of_last(token_ids[:-1], count), token_ids[-count:])

    def cancel(self) -> None:
        """Stop everything that is generating, within one token; may be called from any thread."""
        for event in list(self._running):
            event.set()

    def close(self) -> None:
        """Stop what is running and free engine, weights and caches. Closing twice is fine."""
        self._closed = True
        self.cancel()
        with (
            computing(),
            self._forward_lock,
        ):  # whoever is in a forward finishes it; their next one finds the engine closed
            for sequence in self._living_sequences():
                sequence.close()
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # For Chat and Prefix: the parts of a generation.

    def resolve(self, options: dict[str, Any]) -> GenerationConfig:
        """The caller's options over the authors' over ours; raises UsageError as `stream` does."""
        config = resolve_options(self.manifest.sampling, options)
        require_applicable(config, self.manifest, self.name)
        if config.structure is not None:
            self.structures.require(config.structure, self.manifest.reasoning)
        return config

    def create_sequence(self, neighbours: Callable[[], Iterable[CachedSequence]] | None = None) -> CachedSequence:
        """A new KV cache on these weights.

        Args:
            neighbours: those whose caches it may copy; None is every living one.
        """
        self.require_open()
        chunk = self.capabilities.prefill_chunk
        with computing():
            engine = self._backend.create_engine()
        sequence = CachedSequence(engine, chunk, self._forward_lock, neighbours or self._living_sequences)
        with self._list_lock:
            self._sequences.add(sequence)
        return sequence

    @contextmanager
    def cancellation(self) -> Iterator[threading.Event]:
        """An event that `cancel` and `close` set while the context is open."""
        event = threading.Event()
        self._running.add(event)
        try:
            yield event
        finally:
            self._running.discard(event)

    def run(
        self,
        sequence: CachedSequence,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        cancelled: Callable[[], bool],
    ) -> Iterator[Chunk]:
        """Generate on a sequence, chunk by chunk."""
        limits = Limits(frozenset(self.manifest.stop_token_ids), self.context_length, cancelled)
        forced: deque[int] = deque()
        close_ids = encode_close_tag(self.manifest.reasoning, self.tokenizer)
        splitter = ReasoningSplitter.after_prompt(self.manifest.reasoning, self.tokenizer, prompt_ids)
        constraint, whole = self.structures.begin(config.structure, self.manifest.reasoning, splitter)
        decoder = self._decoder(sequence, prompt_ids, config, constraint)
        text = TextStream(
            StreamDetokenizer(self.tokenizer, prompt_ids),
            StopTexts(config.stop, None if whole is None else whole.advance),
            splitter,
            ReasoningBudget(
                config.max_reasoning_tokens,
                close_ids,
                forced,
                lambda: constraint is None or constraint.accepts(close_ids) == len(close_ids),
            ),
            forced,
        )
        tokens = generate_tokens(sequence, prompt_ids, config, limits, forced, decoder, constraint)
        return computing_each(stream_text(tokens, text))

    def require_open(self) -> None:
        """Raise ClosedError after `close`."""
        if self._closed:
            raise ClosedError(f"{self.name} was closed", "load it again")

    def require_fit(self, tokens: int, what: str, hint: str = "shorten it") -> None:
        """Raise ContextLengthError unless this many tokens leave room for one more."""
        if tokens >= self.context_length:
            raise ContextLengthError(
                f"{what} takes {tokens} tokens; {self.name} has room for {self.context_length}, answer included", hint
            )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; raises UsageError where `stream` does."""
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not prompt or not prompt_ids:
            raise UsageError("the prompt is empty", "give it some text")
        self._require_token_ids(prompt_ids)
        return prompt_ids

    def _living_sequences(self) -> list[CachedSequence]:
        with self._list_lock:
            return list(self._sequences)

    def _stream_once(self, prompt_ids: list[int], config: GenerationConfig) -> Iterator[Chunk]:
        with self._borrow_sequence() as sequence, self.cancellation() as event:
            yield from self.run(sequence, prompt_ids, config, event.is_set)

    @contextmanager
    def _borrow_sequence(self) -> Iterator[CachedSequence]:
        """The sequence that the last call used, with what its cache holds, or a new one."""
        with self._list_lock:
            sequence, self._idle = self._idle, None
        sequence = sequence or self.create_sequence()
        try:
            yield sequence
        finally:
            with self._list_lock:
                spare = self._idle is not None or self._closed
                if not spare:
                    self._idle = sequence
            if spare:
                sequence.close()

    def _decoder(
        self,
        sequence: CachedSequence,
        prompt_ids: Sequence[int],
        config: GenerationConfig,
        constraint: Constraint | None,
    ) -> Decoder:
        if not self._drafts(config):
            return PlainDecoder(sequence)
        return self._drafting.decoder(sequence, prompt_ids, None if constraint is None else constraint.accepts)

    def _drafts(self, config: GenerationConfig) -> bool:
        """Whether to draft: measured times decide how much, and the last bits of the logits show it."""
        return config.draft != "off" and not config.reproducible

    def _require_token_ids(self, token_ids: Sequence[int]) -> None:
        vocabulary = self.manifest.architecture.vocabulary
        wrong = [i for i in token_ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocabulary]
        if wrong:
            raise UsageError(
                f"{wrong[0]!r} is not a token id of this model", f"token ids go from 0 to {vocabulary - 1}"
            )
