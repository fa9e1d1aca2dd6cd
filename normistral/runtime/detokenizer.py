"""Token ids to text, one at a time, in whole characters.

The decoder of a tokenizer.json is a chain of steps over a list of tokens. Each has an incremental twin here that gives
out what later tokens can no longer change and holds the rest, so a token costs the same however long the answer is.
It does not know engines or stop rules.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from normistral.artifact.tokenizer import Tokenizer
from normistral.errors import ArtifactError

_REPLACEMENT = "\ufffd"


class _Stage:
    """One step of the chain: a piece in, the pieces that are now certain out; by default nothing is held."""

    def push(self, piece: str) -> list[str]:
        raise NotImplementedError

    def flush(self) -> list[str]:
        return []

    def forget(self) -> list[str]:
        """The prompt ends: give out its whole characters, keep one that it left unfinished."""
        return []


class StreamDetokenizer:
    """Text of one generation.

    All pieces together are `tokenizer.decode(prompt + answer)` without its `tokenizer.decode(prompt)`: with a
    `prompt_tail`, a SentencePiece tokenizer keeps the blank in front of the answer's first word; without one the answer
    stands alone and loses it. A character that the prompt left unfinished belongs to the answer.

    Args:
        tokenizer: the artifact's.
        prompt_tail: last tokens of the prompt, all or at least one that is not special.

    Raises:
        ArtifactError: the tokenizer's decoder has a step that is not known here.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stages = _make_stages(tokenizer)
        if not self._stages:
            raise ArtifactError("the tokenizer has no decoder", "add one to tokenizer.json and export the model again")
        for token_id in prompt_tail:
            self.push(token_id)
        for index, stage in enumerate(self._stages):
            self._run(stage.forget(), index + 1)  # later steps must know that there was text before

    def push(self, token_id: int) -> str:
        """Characters that became certain: none in the middle of one, nor of special tokens and unknown ids."""
        token = self._tokenizer.token_text(token_id)
        if token is None or self._tokenizer.is_special(token_id):
            return ""
        return self._run([token], from_stage=0)

    def flush(self) -> str:
        """Remaining characters at the end; an unfinished character comes out as U+FFFD."""
        return "".join(self._run(stage.flush(), index + 1) for index, stage in enumerate(self._stages))

    def _run(self, pieces: list[str], from_stage: int) -> str:
        for stage in self._stages[from_stage:]:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return "".join(pieces)


def spell_vocabulary(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """Bytes that each token id below `size` adds to the UTF-8 of a text that has begun; none where it is no token.

    Raises:
        ArtifactError: as `StreamDetokenizer`.
    """
    stages = _make_stages(tokenizer)
    for stage in stages:
        stage.push("a")  # the beginning is treated otherwise
    return [_spell(piece, stages) if (piece := tokenizer.token_text(i)) is not None else b"" for i in range(size)]


def _spell(piece: str, stages: Sequence[_Stage]) -> bytes:
    for stage in stages:
        if isinstance(stage, _ByteLevel):
            return _letters_to_bytes(piece)
        if not isinstance(stage, _ByteFallback):
            piece = "".join(stage.push(piece))
        elif (byte := _byte_of(piece)) is not None:
            return bytes([byte])
    return piece.encode()


class _PerPiece(_Stage):
    """Steps that look at one piece only."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def push(self, piece: str) -> list[str]:
        return [self._change(piece)]


class _ByteFallback(_Stage):
    """`<0xF0>`: runs of byte tokens are UTF-8. One wrong byte spoils its whole run, each byte giving one U+FFFD, so
    nothing of a run is certain before it ends.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        byte = _byte_of(piece)
        if byte is None:
            return [*self.flush(), piece]
        self._run.append(byte)
        return []

    def flush(self) -> list[str]:
        run = bytes(self._run)
        self._run.clear()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)

    def forget(self) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        whole = decoder.decode(bytes(self._run))
        self._run = bytearray(decoder.getstate()[0])
        return [whole] if whole else []


class _ByteLevel(_Stage):
    """GPT-2's bytes as letters. All tokens together are UTF-8, malformed parts replaced.

    A token with a letter that stands for no byte counts as UTF-8 itself. (Behind `Fuse`, tokenizers then takes the
    whole text so, and shows Ġ for every blank; here it stays with that token.)
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        return [self._decoder.decode(_letters_to_bytes(piece))]

    def flush(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _Metaspace(_Stage):
    """▁ is a blank, except in the very first token, where it is nothing."""

    def __init__(self, replacement: str, prepend_scheme: str) -> None:
        self._replacement = replacement
        self._first = prepend_scheme != "never"

    def push(self, piece: str) -> list[str]:
        blank = "" if self._first else " "
        self._first = False
        return [piece.replace(self._replacement, blank)]


class _StripStart(_Stage):
    """Drops the first characters of the whole text, if they are `content`."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def push(self, piece: str) -> list[str]:
        start = 0
        while self._left and start < len(piece):
            if piece[start] == self._content:
                start += 1
                self._left -= 1
            else:
                self._left = 0
        return [piece[start:]]


class _ReplaceInText(_Stage):
    """Replaces a text that may begin in one piece and end in a later one: what could be its beginning is held."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content
        self._held = ""
        self._said = 0  # characters of what comes next that were given out with the prompt

    def push(self, piece: str) -> list[str]:
        *parts, rest = (self._held + piece).split(self._pattern)
        sizes = range(min(len(rest), len(self._pattern) - 1), 0, -1)
        size = next((size for size in sizes if self._pattern.startswith(rest[-size:])), 0)
        self._held = rest[len(rest) - size :]
        return self._say(self._content.join([*parts, rest[: len(rest) - size]]))

    def flush(self) -> list[str]:
        held, self._held = self._held, ""
        return self._say(held)

    def forget(self) -> list[str]:
        self._said = len(self._held)
        return [self._held]

    def _say(self, text: str) -> list[str]:
        if text:
            text, self._said = text[self._said :], 0
        return [text]


def _make_stages(tokenizer: Tokenizer) -> list[_Stage]:
    """Incremental forms of a decoder's steps; behind `ByteLevel` or `Fuse` the text is one piece for tokenizers."""
    stages: list[_Stage] = []
    is_joined = False
    for description in tokenizer.decoder_stages:
        match description:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if is_joined:
                stages.append(_ReplaceInText(pattern, content))
            case _:
                stages.append(_make_stage(description))
        is_joined = is_joined or description["type"] in ("ByteLevel", "Fuse")
    return stages


def _make_stage(description: dict[str, Any]) -> _Stage:
    """Incremental form of one decoder step of tokenizer.json (tokenizers 0.22, `decoders`)."""
    match description:
        case {"type": "ByteLevel"}:
            return _ByteLevel()
        case {"type": "ByteFallback"}:
            return _ByteFallback()
        case {"type": "Fuse"}:
            return _PerPiece(lambda piece: piece)
        case {"type": "Metaspace", "replacement": str(replacement)}:
            return _Metaspace(replacement, description.get("prepend_scheme", "always"))
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return _PerPiece(lambda piece: piece.replace(pattern, content))
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0}:
            return _StripStart(content, start)
        case _:
            raise ArtifactError(
                f"the tokenizer's decoder has a step that is not supported: {description}",
                "export a model of a family that this version supports",
            )


def _byte_of(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _letters_to_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in piece])
    except KeyError:
        return piece.encode("utf-8")


def _byte_letters() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 is itself, the other bytes for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_letters()
