"""A model's tokens as the grammar library sees them: bytes of each token, and stop tokens."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

from normistral.artifact.tokenizer import Tokenizer
from normistral.runtime.detokenizer import spell_vocabulary
from normistral.runtime.interpreter_exit import InterruptSafeLock

if TYPE_CHECKING:
    import llguidance

_END = b"<end>"  # spelling of stop tokens that the tokenizer does not know


class GrammarVocabulary:
    """Tokens of one model, for all grammars that it is to follow; safe to share between threads.

    Built when it is first used: 0.15 s of processor time and 4 MB for the demo model's 49,152 tokens, 0.8 s and 90 MB
    for 250,000 of them.

    Args:
        tokenizer: the artifact's.
        size: logits of the model, which may be more than the tokenizer has tokens; those are never chosen.
        stop_token_ids: the model's own ends of sequence.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, stop_token_ids: Collection[int]) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.stop_token_ids = tuple(sorted(token_id for token_id in stop_token_ids if token_id < size))
        self._lock = InterruptSafeLock()

    @property
    def engine(self) -> llguidance.LLTokenizer:
        """The library's own form of it."""
        with self._lock:
            return self._engine

    @cached_property
    def _engine(self) -> llguidance.LLTokenizer:
        import llguidance

        spelling: Any = _Spelling(self)
        return llguidance.LLTokenizer(spelling, eos_token=list(self.stop_token_ids) or None)


class _Spelling:
    """Tokenizer wrapper as `llguidance.LLTokenizer` expects it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        tokenizer = vocabulary.tokenizer
        controls = {token.id for token in tokenizer.added_tokens if token.special or _is_tag(token.text)}
        controls.update(vocabulary.stop_token_ids)
        self.tokens = spell_vocabulary(tokenizer, vocabulary.size)
        for token_id in controls:
            self.tokens[token_id] = (tokenizer.token_text(token_id) or "").encode() or _END
        self.special_token_ids = sorted(controls)
        self.eos_token_id = next(iter(vocabulary.stop_token_ids), None)
        self._tokenizer, self._controls = tokenizer, controls
        # One that puts a blank in front gets a copy that does not, which is dear only in large vocabularies.
        if self._encode("a") is None:
            self._tokenizer = tokenizer.with_tokens_as_text(
                [token for token in tokenizer.added_tokens if token.id in controls], at_start=False
            )

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text as the model would write it; no control tokens."""
        token_ids = self._encode(text)
        return self._longest_first(text.encode()) if token_ids is None else token_ids

    def _encode(self, text: str) -> list[int] | None:
        """The tokenizer's own tokens, if they are this text: normalisers may change it, control tokens hide in it."""
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        spelled = b"".join(self.tokens[token_id] for token_id in token_ids)
        return token_ids if spelled == text.encode() and self._controls.isdisjoint(token_ids) else None

    def _longest_first(self, text: bytes) -> list[int]:
        token_ids: list[int] = []
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:  # the vocabulary cannot spell it
                break
            token_ids.append(self._ids[text[start:end]])
            start = end
        return token_ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {spelled: token_id for token_id, spelled in enumerate(self.tokens) if token_id not in self._controls}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))


def _is_tag(text: str) -> bool:
    """Like <think> or <|im_end|>; brackets of other kinds are text that a structure may ask for."""
    return text.startswith("<") and text.endswith(">")
