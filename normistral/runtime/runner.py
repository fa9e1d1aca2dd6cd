"""Generations on loaded weights: sequences with their KV caches, and the way from token ids to chunks of text."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import Manifest
from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import BusyError, ClosedError, ContextLengthError, UsageError
from normistral.runtime.chunks import Chunk
from normistral.runtime.detokenizer import StreamDetokenizer
from normistral.runtime.engines.base import Backend, Engine, EngineInfo
from normistral.runtime.generate import Limits, generate_tokens, stream_text
from normistral.runtime.interpreter_exit import (
    InterruptSafeLock,
    close_at_exit,
    computing,
    computing_each,
    is_inherited,
)
from normistral.runtime.options import GenerationConfig, encode_breakers, require_applicable, resolve_options
from normistral.runtime.reasoning import ReasoningBudget, ReasoningSplitter, encode_close_tag
from normistral.runtime.sequence import CachedSequence
from normistral.runtime.speculative.decoder import Decoder, PromptLookup
from normistral.runtime.speculative.draft_length import StepCosts
from normistral.runtime.stopping import StopTexts
from normistral.runtime.structured.constraint import StructureCompiler
from normistral.runtime.structured.vocabulary import GrammarVocabulary
from normistral.runtime.text_stream import TextStream

Prompt = str | Sequence[int]


class NonBlockingLock:
    """A lock that is held or refused, and never waited for.

    Args:
        message, hint: of the `BusyError` where it is held already.
    """

    def __init__(self, message: str, hint: str) -> None:
        self._message, self._hint = message, hint
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock while the context is open; raises BusyError where it is held."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(self._message, self._hint)
        try:
            yield
        finally:
            self._lock.release()

    def require_free(self) -> None:
        """Raise BusyError where the lock is held."""
        if self._lock.locked():
            raise BusyError(self._message, self._hint)


class Runner:
    """Weights, tokenizer and chat template of one artifact, and the sequences on them.

    Chats, prefixes and sessions work on it; `Model` is its public face. Forwards of all sequences are serialised.
    """

    def __init__(self, backend: Backend, manifest: Manifest, tokenizer: Tokenizer, name: str = "model") -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.name = name
        self._backend = backend
        self.structures = StructureCompiler(
            GrammarVocabulary(tokenizer, manifest.architecture.vocabulary, manifest.stop_token_ids)
        )
        self._step_costs = StepCosts()
        self._forward_lock = InterruptSafeLock()
        self._list_lock = InterruptSafeLock()  # of what is alive and what is idle
        self._idle: CachedSequence | None = None  # kept between calls, so that prompts with one beginning share it
        self._sequences: weakref.WeakSet[CachedSequence] = weakref.WeakSet()
        self._running: set[threading.Event] = set()  # no WeakSet: threads change it while `cancel` reads it
        self._closed = False
        self.chat_template: ChatTemplate | None = None
        if manifest.template is not None:
            self.chat_template = ChatTemplate(manifest.template, tokenizer, manifest.reasoning)
        close_at_exit(self)

    @property
    def backend(self) -> Backend:
        """The loaded weights."""
        return self._backend

    @property
    def capabilities(self) -> EngineInfo:
        """The engine, its device and its settings."""
        return self._backend.capabilities

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and answer may take together."""
        return self.manifest.context_length

    def cancel(self) -> None:
        """Stop everything that is generating, within one token; may be called from any thread."""
        for event in list(self._running):
            event.set()

    def close(self) -> None:
        """Stop what is running and free engine, weights and caches. Closing twice is fine."""
        self._closed = True
        self.cancel()
        if is_inherited(self):
            return
        with computing(), self._forward_lock:  # a running forward ends first; the next finds the engine closed
            for sequence in self._living_sequences():
                sequence.close()
            self._backend.close()

    def resolve(self, options: dict[str, Any]) -> GenerationConfig:
        """The caller's options over the authors' over ours; raises UsageError as `stream` does."""
        config = resolve_options(self.manifest.sampling, options)
        require_applicable(config, self.manifest, self.name)
        if config.structure is not None:
            self.structures.require(config.structure, self.manifest.reasoning)
        return encode_breakers(config, self.tokenizer)

    def create_sequence(
        self, neighbours: Callable[[], Iterable[CachedSequence]] | None = None, engine: Engine | None = None
    ) -> CachedSequence:
        """A new KV cache on these weights.

        Args:
            neighbours: those whose caches it may copy; None is every living one.
            engine: an empty one of the same backend; None makes one.
        """
        self.require_open()
        chunk = self.capabilities.prefill_chunk
        with computing():
            engine = engine or self._backend.create_engine()
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
        drafter = PromptLookup(prompt_ids) if self._drafts(config) else None
        draft_filter = None if constraint is None else constraint.count_accepted
        decoder = Decoder(sequence, self._step_costs, drafter, draft_filter)
        text = TextStream(
            StreamDetokenizer(self.tokenizer, prompt_ids),
            StopTexts(config.stop, None if whole is None else whole.advance),
            splitter,
            ReasoningBudget(
                config.max_reasoning_tokens,
                close_ids,
                forced,
                lambda: constraint is None or constraint.count_accepted(close_ids) == len(close_ids),
            ),
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
        prompt_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        self.require_token_ids(prompt_ids)
        if not prompt or not prompt_ids:
            raise UsageError("the prompt is empty", "give it some text")
        return list(prompt_ids)

    def _living_sequences(self) -> list[CachedSequence]:
        with self._list_lock:
            return list(self._sequences)

    @contextmanager
    def borrow_sequence(self) -> Iterator[CachedSequence]:
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

    def _drafts(self, config: GenerationConfig) -> bool:
        """Whether to draft: measured times decide how much, and the last bits of the logits show it."""
        return config.draft != "off" and not config.reproducible

    def require_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise UsageError for an id outside the vocabulary, and for what is no list: bytes would be taken for ids."""
        if not isinstance(token_ids, Sequence) or isinstance(token_ids, bytes | bytearray | memoryview):
            raise UsageError(
                f"a {type(token_ids).__name__} is neither a text nor a list of token ids",
                "decode bytes to a text, and make a list of an array with tolist()",
            )
        vocabulary = self.manifest.architecture.vocabulary
        wrong = [i for i in token_ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocabulary]
        if wrong:
            raise UsageError(
                f"{wrong[0]!r} is not a token id of this model", f"token ids go from 0 to {vocabulary - 1}"
            )
