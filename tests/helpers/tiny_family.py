"""A tiny random checkpoint for every preset, with exactly that preset's quirks, and what transformers computes with it.

Widths shrink (heads become 16 wide, there are two layers, and windows of as many tokens as the context become 16 in
64, or in 192 where two turns of a chat have to fit), their proportions stay: grouping of heads, head width against
hidden width, feed-forward against hidden. What is no width stays as published: class, vocabulary, rope_theta, tied or
untied output, token ids, stored type, kind and number of weight files, a context of a million positions.

11b-thinking's shape is not published; its row has 11b-warm's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from family_shapes import SHAPES, Shape
from safetensors.torch import load_file
from tiny_bloom import make_bloom
from tiny_gguf import byte_level_vocabulary, write_gguf
from tiny_models import edit_json, make_llama, make_mistral

from normistral.artifact.presets import PRESETS, Preset

HEAD_DIM, WINDOW, POSITIONS = 16, 16, 64
CHAT_POSITIONS = 192  # two turns of a tokenizer whose tokens are bytes
TOKENS = np.random.default_rng(0).integers(5, 261, 48).tolist()  # three windows long
ROWS = {preset.name: preset for preset in PRESETS if preset.role is not None}  # others would repeat 11b-warm


def shape_of(preset: Preset) -> Shape:
    return SHAPES[preset.name]


def make_tiny(preset: Preset, folder: Path, vocabulary: int | None = None) -> Path:
    """Write the checkpoint; returns what `export_model` is given.

    Args:
        vocabulary: tokens, where not as published: tens of thousands take most of an export's time.
    """
    shape = shape_of(preset)
    heads = shape.heads if shape.heads < 16 else shape.heads // 4
    unit = HEAD_DIM * heads * shape.hidden_size // (shape.heads * shape.head_dim)  # the hidden width
    files, kind = shape.weight_files
    sizes: dict[str, Any] = {"hidden": unit, "heads": heads, "vocab": vocabulary or shape.vocabulary}
    if shape.architecture == "BloomModel":
        return make_bloom(folder, **sizes, dtype="bfloat16", safetensors=kind == "safetensors", shards=files)
    sizes |= {
        "kv_heads": heads * shape.kv_heads // shape.heads,
        "head_dim": HEAD_DIM,
        "feed_forward": unit * shape.feed_forward // shape.hidden_size,
        "tied": shape.tied_embeddings,
        "chat": preset.role == "chat",
        "shards": files,
        "dtype": "float32" if kind == "gguf" else "bfloat16",
    }
    sizes["positions"] = positions_of(preset)
    make = make_llama if shape.architecture == "LlamaForCausalLM" else make_mistral
    if make is make_mistral:
        sizes["sliding_window"] = None if shape.sliding_window is None else WINDOW
        if "<think>" in "".join(preset.quirks):
            sizes["thinking"] = True
    make(folder, **sizes)
    edit_json(
        folder / "config.json",
        rope_theta=shape.rope_theta,
        bos_token_id=shape.bos_id,
        eos_token_id=shape.eos_id,
        pad_token_id=shape.pad_id,
    )
    return as_gguf(folder) if kind == "gguf" else folder


def positions_of(preset: Preset) -> int | None:
    """max_position_embeddings of the tiny checkpoint; None with ALiBi."""
    shape = shape_of(preset)
    if shape.rope_theta is None:
        return None
    if preset.context_length is None or preset.context_length > 2**16:
        return ROWS["11b-warm"].context_length
    return CHAT_POSITIONS if preset.role == "chat" else POSITIONS


def stops_of(preset: Preset) -> set[int]:
    """Tokens that end an answer: `</s>` (2), and in another file of ChatML `<|im_end|>` (4); a .gguf file names one."""
    shape = shape_of(preset)
    if shape.weight_files[1] == "gguf":
        return {4}
    return {2, 4} if preset.name == "7b-warm-instruct" else {shape.eos_id}


def as_gguf(folder: Path) -> Path:
    """The same checkpoint as one .gguf file, beside its folder."""
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"][261] = "ĠĠ"  # its one merge
    return write_gguf(folder.with_suffix(".gguf"), folder, vocabulary)


def source_of(given: Path) -> Path:
    """The folder that a .gguf file was made of."""
    return given.with_suffix("") if given.suffix == ".gguf" else given


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in float32, under the names of the causal language model."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    prefix = "" if any(name.startswith(("model.", "transformer.")) for name in tensors) else "transformer."
    return {(name if name == "lm_head.weight" else prefix + name): value.float() for name, value in tensors.items()}


def reference_logits(folder: Path, rounded: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [48, vocabulary] of transformers in float32, with the artifact's matrices in place of the checkpoint's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = stored_tensors(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("architectures")
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config.pop("torch_dtype")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    state = tensors | {name: torch.from_numpy(matrix) for name, matrix in rounded.items() if name in tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    with torch.inference_mode():
        return model.float().eval()(torch.tensor([TOKENS])).logits[0].numpy()
