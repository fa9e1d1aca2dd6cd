"""Predictions of a reference on disk: one file for a text, a model and its windows, written window by window.

A row for each scored token: the log-probability of the token that came and of the likeliest one's id, then all
log-probabilities in 16 bits. That takes 2 · vocabulary + 16 bytes: **65.6 MB for 1,000 tokens** of a vocabulary of
32,768, 102.4 MB of 51,200.

The 16 bits run evenly from the likeliest token down to the least likely, at most 32 nats below; what is less likely
still counts as 32 below. On 1,500 tokens of English and of Bokmål (demo model, vocabulary 49,152, int8 weights with a
mean KL of 0.0016 and 0.0036 nats) this moves the mean KL by 1.5e-8 nats. llama.cpp's file has the same size but ends
16 nats below, which moves it by 3e-5 (1.7 % and 0.9 %). The 64 likeliest tokens as float16 with the rest as one sum
take 0.3 MB for 1,000 tokens and lose 19 % and 23 % of it, the 1,024 likeliest 4.1 MB and 3.5 % and 4.6 %: a small model
leaves 11 % and 21 % of its probability to tokens behind the 64th.

    header   one line of JSON: what the file belongs to, and a SHA-256 over that
    window   its rows, and a SHA-256 over the header's, the window's number and the rows

The file only grows. A run that was cut off leaves at most one unfinished window at its end, which the next one drops;
any other change is found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normistral.errors import ArtifactError, ResourceError, UsageError
from normistral.evaluation.metrics import Floats
from normistral.evaluation.windows import Window, WindowSettings
from normistral.files import checked, explain, open_file
from normistral.hardware import free_disk_bytes
from normistral.runtime.engines.base import Logits
from normistral.runtime.sampling import log_softmax

_FORMAT = "normistral reference 1"
_DEEPEST_NATS = 32.0
_LARGEST_CODE = 2**16 - 1
_DIGEST_BYTES = 32
_DELETE = "delete it to have it computed again, or give --reference-cache another file"
_WHAT = {
    "format": "another version of this program",
    "text_sha256": "another text",
    "tokenizer_sha256": "another tokenizer",
    "source": "another reference model",
    "windows": "other windows",
    "vocabulary": "another vocabulary",
}


@dataclass(frozen=True, slots=True)
class ReferenceKey:
    """Key of a file; one whose key differs in anything is refused.

    Attributes:
        tokenizer_sha256: of the reference's tokenizer.json.
        source: what the reference is and the hash of its files.
        vocabulary: width of the logits.
    """

    text_sha256: str
    tokenizer_sha256: str
    source: str
    windows: WindowSettings
    vocabulary: int

    def header(self) -> bytes:
        """The first line of the file."""
        content = {"format": _FORMAT, **asdict(self)}
        return _line(content | {"checksum": hashlib.sha256(_line(content)).hexdigest()})

    def file_name(self) -> str:
        """A name that no other key has."""
        return f"{hashlib.sha256(self.header()).hexdigest()[:32]}.reference"


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """Predictions of one window's n scored tokens.

    Attributes:
        log_probabilities: float64 [n, vocabulary], in nats.
        nll: float64 [n], of the tokens that came; exact to float32.
        likeliest: token ids [n].
    """

    log_probabilities: Floats
    nll: Floats
    likeliest: NDArray[np.int64]


class ReferenceFile:
    """The file of a key, opened to be read and to grow.

    Args:
        path: made with its folders if it is not there.
        windows: all windows of the text that will be asked for; later runs may ask for more.

    Raises:
        UsageError: no file can be written there.
        ArtifactError: the file belongs to something else, or was changed.
        ResourceError: there is no room on the disk for the rows that are missing.
    """

    def __init__(self, path: Path, key: ReferenceKey, windows: Sequence[Window]) -> None:
        self.path = path
        self._windows = windows
        self._rows = _row_type(key.vocabulary)
        self._header = key.header()
        try:
            checked(path).parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666, follow=False)
        except OSError as exc:
            reason, hint = explain(exc)
            raise UsageError(f"the reference's predictions cannot be kept in {path}: {reason}", hint) from exc
        self._file = os.fdopen(descriptor, "a+b")
        try:
            self.finished = self._find_finished(key)
            self._require_room()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ReferenceFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    @property
    def missing(self) -> Sequence[Window]:
        """The windows that are not written yet."""
        return self._windows[self.finished :]

    def append(self, logits: Logits) -> None:
        """Write the next window's predictions.

        Args:
            logits: float32 [scored, vocabulary].

        Raises:
            ArtifactError: another process writes to this file.
        """
        if os.fstat(self._file.fileno()).st_size != self._start(self.finished):
            raise ArtifactError(f"{self.path} is being written by another process", "wait until that one is done")
        window = self._windows[self.finished]
        payload = encode_rows(logits, np.array(window.targets), self._rows).tobytes()
        self._file.write(payload + self._digest(self.finished, payload))
        self._file.flush()
        self.finished += 1

    def read(self, index: int) -> ReferenceRows:
        """Predictions for the window of this number."""
        payload = self._payload(index)
        assert payload is not None
        return decode_rows(np.frombuffer(payload, self._rows))

    def _find_finished(self, key: ReferenceKey) -> int:
        size = os.fstat(self._file.fileno()).st_size
        self._file.seek(0)
        found = self._file.read(len(self._header))
        if len(found) == size and self._header.startswith(found):  # new, or cut off while it was made
            self._truncate(0)
            self._file.write(self._header)
            self._file.flush()
            return 0
        if found != self._header:
            self._file.seek(0)
            raise ArtifactError(f"{self.path} {_describe_difference(self._file.readline(2**16), key)}", _DELETE)
        for index in range(len(self._windows)):
            if self._payload(index) is None:
                self._truncate(self._start(index))
                return index
        return len(self._windows)

    def _payload(self, index: int) -> bytes | None:
        """Checked rows of a window; None if the file ends before they do."""
        size = self._windows[index].scored * self._rows.itemsize
        self._file.seek(self._start(index))
        record = self._file.read(size + _DIGEST_BYTES)
        if len(record) < size + _DIGEST_BYTES:
            return None
        if self._digest(index, record[:size]) != record[size:]:
            raise ArtifactError(f"{self.path} was changed: the rows of window {index} do not fit their hash", _DELETE)
        return record[:size]

    def _require_room(self) -> None:
        needed = self._start(len(self._windows)) - self._start(self.finished)
        free = free_disk_bytes(self.path)
        if needed > free:
            raise ResourceError(
                f"the reference's predictions need {needed / 1e9:.2f} GB at {self.path.parent}; "
                f"{free / 1e9:.2f} GB are free",
                "score fewer tokens (--max-tokens), or give --reference-cache a file on another disk",
            )

    def _start(self, index: int) -> int:
        scored = sum(window.scored for window in self._windows[:index])
        return len(self._header) + scored * self._rows.itemsize + index * _DIGEST_BYTES

    def _digest(self, index: int, payload: bytes) -> bytes:
        return hashlib.sha256(self._header + index.to_bytes(8, "little") + payload).digest()

    def _truncate(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)


def encode_rows(logits: Logits, targets: NDArray[np.int64], row_type: np.dtype[Any]) -> NDArray[Any]:
    """Rows [n] for logits [n, vocabulary] and the tokens [n] that came."""
    rows = np.empty(len(targets), row_type)
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        log_p = log_softmax(row)
        high = np.float32(log_p.max())
        low = np.float32(max(log_p.min(), float(high) - _DEEPEST_NATS))
        step = np.float32((high - low) / _LARGEST_CODE) or np.float32(1.0)  # all tokens alike: every code is 0
        codes = np.clip(np.rint((log_p - low) / step), 0, _LARGEST_CODE)
        rows[i] = (log_p[target], int(row.argmax()), low, step, codes)
    return rows


def decode_rows(rows: NDArray[Any]) -> ReferenceRows:
    """The input of `encode_rows`, within half a quantization step; the probabilities of a row sum to 1."""
    stored = rows["low"][:, None].astype(np.float64) + rows["step"][:, None].astype(np.float64) * rows["codes"]
    return ReferenceRows(
        log_probabilities=log_softmax(stored),
        nll=-rows["target"].astype(np.float64),
        likeliest=rows["likeliest"].astype(np.int64),
    )


def _row_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(
        [("target", "<f4"), ("likeliest", "<u4"), ("low", "<f4"), ("step", "<f4"), ("codes", "<u2", (vocabulary,))]
    )


def _describe_difference(line: bytes, key: ReferenceKey) -> str:
    try:
        found = json.loads(line)
        checksum = found.pop("checksum")
        whole = checksum == hashlib.sha256(_line(found)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError):
        return "is no file of reference predictions"
    if not whole:
        return "was changed: its header does not fit its hash"
    wanted = json.loads(key.header())
    differing = [what for name, what in _WHAT.items() if found.get(name) != wanted[name]]
    return f"belongs to {', '.join(differing) or _WHAT['format']}"


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode() + b"\n"
