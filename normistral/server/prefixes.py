"""`--prefix NAME=FILE`: files to named prefixes of each served model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import msgspec

from normistral.artifact import store
from normistral.artifact.chat_template import ChatTemplate
from normistral.errors import UsageError
from normistral.files import open_file
from normistral.runtime.engines.block_pool import BLOCK_TOKENS
from normistral.runtime.sessions import MAGIC, SessionHeader, open_session
from normistral.server.backends.prefixes import NamedPrefix
from normistral.server.model_handler import ModelHandler
from normistral.text_input import read_text_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FOLLOWING = ("", "\n\nA", " a", ".", "\n")  # what may stand behind the text; tokens that differ are not its own
_HINT = "give a text, or a file that a prefix's save() wrote"


@dataclass(frozen=True, slots=True)
class PrefixFile:
    """A file that was named.

    Attributes:
        content: a text, or what is saved in it.
    """

    name: str
    path: Path
    content: str | SessionHeader


def read_prefixes(values: Sequence[str]) -> list[PrefixFile]:
    """Files of `--prefix`, read once.

    Raises:
        UsageError: a value is no NAME=FILE, a name is there twice, or a file cannot be used.
        SessionError: a saved prefix is damaged.
    """
    found: list[PrefixFile] = []
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or not file or not _NAME.fullmatch(name):
            raise UsageError(
                f"--prefix {value} is no NAME=FILE", "such as kommune=vedtak.txt; a name has letters, digits, . _ and -"
            )
        if name in {one.name for one in found}:
            raise UsageError(f"two prefixes are called {name}", "give one of them another name")
        found.append(PrefixFile(name, Path(file), _read(Path(file))))
    return found


def add_prefixes(handlers: Sequence[ModelHandler], files: Sequence[PrefixFile]) -> list[ModelHandler]:
    """The models with their prefixes: texts for all of them, saved ones for the artifact that they were saved with.

    Raises:
        UsageError: a prefix is too short or too long, or was saved with none of these artifacts.
    """
    for file in files:
        if isinstance(file.content, SessionHeader) and not any(_is_of(one, file.content) for one in handlers):
            raise UsageError(
                f"{file.path} was saved with another artifact ({file.content.artifact})",
                "serve that one, or give the text itself",
            )
    return [_add(handler, files) for handler in handlers]


def _add(handler: ModelHandler, files: Sequence[PrefixFile]) -> ModelHandler:
    prefixes = []
    for file in files:
        if isinstance(file.content, str):
            token_ids = _tokens_of(handler, file.content)
        elif _is_of(handler, file.content):
            token_ids = tuple(file.content.token_ids)
        else:
            continue
        if not BLOCK_TOKENS < len(token_ids) < handler.context_length:
            raise UsageError(
                f"the prefix {file.name} has {len(token_ids)} tokens; {handler.name} can keep from {BLOCK_TOKENS + 1} "
                f"to {handler.context_length - 1}",
                "leave it out" if len(token_ids) <= BLOCK_TOKENS else "shorten it",
            )
        is_text = isinstance(file.content, str)
        place = {"kept": str(_place(handler, file.name))} if is_text else {"saved": str(file.path.resolve())}
        prefixes.append(NamedPrefix(file.name, token_ids, **place))
    return replace(handler, load=msgspec.structs.replace(handler.load, prefixes=prefixes))


def _read(path: Path) -> str | SessionHeader:
    if not _is_saved(path):
        return read_text_file(path, _HINT)
    with open_session(path) as session:
        if session.header.kind != "prefix":
            raise UsageError(f"{path} is a saved {session.header.kind}, not a prefix", _HINT)
        return session.header


def _is_saved(path: Path) -> bool:
    if not path.is_file():  # a pipe, which can be read once only
        return False
    try:
        with os.fdopen(open_file(path), "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:  # the text's reader says why
        return False


def _is_of(handler: ModelHandler, header: SessionHeader) -> bool:
    return header.key.artifact_sha256 == handler.manifest.sha256


def _tokens_of(handler: ModelHandler, text: str) -> tuple[int, ...]:
    """Tokens with which all prompts begin that begin with the text: of a chat model, as the system message."""
    text = text.rstrip()
    encode = handler.tokenizer.encode if handler.template is None else _as_system_message(handler.template)
    columns = zip(*(encode(text + following) for following in _FOLLOWING), strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _as_system_message(template: ChatTemplate) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        return template.encode([{"role": "system", "content": text}, {"role": "user", "content": "a"}])

    return encode


def _place(handler: ModelHandler, name: str) -> Path:
    """Where the KV cache is kept for the next start: a file for each name and artifact."""
    digest = hashlib.sha256(f"{handler.manifest.sha256} {handler.load.config}".encode()).hexdigest()[:16]
    return store.cache_dir() / "prefixes" / f"{name}-{digest}"
