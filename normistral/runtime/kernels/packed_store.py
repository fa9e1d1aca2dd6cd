"""Weights in the kernel's layout in a file beside the store: written at the first load, mapped by those that follow.

    NORMISTRAL_HOME/packed/KEY.int4     the weights, then a footer of 48 bytes: magic, size, checksum, key

A key names the artifact's manifest and weights file, and the layout. Processes that map one file share its memory.
A file counts only if nobody else can have written it, and if every byte has the checksum of the footer; anything else
is written anew. The files that were not used for longest go when all together exceed `MOST_BYTES`.

Decoding is a third slower from pages of 4 KiB, so a file serves where the page cache holds it in huge pages (Linux 6.16
on ext4, 5.18 on XFS). Elsewhere none is written. One that has come to lie in small pages, as when memory was short, is
copied, and dropped from the page cache so that the next load reads it into huge pages.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import RawIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normistral.artifact import store
from normistral.artifact.manifest import MANIFEST_NAME
from normistral.errors import NormistralError
from normistral.files import explain, locked, open_file
from normistral.runtime.kernels.library import require_ours

logger = logging.getLogger(__name__)

WORTH_BYTES = 2**28  # smaller ones are packed in a moment
MOST_BYTES = 2**34  # of all files
HUGE_PAGE = 2**21
LAYOUT = 2  # of a product's codes, scales and zero points
_MAGIC = b"nmpack01"
_FOOTER = struct.Struct("<8sQQ24s")
_PROBE_BYTES = 2 * HUGE_PAGE
_HUGE_SHARE = 0.95
_TEMPORARY = ".writing-"
_AGAIN = "then load the model again"

Bytes = NDArray[np.uint8]
Checksum = Callable[[Bytes], int]


def find_key(model_file: Path, lanes: int, size: int) -> bytes | None:
    """The key of a model's weights; None where no manifest says which model this is."""
    try:
        manifest = model_file.with_name(MANIFEST_NAME).read_bytes()
        status = model_file.with_suffix(".bin").stat()
    except OSError:
        return None
    kind = f"{LAYOUT} {lanes} {size} {status.st_size} {status.st_mtime_ns} ".encode()
    return hashlib.sha256(kind + manifest).digest()[:24]


def load_packed(key: bytes, size: int, pack: Callable[[], Iterator[Bytes]], checksum: Checksum) -> Bytes | None:
    """The weights of a key, mapped; written first where they are not there.

    Args:
        size: bytes of the weights.
        pack: makes the weights, piece by piece; each piece may be overwritten when the next is asked for.
        checksum: of weights.

    Returns:
        None where a file is of no use or cannot be had; a warning says so where that should not be.
    """
    folder = store.packed_dir()
    path = folder / f"{key.hex()}.int4"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_ours([(folder, folder.lstat())], _AGAIN)
        mapped = _open(path, key, size, checksum)
        if mapped is None and _has_room(folder, size) and _has_huge_pages(folder):
            with locked(folder / "lock"):
                _write(path, key, size, pack(), checksum)
            mapped = _open(path, key, size, checksum)
    except BlockingIOError:
        return None  # another process is writing: it will be there next time
    except OSError as exc:
        reason, hint = explain(exc)
        logger.warning(
            "the kernel's weights are not kept in %s, and packed at each load: %s (%s; or set int4_weights=memory)",
            folder,
            reason,
            hint,
        )
        return None
    except NormistralError as exc:
        logger.warning("the kernel's weights are not kept: %s (%s)", exc, exc.hint)
        return None
    if mapped is not None and not _is_huge(mapped):
        logger.info("%s lies in small pages: copied", path)
        copy = allocate(size)
        _copy(mapped, copy)
        del mapped
        _forget_pages(path)
        return copy
    return mapped


def allocate(count: int) -> Bytes:
    """Memory in huge pages, where the system has them to give: single tokens then read a third to a half faster."""
    memory = mmap.mmap(-1, count + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    _advise(memory, "MADV_HUGEPAGE")
    array = np.frombuffer(memory, np.uint8)
    return array[-array.ctypes.data % HUGE_PAGE :][:count]


def drop_file_pages(arrays: Iterable[Bytes]) -> None:
    """Let the system take back what is in memory of arrays in files that are mapped to be read; they stay readable."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) r--. \S+ \S+ [1-9]", line) for line in lines]  # those with an inode
    mapped = [(int(one[1], 16), int(one[2], 16)) for one in found if one]
    advise = ctypes.CDLL(None).madvise
    for array in arrays:
        start = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        count = (array.ctypes.data + array.size) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if count > 0 and any(begin <= start and start + count <= end for begin, end in mapped):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(count), mmap.MADV_DONTNEED)


def _open(path: Path, key: bytes, size: int, checksum: Checksum) -> Bytes | None:
    """The weights of a file, mapped and checked; None where there is none, or a damaged one, which is removed."""
    try:
        descriptor = open_file(path, follow=False)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        require_ours([(path, status)], _AGAIN)
        whole = status.st_size == size + _FOOTER.size
        found = os.pread(descriptor, _FOOTER.size, size)
        if whole:
            memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            _advise(memory, "MADV_HUGEPAGE")
            mapped = np.frombuffer(memory, np.uint8)
            whole = found == _FOOTER.pack(_MAGIC, size, checksum(mapped), key)
        if whole:
            with suppress(OSError):  # of a store that is not written to
                os.utime(descriptor)
            return mapped
    finally:
        os.close(descriptor)
    logger.warning("%s is damaged: it is made again", path)
    path.unlink(missing_ok=True)
    return None


def _write(path: Path, key: bytes, size: int, pieces: Iterator[Bytes], checksum: Checksum) -> None:
    for left in path.parent.glob(f"{_TEMPORARY}*"):  # of a process that was killed: the lock is ours
        left.unlink(missing_ok=True)
    _make_room(path.parent, MOST_BYTES - size)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)  # permissions 0600
    try:
        with os.fdopen(descriptor, "wb+", buffering=0) as file:
            for piece in pieces:
                _write_huge(file, piece)
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
                total = checksum(np.frombuffer(memory, np.uint8))
            file.write(_FOOTER.pack(_MAGIC, size, total, key))
        Path(temporary).replace(path)  # not forced to the disk: what a power failure leaves has another checksum
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_huge(file: RawIOBase, piece: Bytes) -> None:
    """Write a piece; a call for each huge page, because larger calls make larger pages, which map as small."""
    for start in range(0, piece.size, HUGE_PAGE):
        rest = piece[start : start + HUGE_PAGE].data
        while rest:
            rest = rest[file.write(rest) :]


def _copy(values: Bytes, to: Bytes) -> None:
    """By two threads, because the system gives memory as slowly as it is filled."""
    half = values.size // 2
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(np.copyto, (to[:half], to[half:]), (values[:half], values[half:])))


def _forget_pages(path: Path) -> None:
    """Have a file read anew the next time, into huge pages then; other processes keep what they have mapped."""
    with suppress(OSError):
        descriptor = open_file(path, follow=False)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _make_room(folder: Path, most: int) -> None:
    """Remove the files that were not used for longest until all together have `most` bytes."""
    files = sorted(((path.stat(), path) for path in folder.glob("*.int4")), key=lambda one: -one[0].st_mtime_ns)
    total = 0
    for status, path in files:
        total += status.st_size
        if total > most:
            path.unlink(missing_ok=True)


def _has_room(folder: Path, size: int) -> bool:
    return size <= MOST_BYTES and shutil.disk_usage(folder).free >= 2 * size


def _has_huge_pages(folder: Path) -> bool:
    """Whether the page cache holds files of this folder in huge pages."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        _write_huge(file, np.zeros(_PROBE_BYTES, np.uint8))
        memory = mmap.mmap(file.fileno(), _PROBE_BYTES, access=mmap.ACCESS_READ)
        _advise(memory, "MADV_HUGEPAGE")
        return _is_huge(np.frombuffer(memory, np.uint8))


def _is_huge(mapped: Bytes) -> bool:
    """Whether nearly all of a mapped file is in memory in huge pages, as /proc/self/smaps tells."""
    int(mapped[:: mmap.PAGESIZE].max())  # all of it in memory
    start, huge = f"{mapped.ctypes.data:x}-", 0
    try:
        with Path("/proc/self/smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
            inside = False
            for line in lines:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    inside = line.startswith(start)
                elif inside and line.startswith("FilePmdMapped:"):
                    huge = int(line.split()[1]) * 1024
    except OSError:
        return False
    return huge >= _HUGE_SHARE * (mapped.size // HUGE_PAGE * HUGE_PAGE)


def _advise(memory: mmap.mmap, name: str) -> None:
    if hasattr(mmap, name):
        with suppress(OSError):  # a kernel without them
            memory.madvise(getattr(mmap, name))
