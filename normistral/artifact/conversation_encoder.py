"""A rendered conversation to token ids, such that no message can write a control token.

Control tokens are the tokenizer's special tokens, the tags of the model's reasoning, and other added tokens that the
template itself writes and that look like markup (<tool_call>). Where each of them stands wholly in text of the
template, the ids are exactly those of the whole text. Otherwise the text is cut at the control tokens of the template,
and what lies between is tokenised by the same tokenizer with the control tokens switched off. It does not know jinja.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cached_property

from normistral.artifact.taint import TEMPLATE, UNKNOWN
from normistral.artifact.tokenizer import AddedToken, Tokenizer
from normistral.errors import TemplateError

_HINT = "remove the control token from the message"


class ConversationEncoder:
    """Encodes conversations of one template; safe to share between threads.

    Args:
        tokenizer: the artifact's.
        template: source of the chat template.
        tags: ids of added tokens that are control tokens too; None among them is none.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, tags: Collection[int | None] = ()) -> None:
        self._tokenizer = tokenizer
        self.control_tokens: tuple[AddedToken, ...] = tuple(
            token
            for token in tokenizer.added_tokens
            if token.text and (token.special or token.id in tags or (_is_markup(token.text) and token.text in template))
        )
        self._by_id = {token.id: token for token in self.control_tokens}
        self._by_text = {token.text: token for token in self.control_tokens}
        longest_first = sorted(self._by_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, sources: str) -> list[int]:
        """Ids of `text` without BOS or EOS of the post-processor (the template writes its own).

        Args:
            text: the rendered conversation.
            sources: TEMPLATE, MESSAGE or UNKNOWN for each character.

        Raises:
            TemplateError: it cannot be told who wrote a control token, or a message's text gives one all the same.
            UsageError: the text is not valid Unicode.
        """
        assert len(text) == len(sources)
        token_ids, offsets = self._tokenizer.encode_with_offsets(text)
        writers = [
            sources[slice(*self._without_blanks(self._by_id[token_id], text, start, end))]
            for token_id, (start, end) in zip(token_ids, offsets, strict=True)
            if token_id in self._by_id
        ]
        if all(set(writer) <= {TEMPLATE} for writer in writers):
            return token_ids
        if any(UNKNOWN in writer for writer in writers):
            raise TemplateError("the chat template hides whether it or a message wrote a control token", _HINT)
        return self._encode_apart(text, sources)

    def could_write_control_text(self, text: str) -> bool:
        """Whether `text` could give a control token, or a part of one, however a template cuts it."""
        inner = text.strip()
        return any(
            token.text[0] in text or token.text[-1] in text or (inner != "" and inner in token.text)
            for token in self.control_tokens
        )

    def _encode_apart(self, text: str, sources: str) -> list[int]:
        token_ids: list[int] = []
        position = 0
        for token, start, end in self._template_tokens(text, sources):
            token_ids += self._encode_ordinary(text[position:start], at_start=position == 0)
            token_ids.append(token.id)
            position = end
        return token_ids + self._encode_ordinary(text[position:], at_start=position == 0)

    def _encode_ordinary(self, text: str, *, at_start: bool) -> list[int]:
        token_ids = (self._opening if at_start else self._inner).encode(text, add_special_tokens=False) if text else []
        typed = next((self._by_id[token_id].text for token_id in token_ids if token_id in self._by_id), None)
        if typed is not None:  # some vocabularies (Unigram) know control tokens as ordinary pieces too
            raise TemplateError(f"this tokenizer cannot write {typed} of a message as ordinary text", _HINT)
        return token_ids

    def _template_tokens(self, text: str, sources: str) -> Iterator[tuple[AddedToken, int, int]]:
        """Control tokens written by the template, with the characters [start, end) they take.

        Leftmost, then longest, within each stretch of template text; flags as in `tokenizers`' AddedVocabulary.
        """
        previous_end = 0
        for stretch in re.finditer(f"{TEMPLATE}+", sources):
            for match in self._pattern.finditer(text, *stretch.span()):
                token, (start, end) = self._by_text[match[0]], match.span()
                if token.normalized and self._tokenizer.normalizer_changes(token.text):
                    raise TemplateError(f"this tokenizer searches {token.text} in changed text", _HINT)
                if token.single_word and (_is_word(text[:start][-1:]) or _is_word(text[end : end + 1])):
                    continue
                if token.lstrip:
                    while start > previous_end and _is_blank(text[start - 1]):
                        start -= 1
                if token.rstrip:
                    while end < len(text) and _is_blank(text[end]):
                        end += 1
                yield token, start, end
                previous_end = end

    @staticmethod
    def _without_blanks(token: AddedToken, text: str, start: int, end: int) -> tuple[int, int]:
        """Where the token itself stands in [start, end), which holds the blanks it swallowed too."""
        found = text.find(token.text, start, end)
        return (start, end) if found < 0 else (found, found + len(token.text))

    @cached_property
    def _opening(self) -> Tokenizer:
        return self._tokenizer.with_tokens_as_text(self.control_tokens, at_start=True)

    @cached_property
    def _inner(self) -> Tokenizer:
        return self._tokenizer.with_tokens_as_text(self.control_tokens, at_start=False)


def _is_markup(text: str) -> bool:
    """Like <think> or [INST]: not an added token that is a word or blanks."""
    return not any(char.isalnum() or char.isspace() for char in (text[0], text[-1]))


def _is_word(char: str) -> bool:
    return re.match(r"\w", char) is not None


def _is_blank(char: str) -> bool:
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"  # Unicode's White_Space, which Rust's \s follows
