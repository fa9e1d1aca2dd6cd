"""Journal of a batch job: finished rows on disk, so that a kill at any moment loses no answer.

While OUTPUT is being made there are beside it

    .OUTPUT.lock       held by the running job
    OUTPUT.parts/
        job.json       what is asked; who goes on has to ask for the same
        run            which start of the job this is; workers that an earlier one left behind see that they are over
        RUN-PART-….jsonl   a line for every answer, and before it one that says it was begun

A folder of that name which no job made is refused, and of ours only these files are deleted.

Every worker writes files of its own, line by line, each on disk before the next begins. A kill can tear the last
line of a file, and nothing else; a torn line counts as not written. PART is a piece of the rows; whoever takes up the
part of a dead worker finds in that worker's files what it need not do again.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec

from normistral.errors import NormistralError, UsageError
from normistral.files import atomic_write, explain, is_own, locked, open_file, read_file

JOB_NAME = "job.json"
_RUN_NAME = "run"
_PART = re.compile(r"[0-9a-f]{8}-[0-9]{6,}-[a-z0-9_]+\.jsonl")
_MAX_JOB_BYTES = 64 * 2**20  # it holds the instruction and the structure


class Line(msgspec.Struct):
    """What the journal itself reads of a line: an answer has `row`, a mark only `begun`."""

    row: int | None = None
    begun: int | None = None
    error: dict[str, Any] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0


class Place(NamedTuple):
    """Position of an answer in a journal file."""

    file: Path
    start: int
    length: int


def parts_folder(output: Path) -> Path:
    """Folder of the journal for OUTPUT."""
    return output.with_name(output.name + ".parts")


@contextmanager
def open_journal(output: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The folder of the job that makes OUTPUT, new or as an earlier run left it; nobody else has it.

    Raises:
        UsageError: another process works on it, it holds another job or no job, is not this user's, or cannot be made.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(output.with_name(f".{output.name}.lock")))
            folder = parts_folder(output)
            _make_folder(folder)
            _claim(folder, job)
        except BlockingIOError as exc:
            raise UsageError(
                f"another job is writing {output}", "wait until it is done, or take another OUTPUT"
            ) from exc
        except OSError as exc:
            reason, hint = explain(exc)
            raise UsageError(f"cannot write beside {output}: {reason}", hint) from exc
        yield folder


def begin_run(folder: Path) -> str:
    """Start anew on this job: gives the run its name. Whoever works for an earlier one writes no more answers."""
    run = secrets.token_hex(4)
    with _writing(folder), atomic_write(folder / _RUN_NAME) as stream:
        stream.write(run.encode())
    return run


def find_answers(folder: Path) -> tuple[dict[int, Place], dict[int, Line]]:
    """All whole answers so far, by row: where they are, and what they say about themselves."""
    places: dict[int, Place] = {}
    lines: dict[int, Line] = {}
    for file in _part_files(folder):
        for start, length, line in _whole_lines(file):
            if line.row is not None and line.row not in places:
                places[line.row] = Place(file, start, length)
                lines[line.row] = line
    return places, lines


def join_answers(places: Iterable[Place], output: Path) -> None:
    """Write the answers to OUTPUT in this order, whole or not at all; permissions 0600."""
    opened: dict[Path, Any] = {}
    with ExitStack() as stack, atomic_write(output) as stream:
        for place in places:
            if place.file not in opened:
                if len(opened) >= _MOST_OPEN:
                    opened.pop(next(iter(opened))).close()
                opened[place.file] = stack.enter_context(place.file.open("rb"))
            opened[place.file].seek(place.start)
            stream.write(opened[place.file].read(place.length))


def remove_journal(folder: Path) -> None:
    """Drop what is now in OUTPUT; the folder stays if somebody put something else into it."""
    for file in [*_part_files(folder), folder / _RUN_NAME, folder / JOB_NAME]:
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


class PartJournal:
    """A worker's record of one part; to be closed.

    Attributes:
        answered: rows of this part that this or a dead worker has done.
        begun: how often workers of this run began each row.
    """

    def __init__(self, folder: Path, run: str, part: int) -> None:
        self._folder, self._run = folder, run
        prefix = f"{run}-{part:06d}-"
        self.answered: set[int] = set()
        self.begun: Counter[int] = Counter()
        for file in folder.glob(prefix + "*.jsonl"):
            for _, _, line in _whole_lines(file):
                if line.row is not None:
                    self.answered.add(line.row)
                elif line.begun is not None:
                    self.begun[line.begun] += 1
        with _writing(folder):
            descriptor, _ = tempfile.mkstemp(prefix=prefix, suffix=".jsonl", dir=folder)  # permissions 0600
        self._stream = os.fdopen(descriptor, "wb")

    def begin(self, number: int) -> None:
        """Note that this row is being worked on; raises NormistralError as `finish`."""
        with _writing(self._folder):
            self._require_current()
            self._write({"begun": number})

    def finish(self, answer: dict[str, Any]) -> None:
        """Keep an answer; it has `row`. When this returns it is on disk.

        Raises:
            NormistralError: the job was started anew without this worker, or the disk is full.
        """
        with _writing(self._folder):
            self._require_current()
            self._write(answer)
            os.fsync(self._stream.fileno())
        self.answered.add(answer["row"])

    def _require_current(self) -> None:
        if (self._folder / _RUN_NAME).read_bytes() != self._run.encode():
            raise NormistralError("the job was started anew", "this worker is one of its earlier start")

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(msgspec.json.encode(line) + b"\n")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _writing(self._folder):
            self._stream.close()  # it writes once more what did not fit on the disk before


_MOST_OPEN = 256  # files at once; many systems allow 1,024


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Errors of the system as ours, with the folder's name; what is on disk by then is kept."""
    try:
        yield
    except OSError as exc:
        reason, hint = explain(exc)
        raise NormistralError(f"cannot write in {folder}: {reason}", f"{hint}; then run the same again") from exc


def _make_folder(folder: Path) -> None:
    """Make the folder, or see that it is one that a job of this user made."""
    try:
        folder.mkdir(mode=0o700)
        return
    except FileExistsError:
        status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and is_own(status) and not (os.name == "posix" and status.st_mode & 0o022)
    if not ours or not (folder / JOB_NAME).is_file():
        raise UsageError(f"{folder} is there already, and no job of yours made it", "take another OUTPUT, or move it")


def _part_files(folder: Path) -> list[Path]:
    """Files of all workers, sorted by name."""
    return sorted(file for file in folder.glob("*.jsonl") if _PART.fullmatch(file.name) and not file.is_symlink())


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Make the folder this job's, or see that it is."""
    described = msgspec.json.encode(job, order="sorted")
    file = folder / JOB_NAME
    try:
        earlier = msgspec.json.decode(read_file(file, _MAX_JOB_BYTES), type=dict)
    except FileNotFoundError:
        with atomic_write(file) as stream:
            stream.write(described)
        return
    except msgspec.DecodeError:
        earlier = {}
    wanted = msgspec.json.decode(described)
    if earlier != wanted:
        different = sorted(name for name in wanted if wanted[name] != earlier.get(name))
        raise UsageError(
            f"{folder} holds what another job has done: it differs in {', '.join(different) or 'more'}",
            "ask for the same as then to go on with it, take another OUTPUT, or delete that folder",
        )


def _whole_lines(file: Path) -> Iterator[tuple[int, int, Line]]:
    """(start, length, content) of every line that is whole."""
    start = 0
    with os.fdopen(open_file(file, follow=False), "rb") as stream:
        for raw in stream:
            if raw.endswith(b"\n"):
                with suppress(msgspec.DecodeError):  # after a power cut a file may have its length, and hold zeros
                    yield start, len(raw), _LINES.decode(raw)
            start += len(raw)


_LINES = msgspec.json.Decoder(Line)
