"""Text to token ids and back, on an artifact's tokenizer.json and the `tokenizers` library.

It knows nothing of templates or models. Truncation and padding that a tokenizer.json may ask for are switched off, as
transformers does for a plain call.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normistral.errors import EXPORT_AGAIN, ArtifactError, UsageError, first_line

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_NAME = "tokenizer.json"
# Characters. `tokenizers` holds the interpreter while it encodes one text, so that no other thread runs, and lets go of
# it for a list of texts.
_BRIEF_TEXT = 4096


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in text before the tokenizer's model sees it.

    Attributes:
        special: control token such as <|im_end|>; left out by `decode` unless asked for.
        lstrip, rstrip: it swallows the blanks on that side.
        single_word: it is only found where no word character touches it.
        normalized: it is searched in normalised text.
    """

    id: int
    text: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool


class Tokenizer:
    """A tokenizer; safe to share between threads.

    Args:
        backend: the `tokenizers.Tokenizer` to wrap; its truncation and padding are switched off.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocabulary_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.added_tokens: tuple[AddedToken, ...] = tuple(
            AddedToken(i, t.content, t.special, t.lstrip, t.rstrip, t.single_word, t.normalized)
            for i, t in sorted(backend.get_added_tokens_decoder().items())
        )
        self.special_tokens: dict[str, int] = {token.text: token.id for token in self.added_tokens if token.special}
        self._special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` of an artifact or checkpoint.

        Raises:
            ArtifactError: it is missing, unreadable or damaged.
        """
        import tokenizers

        path = folder / TOKENIZER_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as exc:
            raise ArtifactError(f"{path} is missing", EXPORT_AGAIN) from exc
        except OSError as exc:
            raise ArtifactError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
        except UnicodeDecodeError as exc:
            raise ArtifactError(f"{path} is not UTF-8 text", EXPORT_AGAIN) from exc
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except BaseException as exc:  # `tokenizers` raises plain Exception, and PanicException for some damage
            if isinstance(exc, (KeyboardInterrupt, SystemExit)):
                raise
            raise ArtifactError(f"{path} is not a valid tokenizer: {first_line(exc)[:200]}", EXPORT_AGAIN) from exc

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, as `transformers` gives them.

        Args:
            add_special_tokens: let the tokenizer's post-processor add its BOS (and EOS), if it has any.

        Raises:
            UsageError: the text cannot be written as UTF-8 (a lone surrogate).
        """
        return self.encode_with_offsets(text, add_special_tokens=add_special_tokens)[0]

    def encode_with_offsets(
        self, text: str, *, add_special_tokens: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the characters [start, end) that it came from.

        Raises:
            UsageError: as `encode`.
        """
        require_unicode(text)
        if len(text) <= _BRIEF_TEXT:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids, encoding.offsets

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside the vocabulary are left out. Blanks are never tidied up."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (Ġ, ▁ and <0x0A> included), or None outside of it."""
        text: str | None = self._backend.id_to_token(token_id)
        return text

    def token_id(self, text: str) -> int | None:
        """Id of the token that the vocabulary spells exactly so, or None."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    def vocabulary(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, added ones included, and its id."""
        tokens: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return tokens

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special_ids

    @cached_property
    def decoder_stages(self) -> tuple[dict[str, Any], ...]:
        """The decoder's steps as tokenizer.json describes them, sequences flattened; empty when it has none."""
        decoder = self._backend.decoder
        return _flatten(json.loads(decoder.__getstate__())) if decoder is not None else ()

    def normalizer_changes(self, text: str) -> bool:
        """Whether the normaliser turns `text` into something else."""
        normalizer = self._backend.normalizer
        return normalizer is not None and normalizer.normalize_str(text) != text

    def with_tokens_as_text(self, tokens: Sequence[AddedToken], *, at_start: bool) -> Tokenizer:
        """The same tokenizer, except that it takes these added tokens for ordinary text.

        Args:
            tokens: must include every special token.
            at_start: whether texts begin where the whole text does. Otherwise `Metaspace` with the scheme "first" puts
                no blank in front of them.
        """
        import tokenizers

        as_text = {token.text for token in tokens}
        assert as_text.issuperset(self.special_tokens)
        description = json.loads(self._backend.to_str())
        for token in description["added_tokens"]:
            token["special"] = token["content"] in as_text
        if not at_start:
            _never_prepend_first(description["pre_tokenizer"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
        backend.encode_special_tokens = True
        return Tokenizer(backend)


def _flatten(stage: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    if stage["type"] != "Sequence":
        return (stage,)
    return tuple(inner for part in stage["decoders"] for inner in _flatten(part))


def _never_prepend_first(pre_tokenizer: dict[str, Any] | None) -> None:
    if pre_tokenizer is None:
        return
    if pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"
    for part in pre_tokenizer.get("pretokenizers", ()):
        _never_prepend_first(part)


def require_unicode(text: str) -> str:
    """The text, if it can be encoded as UTF-8; raises UsageError for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise UsageError(
            f"the text holds U+{ord(text[exc.start]):04X} at position {exc.start}, which is half a character",
            "read the text as UTF-8",
        ) from exc
    return text
