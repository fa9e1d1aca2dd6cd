"""Recognise a file that is something else than its name says, from its first bytes.

A clone without Git LFS holds pointers, a link to a web page saves the page, a broken download leaves zeros or nothing.
Each is refused by its reader anyway; here the error gets its cause, and a hint how to get the right file.
Nothing beyond the first bytes is read, and a file of the right kind is never named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from normistral.errors import CheckpointError

_HEAD_BYTES = 1024
_TEXT_SUFFIXES = (".json", ".jinja", ".txt")
_LFS = b"version https://git-lfs.github.com/spec/"
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|\?xml)", re.IGNORECASE)
# Answers of the hub that tools save as if they were the file.
_ANSWER = re.compile(
    rb"(?:Entry not found|Invalid username or password|Repository not found|Access to model|Not Found\s*$"
    rb'|\{\s*"(?:error|message)"\s*:)',
)
_UTF_16_OR_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}
_SAFETENSORS = re.compile(rb'.{8}\{\s*"', re.DOTALL)
_OLD_LLAMA_CPP = (b"lmgg", b"fmgg", b"tjgg")  # GGML, GGMF and GGJT: the magic is a little-endian number
_FETCH = "download the file again"


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """Kind of a file, as the end of "NAME is ...", and a hint how to get the right one."""

    what: str
    hint: str


def recognise(path: Path, *, text: bool | None = None) -> ForeignFile | None:
    """The kind of a file that is not what its name says; None for others, and for one that cannot be read.

    Args:
        text: whether it should be a text; None goes by the name's ending.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    text = path.suffix.lower() in _TEXT_SUFFIXES if text is None else text
    return _not_the_file(path, head) or (_wrong_encoding(head) if text else _other_format(path, head))


def unreadable(path: Path, reason: str, hint: str) -> CheckpointError:
    """The error for a file that its reader refuses: what the file really is, else the reader's own reason.

    Args:
        reason: the whole message, naming the file.
    """
    found = recognise(path)
    return (
        CheckpointError(reason, hint) if found is None else CheckpointError(f"{path.name} is {found.what}", found.hint)
    )


def _not_the_file(path: Path, head: bytes) -> ForeignFile | None:
    """Something that stands in the place of the file, whatever the file's format."""
    if head.startswith(_LFS):
        return ForeignFile(
            f"a pointer of Git LFS, not the file itself{_lfs_size(head)}",
            "run in the checkpoint's folder: git lfs install && git lfs pull",
        )
    if not head:
        return ForeignFile("empty: truncated, or never downloaded", _FETCH)
    if _PAGE.match(head):
        return ForeignFile(
            "a web page that was saved under this name", f"{_FETCH}; on the hub its address has /resolve/, not /blob/"
        )
    if _ANSWER.match(head) and (path.suffix.lower() != ".json" or not _is_json_config(head)):
        answer = ascii(head[:60].decode("utf-8", "replace").strip())
        return ForeignFile(f"an error message that was saved under this name: {answer}", _FETCH)
    if not head.strip(b"\x00"):
        return ForeignFile("filled with zeros: a download that made room for it did not finish", _FETCH)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return ForeignFile(f"compressed with {name}", "unpack it, and give it its name again")
    return None


def _is_json_config(head: bytes) -> bool:
    """Whether what looks like an answer in JSON has more fields than one would have."""
    return head.count(b":") > 3


def _lfs_size(head: bytes) -> str:
    size = re.search(rb"\nsize (\d{1,15})\b", head)
    return "" if size is None else f" ({int(size[1])} bytes)"


def _wrong_encoding(head: bytes) -> ForeignFile | None:
    """A text in an encoding that is not UTF-8."""
    if head.startswith(_UTF_16_OR_32) or head[1:2] == b"\x00":
        return ForeignFile("a text in UTF-16, not in UTF-8", "save it again as UTF-8 (PowerShell's > writes UTF-16)")
    return None


def _other_format(path: Path, head: bytes) -> ForeignFile | None:
    """A model in another format than the name says."""
    suffix = path.suffix.lower()
    if head.startswith(b"GGUF") and suffix != ".gguf":
        return ForeignFile("a GGUF file", "give it the ending .gguf, and its path as MODEL")
    if head.startswith(_OLD_LLAMA_CPP):
        return ForeignFile(
            "a GGML file, which llama.cpp wrote before GGUF and no longer reads", "export the original checkpoint"
        )
    if head.startswith(b"PK\x03\x04") and suffix not in (".bin", ".pt", ".pth"):
        return ForeignFile(
            "a zip file, as torch.save writes them", "rename it to pytorch_model.bin if it holds weights"
        )
    if head.startswith(b"\x89HDF"):
        return ForeignFile("an HDF5 file, as Keras and TensorFlow write them", "use the checkpoint's safetensors files")
    if suffix != ".safetensors" and _SAFETENSORS.match(head):
        return ForeignFile("a safetensors file", "give it the ending .safetensors")
    return None
