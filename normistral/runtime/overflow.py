"""Conversations longer than the context: what is left out of them, and how that is said.

One policy for library, commands, batch jobs and server. It never touches a system message, and of the newest message
the end is always kept. Texts are cut between characters, and between words where there are any; a cut cannot make a
control token, because a message's text never does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, get_args

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import UsageError

Overflow = Literal["error", "drop-oldest", "cut-middle"]
OVERFLOW: Overflow = "error"
OVERFLOW_HELP = (
    "Where a conversation is longer than the context: error refuses it, drop-oldest leaves out its oldest exchanges, "
    "cut-middle the middle of its longest message."
)
GAP = "\n[...]\n"
"""Stands where the middle of a message was left out."""

_ANSWER_SHARE = 4  # at least a quarter of the context is kept for the answer, if it may be that long
_KEPT_TOKENS = 48  # of a message that is cut, at each end at least
_LEAST_CUT = 32  # tokens; less would hardly be more than what stands for it
_GUESSES = 4  # by characters, of the place where a conversation is cut; after these its halves are looked at
_STEPS = 8  # cuts grow by this share of the context, so that the next turn finds the same beginning in the KV cache
_WORD = 40  # characters in which the end of a word is looked for
_SYSTEM = ("system", "developer")

Encode = Callable[[Sequence[Mapping[str, Any]]], list[int]]
"""Token ids of a conversation, ready for its answer."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The part of a conversation that its prompt does not have.

    Attributes:
        tokens: tokens of the whole conversation without those of the prompt.
        messages: the first and the last message that are left out whole, counted from 0; None if there are none.
        cuts: (message, start, end): characters [start, end) of its content are left out.
    """

    tokens: int
    messages: tuple[int, int] | None = None
    cuts: tuple[tuple[int, int, int], ...] = ()

    def renumbered(self, places: Sequence[int]) -> LeftOut:
        """The same where message i is called places[i]."""
        messages = None if self.messages is None else (places[self.messages[0]], places[self.messages[1]])
        return LeftOut(self.tokens, messages, tuple((places[one], start, end) for one, start, end in self.cuts))

    def document(self) -> dict[str, Any]:
        """For programs."""
        cuts = [{"message": message, "start": start, "end": end} for message, start, end in self.cuts]
        return {"tokens": self.tokens, "messages": None if self.messages is None else list(self.messages), "cuts": cuts}

    def describe(self) -> str:
        """One line for people, who count messages from 1."""
        if self.messages is not None:
            first, last = (number + 1 for number in self.messages)
            return f"{self.tokens:,} tokens are left out for lack of room: messages {first} to {last}"
        places = "; ".join(f"characters {start:,} to {end:,} of message {one + 1}" for one, start, end in self.cuts)
        return f"{self.tokens:,} tokens are left out for lack of room: {places}"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation as the model gets it; still too long where nothing more may be left out of it.

    Attributes:
        dropped: messages left out whole, after the system message.
        left_out: None if the conversation is whole.
    """

    prompt_ids: list[int]
    dropped: int = 0
    left_out: LeftOut | None = None


def require_overflow(overflow: str) -> None:
    """Raise UsageError unless there is such a policy."""
    if overflow not in get_args(Overflow):
        raise UsageError(f"no policy {overflow!r}", f"overflow is one of: {', '.join(get_args(Overflow))}")


def answer_room(context: int, max_new_tokens: int) -> int:
    """Tokens that are kept for the answer."""
    return max(1, min(max_new_tokens, context // _ANSWER_SHARE))


def fit_conversation(
    messages: Sequence[Mapping[str, Any]],
    encode: Encode,
    tokenizer: Tokenizer,
    overflow: Overflow,
    limit: int,
    dropped: int = 0,
) -> Fitted:
    """Leave out of a conversation what does not fit.

    Args:
        messages: the whole conversation; the last message is the newest.
        limit: the most tokens of a prompt.
        dropped: messages after the system message that earlier turns left out already.
    """
    if overflow == "cut-middle":
        return _cut_middle(messages, encode, tokenizer, limit)
    prompt_ids = encode(without_oldest(messages, dropped))
    whole = None if dropped else len(prompt_ids)
    if overflow == "drop-oldest" and len(prompt_ids) > limit:
        dropped, prompt_ids = _drop_oldest(messages, encode, limit, dropped, prompt_ids)
    if not dropped:
        return Fitted(prompt_ids)
    first = len(messages) - len(_turns(messages))
    whole = len(encode(messages)) if whole is None else whole
    return Fitted(prompt_ids, dropped, LeftOut(whole - len(prompt_ids), (first, first + dropped - 1)))


def room_hint(overflow: Overflow) -> str:
    """Hint of the error where a conversation does not fit under this policy."""
    if overflow == "error":
        return "shorten the message, reset or undo, or let something be left out (--overflow drop-oldest or cut-middle)"
    return "shorten the message" if overflow == "drop-oldest" else "shorten it; nothing more may be left out"


def count_turns(messages: Sequence[Mapping[str, Any]]) -> int:
    """Messages after a leading system message."""
    return len(_turns(messages))


def _drop_oldest(
    messages: Sequence[Mapping[str, Any]], encode: Encode, limit: int, dropped: int, prompt_ids: list[int]
) -> tuple[int, list[int]]:
    """Leave out the fewest oldest exchanges such that the rest fits, or all but the newest message.

    Only the template and the tokenizer together can count a conversation, and that is what takes the time. So places
    are guessed from the characters, and counted until one fits and the place before it does not.

    Args:
        dropped, prompt_ids: what is left out already, and the ids of the rest, which are too many.
    """
    ends = [end for end in _exchange_ends(messages) if end > dropped]
    if not ends:
        return dropped, prompt_ids
    sizes = [sum(len(str(value)) for value in turn.values()) for turn in _turns(messages)]
    left = [0, *accumulate(reversed(sizes))][::-1]  # characters without so many messages
    low, high = -1, len(ends)  # places that do not fit and that fit, if only because nothing else is left
    low_point, high_point = (left[dropped], len(prompt_ids)), (0, 0)  # (characters, tokens) of these
    found: dict[int, list[int]] = {}
    while high - low > 1:
        if len(found) < _GUESSES:
            slope = (low_point[0] - high_point[0]) / max(1, low_point[1] - high_point[1])
            most = high_point[0] + slope * (limit - high_point[1])
            place = bisect_left(ends, -most, key=lambda end: -left[end])
        else:
            place = (low + high) // 2
        place = min(max(place, low + 1), high - 1)
        ids = found[place] = encode(without_oldest(messages, ends[place]))
        if len(ids) <= limit:
            high, high_point = place, (left[ends[place]], len(ids))
        else:
            low, low_point = place, (left[ends[place]], len(ids))
    place = min(high, len(ends) - 1)
    return ends[place], found[place]


def _cut_middle(messages: Sequence[Mapping[str, Any]], encode: Encode, tokenizer: Tokenizer, limit: int) -> Fitted:
    """Cut the longest message, and the next ones only where it has no more to give."""
    whole = len(prompt_ids := encode(messages))
    if whole <= limit:
        return Fitted(prompt_ids)
    cut_messages = [dict(message) for message in messages]
    texts = {
        number: _Text(message["content"], tokenizer)
        for number, message in enumerate(messages)
        if message["role"] not in _SYSTEM and isinstance(message.get("content"), str)
    }
    step = max(1, limit // _STEPS)
    while len(prompt_ids) > limit and any(text.spare > 0 for text in texts.values()):
        missing = -(-(len(prompt_ids) - limit) // step) * step
        for number, text in sorted(texts.items(), key=lambda one: -one[1].spare):
            if missing > 0 and text.spare > 0:
                missing -= text.shorten(missing)
                cut_messages[number]["content"] = text.shown
        prompt_ids = encode(cut_messages)
    cuts = tuple((number, *text.cut) for number, text in texts.items() if text.cut is not None)
    return Fitted(prompt_ids, 0, LeftOut(whole - len(prompt_ids), cuts=cuts) if cuts else None)


class _Text:
    """The content of a message whose middle may be left out."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._text = text
        _, self._offsets = tokenizer.encode_with_offsets(text)
        self._removed = 0  # tokens
        self.cut: tuple[int, int] | None = None

    @property
    def spare(self) -> int:
        """Tokens that may still be left out."""
        left = len(self._offsets) - 2 * _KEPT_TOKENS - self._removed
        return left if left >= _LEAST_CUT or self._removed else 0

    @property
    def shown(self) -> str:
        """The text without its middle."""
        return self._text if self.cut is None else self._text[: self.cut[0]] + GAP + self._text[self.cut[1] :]

    def shorten(self, tokens: int) -> int:
        """Leave out so many tokens more, or as many as there are; gives how many."""
        taken = min(max(tokens, 0 if self._removed else _LEAST_CUT), self.spare)
        self._removed += taken
        kept = len(self._offsets) - self._removed
        start = self._offsets[kept - kept // 2 - 1][1]
        end = self._offsets[len(self._offsets) - kept // 2][0]
        self.cut = self._word_end_before(start), self._word_start_after(max(start, end))
        return taken

    def _word_end_before(self, place: int) -> int:
        near = range(place, place - min(_WORD, place // 4), -1)
        return next((one for one in near if self._text[one : one + 1].isspace()), place)

    def _word_start_after(self, place: int) -> int:
        near = range(place, place + min(_WORD, (len(self._text) - place) // 4))
        return next((one for one in near if self._text[one - 1 : one].isspace()), place)


def _turns(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Messages after a leading system message."""
    return messages[1:] if messages and messages[0]["role"] in _SYSTEM else messages


def without_oldest(messages: Sequence[Mapping[str, Any]], dropped: int) -> Sequence[Mapping[str, Any]]:
    """The conversation without so many messages after its system message."""
    turns = _turns(messages)
    return [*messages[: len(messages) - len(turns)], *turns[dropped:]]


def _exchange_ends(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of messages after the system message up to the end of each exchange but the newest."""
    return [number for number, turn in enumerate(_turns(messages)) if number and turn["role"] == "user"]
