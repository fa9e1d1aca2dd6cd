"""Recognise a folder that holds something else than a whole checkpoint of a language model, by its files' names.

Each would be refused anyway for lack of a config.json or of weights; here the error gets its cause and a hint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError
from normistral.export.checkpoint.config import read_json
from normistral.export.checkpoint.fields import shorten
from normistral.export.checkpoint.file_kinds import ForeignFile

_ORIGINAL = "export the original checkpoint, from which it was made"
_UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload", ".tmp")
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class _Kind:
    """Files that show a kind of folder; `{file}` in the hint is the first of them."""

    pattern: str
    what: str
    hint: str


_KINDS = (
    _Kind("model_index.json", "a Diffusers pipeline, which makes images", "give the folder of a language model"),
    _Kind("*.gguf", "a folder of GGUF files", "give the file itself: {file}"),
    _Kind("openvino_*.xml", "an OpenVINO model that another tool made", _ORIGINAL),
    _Kind("*.onnx", "an ONNX model that another tool made", _ORIGINAL),
    _Kind("onnx/*.onnx", "an ONNX model that another tool made", _ORIGINAL),
    _Kind(
        "consolidated*",
        "a checkpoint in the layout of Mistral or Meta ({file})",
        "give the one in transformers' layout, with config.json and model.safetensors",
    ),
    _Kind("ggml*.bin", "a GGML model, which llama.cpp wrote before GGUF", "export the original checkpoint"),
    _Kind("*.npz", "an MLX model ({file})", _ORIGINAL),
    _Kind("tf_model.h5", "a TensorFlow model", "save it as safetensors with transformers: from_tf=True"),
    _Kind("flax_model*.msgpack", "a Flax model", "save it as safetensors with transformers: from_flax=True"),
    _Kind("qmodel.pt", "a checkpoint quantised by HQQ", _ORIGINAL),
    _Kind("*.distcp", "a training checkpoint in pieces (FSDP)", "join it first: accelerate merge-weights"),
    _Kind("zero_to_fp32.py", "a training checkpoint in pieces (DeepSpeed)", "join it first: python zero_to_fp32.py"),
    _Kind("model.*.safetensors", "a checkpoint in a variant ({file})", "rename it to model.safetensors"),
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
    for kind in _KINDS:
        found = sorted(folder.glob(kind.pattern))
        if found:
            place = found[0] if kind.pattern == "*.gguf" else found[0].name
            return ForeignFile(kind.what.format(file=place), kind.hint.format(file=place))
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    if inner:
        more = "" if len(inner) == 1 else f" (the last of {len(inner)})"
        return ForeignFile("a folder around checkpoints", f"give the checkpoint's own folder{more}: {inner[-1]}")
    return None


def refuse_other_models(folder: Path, config: dict[str, Any], name: str = "") -> None:
    """Refuse a checkpoint whose config.json could be read, and that is another kind of model all the same.

    Args:
        config: as it was read.
        name: of the model, for the message; by default the folder's.

    Raises:
        CheckpointError: naming what it is.
    """
    found = _adapter(folder) if (folder / "adapter_config.json").is_file() and not _has_weights(folder) else None
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
        named = f" ({shorten(base)[1:-1]})" if isinstance(base, str) and "/" in base else ""
        found = ForeignFile(
            f"quantised already, by {method}", f"export the original checkpoint with its floating-point weights{named}"
        )
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
    """By what a checkpoint is quantised, from config.json or the files that stood for its field in older versions."""
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


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in _WHOLE)


def _files(folder: Path) -> list[Path]:
    hidden = folder / ".cache" / "huggingface" / "download"  # where `hf download --local-dir` keeps what is not whole
    return [*folder.iterdir(), *(hidden.iterdir() if hidden.is_dir() else ())]
