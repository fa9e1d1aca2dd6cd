"""A .gguf file of a tiny checkpoint, as llama.cpp's converter would write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_models import TEMPLATE

from normistral.export.checkpoint.files import read_json
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.progress import NoProgress

TYPES = gguf.TokenType


def to_interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def byte_level_vocabulary(folder: Path) -> dict[str, Any]:
    vocab = read_json(folder / "tokenizer.json")["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    types = [TYPES.CONTROL if i < 5 else TYPES.NORMAL for i in range(len(tokens))]
    return {"model": "gpt2", "pre": "smollm", "tokens": tokens, "types": types, "merges": ["Ġ Ġ"]}


def write_gguf(
    path: Path,
    folder: Path,
    vocabulary: dict[str, Any],
    *,
    architecture: str = "llama",
    packed: bool = False,
    extra: dict[str, Any] | None = None,
    split: int = 0,
) -> Path:
    from safetensors.numpy import load_file

    config = read_json(folder / "config.json")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_tokenizer_model(vocabulary["model"])
    if "pre" in vocabulary:
        writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
    else:
        writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4 if "scores" not in vocabulary else 2)
    writer.add_unk_token_id(0)
    if "adds_bos" in vocabulary:
        writer.add_add_bos_token(vocabulary["adds_bos"])
    writer.add_chat_template(vocabulary.get("template", TEMPLATE))
    for key, value in (extra or {}).items():
        if value is None:  # takes a key away
            del writer.kv_data[0][key]
            continue
        kind = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
        writer.add_key_value(key, value, kind.get(type(value), gguf.GGUFValueType.FLOAT32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in load_file(folder / "model.safetensors").items():
        if ".q_proj." in name or ".k_proj." in name:
            values = to_interleaved(values, heads if ".q_proj." in name else kv_heads)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        if packed and values.ndim == 2:
            quantised = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(target, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_gguf(path: Path, workspace: Path) -> Checkpoint:
    workspace.mkdir(exist_ok=True)
    return open_checkpoint(locate(str(path), progress=NoProgress()), workspace, progress=NoProgress())
