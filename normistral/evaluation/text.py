"""The text that is scored: its tokens, and which of its bytes each of them stands for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import UsageError
from normistral.text_input import read_text_file


@dataclass(frozen=True, slots=True)
class Text:
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


def tokenise(text: str, tokenizer: Tokenizer) -> Text:
    """Tokens of a text, as the tokenizer gives them without special tokens around them.

    The text of a control token counts as that token, as in transformers.
    """
    token_ids, offsets = tokenizer.encode_with_offsets(text)
    bytes_before = np.array([0, *accumulate(len(character.encode("utf-8")) for character in text)], np.int64)
    starts = [start for start, _ in offsets]
    ends = bytes_before[[*starts[1:], len(text)]] if token_ids else np.zeros(0, np.int64)
    nbytes = np.diff(np.maximum.accumulate(ends), prepend=0)
    return Text(hashlib.sha256(text.encode("utf-8")).hexdigest(), token_ids, nbytes)
