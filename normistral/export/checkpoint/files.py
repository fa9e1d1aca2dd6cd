"""Files of a checkpoint: JSON, and recognition of files and folders that are something else than their names say.

A clone without Git LFS holds pointers, a link to a web page saves the page, a broken download leaves zeros or nothing.
A folder may hold an adapter, a GGUF model, half a download. Each is refused by its reader anyway; here the error gets
its cause, and a hint how to get the right one. Nothing beyond a file's first bytes is read, and a file of the right
kind is never named.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.fields import AS_PUBLISHED, shorten

_HEAD_BYTES = 1024
_MAX_JSON_BYTES = 256 * 2**20
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
    """A pointer, web page, error message, compressed or empty file in the place of a file of any format."""
    if head.startswith(_LFS):
        size = re.search(rb"\nsize (\d{1,15})\b", head)
        return ForeignFile(
            "a pointer of Git LFS, not the file itself" + ("" if size is None else f" ({int(size[1])} bytes)"),
            "run in the checkpoint's folder: git lfs install && git lfs pull",
        )
    if not head:
        return ForeignFile("empty: truncated, or never downloaded", _FETCH)
    if _PAGE.match(head):
        return ForeignFile(
            "a web page that was saved under this name", f"{_FETCH}; on the hub its address has /resolve/, not /blob/"
        )
    # A JSON file with more fields than an error message would have is what its name says.
    if _ANSWER.match(head) and (path.suffix.lower() != ".json" or head.count(b":") <= 3):
        answer = ascii(head[:60].decode("utf-8", "replace").strip())
        return ForeignFile(f"an error message that was saved under this name: {answer}", _FETCH)
    if not head.strip(b"\x00"):
        return ForeignFile("filled with zeros: a download that made room for it did not finish", _FETCH)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            return ForeignFile(f"compressed with {name}", "unpack it, and give it its name again")
    return None


def _wrong_encoding(head: bytes) -> ForeignFile | None:
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MiB", AS_PUBLISHED)
        raw = path.read_bytes()
        document = json.loads(raw)
        if b"\\ud" in raw.lower():  # half a surrogate pair is no character: nothing could write it again
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise unreadable(path, f"{path.name} {_why_no_json(exc)}", "download or copy the file again") from exc
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} holds a {type(document).__name__}, not an object", AS_PUBLISHED)
    return document


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file in UTF-8; a link in its place is replaced, not followed."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _why_no_json(exc: ValueError | RecursionError) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"is not UTF-8 at byte {exc.start}"
    if isinstance(exc, json.JSONDecodeError) and (
        exc.msg.startswith("Unterminated") or exc.pos >= len(exc.doc.rstrip()) - len("null")
    ):
        return f"is not valid JSON: it is cut off after {len(exc.doc)} characters ({exc})"
    return f"is not valid JSON: {'nested too deeply' if isinstance(exc, RecursionError) else exc}"


_ORIGINAL = "export the original checkpoint, from which it was made"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# transformers adds it, where peft is installed; a merged model that was saved in its adapter's folder has it already.
MODEL_AND_ADAPTER = ForeignFile(
    "a whole model with a LoRA adapter beside it, which may be merged into it or not",
    f"if it is, remove {' or '.join(ADAPTER_WEIGHTS)}; if not, merge it first, with peft, and export what that saves",
)
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload", ".tmp")
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


# Files that show a kind of folder, what it is, and a hint; `{file}` is the first of them.
_KINDS = (
    ("model_index.json", "a Diffusers pipeline, which makes images", "give the folder of a language model"),
    ("*.gguf", "a folder of GGUF files", "give the file itself: {file}"),
    ("openvino_*.xml", "an OpenVINO model that another tool made", _ORIGINAL),
    ("*.onnx", "an ONNX model that another tool made", _ORIGINAL),
    ("onnx/*.onnx", "an ONNX model that another tool made", _ORIGINAL),
    (
        "consolidated*",
        "a checkpoint in the layout of Mistral or Meta ({file})",
        "give the one in transformers' layout, with config.json and model.safetensors",
    ),
    ("ggml*.bin", "a GGML model, which llama.cpp wrote before GGUF", "export the original checkpoint"),
    ("*.npz", "an MLX model ({file})", _ORIGINAL),
    ("tf_model.h5", "a TensorFlow model", "save it as safetensors with transformers: from_tf=True"),
    ("flax_model*.msgpack", "a Flax model", "save it as safetensors with transformers: from_flax=True"),
    ("qmodel.pt", "a checkpoint quantised by HQQ", _ORIGINAL),
    ("*.distcp", "a training checkpoint in pieces (FSDP)", "join it first: accelerate merge-weights"),
    ("zero_to_fp32.py", "a training checkpoint in pieces (DeepSpeed)", "join it first: python zero_to_fp32.py"),
    ("model.*.safetensors", "a checkpoint in a variant ({file})", "rename it to model.safetensors"),
)


def recognise_folder(folder: Path) -> ForeignFile | None:
    """Kind of a folder without config.json or weights, as the end of "FOLDER is ..."; None if unknown."""
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if (folder / "snapshots").is_dir() and (folder / "blobs").is_dir():
        name = folder.name.removeprefix("models--").replace("--", "/")
        return ForeignFile("a folder of the hub's cache", f"give the hub id {name}, or one of the folders in snapshots")
    unfinished = [path.name for path in _files(folder) if path.suffix in _UNFINISHED]
    if unfinished:
        return ForeignFile(
            f"a download that did not finish: {ascii(min(unfinished))[1:-1][:80]}",
            "run the download again until it ends",
        )
    for pattern, what, hint in _KINDS:
        found = sorted(folder.glob(pattern))
        if found:
            place = found[0] if pattern == "*.gguf" else found[0].name
            return ForeignFile(what.format(file=place), hint.format(file=place))
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        more = "" if len(inner) == 1 else f" (the last of {len(inner)})"
        return ForeignFile("a folder around checkpoints", f"give the checkpoint's own folder{more}: {inner[-1]}")
    return None


def refuse_other_models(folder: Path, config: dict[str, Any], name: str = "") -> None:
    """Refuse a checkpoint whose config.json could be read, and that is another kind of model all the same.

    Args:
        config: as it was read, less what is ignored.
        name: of the model, for the message; by default the folder's.

    Raises:
        CheckpointError: naming what it is.
    """
    found = None
    if isinstance(config.get("text_config"), dict) or isinstance(config.get("vision_config"), dict):
        names = config.get("architectures")
        kind = names[0] if isinstance(names, list) and names else config.get("model_type")
        found = ForeignFile(
            f"a model of text and images ({shorten(kind)}), which is not supported", "give a model of text alone"
        )
    elif (folder / "modules.json").is_file() or (folder / "config_sentence_transformers.json").is_file():
        found = ForeignFile("a sentence-transformers model: it compares texts, and writes none", "give another model")
    elif method := _quantisation(folder, config):
        base = config.get("_name_or_path")
        hint = "export the original checkpoint with its floating-point weights"
        hint += f" ({shorten(base)[1:-1]})" if isinstance(base, str) and "/" in base else ""
        if config.get("quantization_config"):
            hint += "; or, if these are floats again, with --ignore-field quantization_config"
        found = ForeignFile(f"quantised already, by {method}", hint)
    elif all(
        any((folder / name).exists() for name in kind) for kind in (_WHOLE, ("adapter_config.json",), ADAPTER_WEIGHTS)
    ):
        found = MODEL_AND_ADAPTER
    if found is not None:
        raise CheckpointError(f"{name or folder.name} is {found.what}", found.hint)


def _adapter(folder: Path) -> ForeignFile:
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    of = f" of {ascii(base)[1:-1][:80]}" if isinstance(base, str) and base else ""
    return ForeignFile(
        f"a LoRA adapter{of}, not a whole model",
        "merge it first, with peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED); put the tokenizer's files there too, and export MERGED",
    )


def _quantisation(folder: Path, config: dict[str, Any]) -> str:
    """Method that quantised a checkpoint, from config.json or the files of older tools; empty if it was none."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        if method is None and isinstance(settings, dict):
            method = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else "an unnamed method"
        return shorten(method).strip("'")
    if isinstance(config.get("quantization"), dict):
        return "MLX"
    for file, method in (
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "ModelOpt"),
    ):
        if (folder / file).is_file():
            return method
    return ""


def _files(folder: Path) -> list[Path]:
    hidden = folder / ".cache" / "huggingface" / "download"  # where `hf download --local-dir` keeps what is not whole
    return [*folder.iterdir(), *(hidden.iterdir() if hidden.is_dir() else ())]
