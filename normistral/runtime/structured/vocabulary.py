"""A model's tokens as the grammar library sees them: the bytes that each adds to a text, and the ends of an answer."""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

from normistral.runtime.detokenizer import spell_vocabulary
from normistral.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

_END = b"<end>"  # spelling of stop tokens that the tokenizer does not know


class GrammarVocabulary:
    """Tokens of one model, for all grammars that it is to follow; safe to share between threads.

    Built when it is first used: 0.3 s of processor time and 20 MB for 49,152 tokens.

    Args:
        tokenizer: the artifact's.
        size: logits of the model, which may be more than the tokenizer has tokens; those are never chosen.
        stop_token_ids: the model's own ends of sequence.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, stop_token_ids: Collection[int]) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.stop_token_ids = tuple(sorted(token_id for token_id in stop_token_ids if token_id < size))
        self._lock = threading.Lock()

    @property
    def engine(self) -> llguidance.LLTokenizer:
        """The library's own form of it."""
        with self._lock:
            return self._engine

    @cached_property
    def _engine(self) -> llguidance.LLTokenizer:
        import llguidance

        spelling: Any = _Spelling(self)
        return llguidance.LLTokenizer(spelling, eos_token=list(self.stop_token_ids))


class _Spelling:
    """What `llguidance.LLTokenizer` asks of a tokenizer that is not its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        tokenizer, size = vocabulary.tokenizer, vocabulary.size
        controls = {token.id for token in tokenizer.added_tokens if token.special or _is_markup(token.text)}
        controls.update(vocabulary.stop_token_ids)
        self.tokens = spell_vocabulary(tokenizer, size)
        for token_id in controls:
            self.tokens[token_id] = (tokenizer.token_text(token_id) or "").encode() or _END
        self.special_token_ids = sorted(controls)
        self.eos_token_id = vocabulary.stop_token_ids[0]
        self._deaf = tokenizer.deaf_to(
            [token for token in tokenizer.added_tokens if token.id in controls], at_start=False
        )
        self._ids = {spelled: token_id for token_id, spelled in enumerate(self.tokens) if token_id not in controls}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text as the model would write it; no control tokens."""
        token_ids = self._deaf.encode(text, add_special_tokens=False)
        spelled = text.encode()
        if b"".join(self.tokens[token_id] for token_id in token_ids) == spelled:
            return token_ids
        return self._longest_first(spelled)  # a normaliser changed it, such as by a blank in front

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


def _is_markup(text: str) -> bool:
    return text.startswith("<") and text.endswith(">")
