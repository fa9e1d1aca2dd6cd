"""The text that is scored: its tokens, and the windows that fit a model's context.

It knows a tokenizer and no model. Two conventions of windows:

- "sliding" scores every token exactly once. The first window scores all of its tokens; each later one the next `stride`
  tokens, behind as many of the tokens before them as fit. The last window is as long as the others where the text
  allows it. With the default stride of half a window, every token behind the first window has at least half a window
  in front of it.
- "llama.cpp" does what llama.cpp's `llama-perplexity` does with `-c LENGTH` and without `--ppl-stride`
  (tools/perplexity/perplexity.cpp, function `perplexity`). The text is encoded with a BOS in front where the tokenizer
  adds one, and cut into chunks of LENGTH tokens; what is left over at the end is dropped. Where the tokenizer adds a
  BOS, it takes the place of each chunk's first token. Scored are the tokens from LENGTH // 2 + 1 of a chunk (counted
  from 0) to its last, so 255 of 512. Fewer than 2 · LENGTH tokens are refused. (Of the text of a control token,
  `llama-perplexity` makes ordinary tokens; here it is that token, as in transformers.)

A sliding window too begins with the BOS wherever the tokenizer puts one in front of text: a model that was trained with
one leans on it in every sequence, and a window without it would measure its absence. Without a BOS nothing predicts
the text's first token, which is then not scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import UsageError
from normistral.text_input import read_text_file

Convention = Literal["sliding", "llama.cpp"]
DEFAULT_LENGTH = 512  # llama.cpp's default too


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A tokenised text.

    Attributes:
        sha256: of the text in UTF-8.
        token_ids: without BOS.
        nbytes: int64 [tokens], UTF-8 bytes that each token stands for; they sum to the size of the text. The bytes of a
            character that several tokens spell are the last one's; what the tokenizer drops is the token's before it.
    """

    sha256: str
    token_ids: list[int]
    nbytes: NDArray[np.int64]


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
        UsageError: it cannot be read, is empty or not UTF-8.
    """
    text = read_text_file(path, "give --text the path of a text file")
    if not text.strip():
        raise UsageError(f"{path} is empty", "give --text a file with some text")
    return text


def tokenise(text: str, tokenizer: Tokenizer) -> TokenizedText:
    """Tokens of a text, as the tokenizer gives them without special tokens around them.

    The text of a control token counts as that token, as in transformers.
    """
    token_ids, offsets = tokenizer.encode_with_offsets(text)
    bytes_before = np.array([0, *accumulate(len(character.encode("utf-8")) for character in text)], np.int64)
    starts = [start for start, _ in offsets]
    ends = bytes_before[[*starts[1:], len(text)]] if token_ids else np.zeros(0, np.int64)
    nbytes = np.diff(np.maximum.accumulate(ends), prepend=0)
    return TokenizedText(hashlib.sha256(text.encode("utf-8")).hexdigest(), token_ids, nbytes)


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """Settings of the windows of a text.

    Attributes:
        convention: "sliding" or "llama.cpp"; see above.
        length: tokens of a window, BOS included.
        stride: tokens that a sliding window scores, the first one excepted; None in the other convention.
        bos_id: the token that begins every window, or None.
    """

    convention: Convention
    length: int
    stride: int | None
    bos_id: int | None


@dataclass(frozen=True, slots=True)
class Window:
    """One sequence for a model.

    Attributes:
        token_ids: the whole sequence, BOS included.
        start: index in the text of the first token that is scored.
        scored: how many are scored: the last ones of `token_ids`.
    """

    token_ids: tuple[int, ...]
    start: int
    scored: int

    @property
    def fed_ids(self) -> tuple[int, ...]:
        """Input of the model. Its last `scored` logits are the predictions of the scored tokens."""
        return self.token_ids[:-1]

    @property
    def targets(self) -> tuple[int, ...]:
        """The scored tokens."""
        return self.token_ids[-self.scored :]


def choose_windows(
    convention: str, length: int | None, stride: int | None, *, context_length: int, bos_id: int | None
) -> WindowSettings:
    """Settings from what the user gave; None is the default.

    Args:
        length: at most `context_length`, which is also its default where that is less than 512.
        stride: default half of `length`.
        bos_id: the token that the tokenizer puts in front of text, or None.

    Raises:
        UsageError: an unknown convention, a stride where it means nothing, or a number out of range.
    """
    if convention not in get_args(Convention):
        raise UsageError(f"--windows {convention} is unknown", f"it is one of: {', '.join(get_args(Convention))}")
    length = min(context_length, DEFAULT_LENGTH) if length is None else length
    shortest = 3 if convention == "llama.cpp" else 2
    if not shortest <= length <= context_length:
        raise UsageError(
            f"a window of {length} tokens is not possible", f"give from {shortest} to the context, {context_length}"
        )
    if convention == "llama.cpp":
        if stride is not None:
            raise UsageError(
                "--stride means nothing with --windows llama.cpp: its chunks do not overlap", "leave one of them out"
            )
        return WindowSettings("llama.cpp", length, None, bos_id)
    stride = max(length // 2, 1) if stride is None else stride
    if not 1 <= stride < length:
        raise UsageError(f"a stride of {stride} tokens is not possible", f"give from 1 to {length - 1}")
    return WindowSettings("sliding", length, stride, bos_id)


def cut(token_ids: Sequence[int], settings: WindowSettings) -> list[Window]:
    """The windows of a text, in its order.

    Args:
        token_ids: the text's tokens, without BOS.

    Raises:
        UsageError: the text is too short.
    """
    return _chunks(token_ids, settings) if settings.convention == "llama.cpp" else _slide(token_ids, settings)


def _slide(token_ids: Sequence[int], settings: WindowSettings) -> list[Window]:
    assert settings.stride is not None
    if len(token_ids) < 2:
        raise UsageError(f"the text has {len(token_ids)} tokens; at least 2 are needed", "give a longer text")
    bos = () if settings.bos_id is None else (settings.bos_id,)
    room = settings.length - len(bos)
    first = 1 - len(bos)  # index of the first token that anything stands in front of
    end = min(room, len(token_ids))
    windows = [Window((*bos, *token_ids[:end]), first, end - first)]
    while end < len(token_ids):
        start, end = end, min(end + settings.stride, len(token_ids))
        windows.append(Window((*bos, *token_ids[max(end - room, 0) : end]), start, end - start))
    return windows


def _chunks(token_ids: Sequence[int], settings: WindowSettings) -> list[Window]:
    length, shift = settings.length, 0 if settings.bos_id is None else 1  # the encoded text begins with the BOS
    encoded = token_ids if settings.bos_id is None else [settings.bos_id, *token_ids]
    if len(encoded) < 2 * length:
        raise UsageError(
            f"the text has {len(encoded)} tokens; llama.cpp's convention needs twice the window, {2 * length}",
            "give a longer text, or a smaller --window-tokens",
        )
    first = length // 2 + 1
    windows = []
    for begin in range(0, len(encoded) - length + 1, length):
        chunk = list(encoded[begin : begin + length])
        if settings.bos_id is not None:
            chunk[0] = settings.bos_id
        windows.append(Window(tuple(chunk), begin + first - shift, length - first))
    return windows


def take_windows(windows: Sequence[Window], max_tokens: int | None) -> Sequence[Window]:
    """The first windows, up to the one that brings the scored tokens to `max_tokens`; None is all.

    Raises:
        UsageError: it is not at least 1.
    """
    if max_tokens is None:
        return windows
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} leaves nothing to score", "give at least 1")
    scored = 0
    for count, window in enumerate(windows, start=1):
        scored += window.scored
        if scored >= max_tokens:
            return windows[:count]
    return windows
