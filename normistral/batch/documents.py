"""Documents of a batch job (lines of a JSONL file, or texts in a folder) and their prompts.

Documents are read where they are needed; a worker receives their positions only.
"""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from normistral.errors import UsageError
from normistral.files import explain, open_file
from normistral.text_input import decode_text

TEXT_SUFFIXES = (".txt", ".md")
_BLOCK_BYTES = 2**20

Document = dict[str, Any]
_FIELD = re.compile(r"\{(\w+)\}")

Messages = list[dict[str, str]]


class Row(NamedTuple):
    """One document.

    Attributes:
        number: from 1: of its line, or its place in the order of the names; the same as long as the input is.
        place: bytes before its line; or the file's path from the folder.
        checksum: CRC-32 of its bytes when the job began; None is not compared.
    """

    number: int
    place: int | str
    checksum: int | None = None


class Index(NamedTuple):
    """Positions of all documents, and the SHA-256 of their content."""

    rows: list[Row]
    sha256: str


def index_documents(source: Path) -> Index:
    """Index the documents; blank lines are skipped.

    Raises:
        UsageError: there is nothing at `source`, it cannot be read, or a file's name is not UTF-8.
    """
    digest = hashlib.sha256()
    try:
        rows = list(_files(source, digest) if source.is_dir() else _lines(source, digest))
    except OSError as exc:
        raise UsageError(
            f"cannot read {exc.filename or source}: {explain(exc)[0]}", "give a JSONL file or a folder"
        ) from exc
    if not rows:
        wanted = f"texts ({', '.join(TEXT_SUFFIXES)})" if source.is_dir() else "lines"
        raise UsageError(f"there are no {wanted} in {source}", "give a JSONL file or a folder of texts")
    return Index(rows, digest.hexdigest())


def read_document(source: Path, row: Row) -> Document:
    """Read one document; a text of a folder becomes {"id": its path, "text": ...}.

    Raises:
        UsageError: it is no JSON object, no UTF-8, gone, or changed since it was indexed.
    """
    try:
        if isinstance(row.place, str):
            raw = (source / row.place).read_bytes()
        else:
            with source.open("rb") as stream:
                stream.seek(row.place)
                raw = stream.readline()
    except OSError as exc:
        raise UsageError(f"cannot read the document: {exc.strerror}") from exc
    if row.checksum not in (None, zlib.crc32(raw)):
        raise UsageError("the document was changed while the job ran", "run the job again, with --force")
    if isinstance(row.place, int):
        return _parse(decode_text(raw, "the line"))
    text = decode_text(raw, "the text").replace("\r\n", "\n").replace("\r", "\n")
    return {"id": row.place, "text": text}


def _parse(line: str) -> Document:
    try:
        document = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise UsageError(f"the line is no JSON: {exc}", "write one JSON object a line") from exc
    if not isinstance(document, dict):
        raise UsageError("the line is no JSON object", 'write it like {"id": 1, "text": "..."}')
    return document


def _lines(source: Path, digest: hashlib._Hash) -> Iterator[Row]:
    place = 0
    with os.fdopen(open_file(source), "rb", buffering=_BLOCK_BYTES) as stream:
        for number, line in enumerate(stream, 1):
            digest.update(line)
            if line.strip():
                yield Row(number, place, zlib.crc32(line))
            place += len(line)


def _files(source: Path, digest: hashlib._Hash) -> Iterator[Row]:
    names = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()
    )
    for number, name in enumerate(names, 1):
        content = (source / name).read_bytes()
        try:
            digest.update(f"{len(name.encode())} {len(content)} {name}".encode() + content)
        except UnicodeEncodeError as exc:
            raise UsageError(f"a file in {source} has a name that is not UTF-8: {name!r}", "rename it") from exc
        yield Row(number, name, zlib.crc32(content))


def check_instruction(instruction: str) -> None:
    """Refuse an instruction without a field.

    Raises:
        UsageError: it names no field.
    """
    if not _FIELD.search(instruction):
        raise UsageError(
            "the instruction has no field of the documents in it", "write it like: Summarise this text: {text}"
        )


def fill(instruction: str, document: Mapping[str, Any]) -> str:
    """Fill in every {field} of the instruction; other braces are kept.

    Raises:
        UsageError: the document has no such field, or no text or number there.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        found = document.get(name)
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            fields = f"it has: {', '.join(sorted(document))}"
            raise UsageError(
                f"the document has no text {name!r}",
                "what it has there is neither a text nor a number" if name in document else fields,
            )
        return str(found)

    return _FIELD.sub(value, instruction)


def find_prompt(document: Document, instruction: str | None) -> str | Messages:
    """Prompt of a document: a text, or a conversation that ends with the user's turn.

    Raises:
        UsageError: the document has neither "prompt" nor "messages", both, or something else in them.
    """
    if instruction is not None:
        return fill(instruction, document)
    given = [name for name in ("prompt", "messages") if name in document]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise UsageError(f'the document has {found} of "prompt" and "messages"', "give one, or an --instruction")
    prompt = document[given[0]]
    if given[0] == "prompt":
        if not isinstance(prompt, str):
            raise UsageError('"prompt" is no text')
        return prompt
    if not (isinstance(prompt, list) and all(map(_is_message, prompt)) and prompt and prompt[-1]["role"] == "user"):
        raise UsageError('"messages" is no conversation that ends with a turn of the user')
    return prompt


def with_system(prompt: str | Messages, system: str | None) -> Messages:
    """The whole conversation.

    Raises:
        UsageError: it has a system message already.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise UsageError("the document has a system message of its own", "leave --system out, or take it out")
    return [{"role": "system", "content": system}, *messages]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in message.values())
    )
