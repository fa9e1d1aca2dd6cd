"""Fields of the published config.json of the presets' models, for tiny checkpoints with the same proportions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and counts as in `normistral.artifact.manifest.Architecture`.

    Attributes:
        architecture: the class that config.json names.
        rope_theta: base of the rotary angles; None for ALiBi.
        tied_embeddings: None where config.json is silent.
        bos_id, eos_id, pad_id: of config.json; other files may name other tokens.
        weight_files: how many, and in which format.
    """

    architecture: str
    vocabulary: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    sliding_window: int | None
    rope_theta: float | None
    tied_embeddings: bool | None
    bos_id: int
    eos_id: int
    pad_id: int
    weight_files: tuple[int, Literal["safetensors", "bin", "gguf"]]


_7B = Shape(
    architecture="MistralForCausalLM",
    vocabulary=32768,
    hidden_size=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    feed_forward=14336,
    sliding_window=2048,
    rope_theta=1e4,
    tied_embeddings=False,
    bos_id=1,
    eos_id=2,
    pad_id=2,
    weight_files=(3, "safetensors"),
)
_11B = replace(
    _7B,
    vocabulary=51200,
    hidden_size=5120,
    sliding_window=None,
    rope_theta=1e6,
    pad_id=3,
    weight_files=(5, "safetensors"),
)
SHAPES = {
    "demo": Shape(
        architecture="LlamaForCausalLM",
        vocabulary=49152,
        hidden_size=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        feed_forward=1536,
        sliding_window=None,
        rope_theta=1e5,
        tied_embeddings=True,
        bos_id=1,
        eos_id=2,
        pad_id=2,
        weight_files=(1, "gguf"),
    ),
    "7b-warm-instruct": replace(_7B, sliding_window=4096),
    "7b-warm": _7B,
    "7b-scratch": _7B,
    "norbloom-7b-scratch": Shape(
        architecture="BloomModel",
        vocabulary=32768,
        hidden_size=4096,
        heads=32,
        kv_heads=32,
        head_dim=128,
        feed_forward=4 * 4096,
        sliding_window=None,
        rope_theta=None,
        tied_embeddings=None,
        bos_id=1,
        eos_id=2,
        pad_id=0,
        weight_files=(1, "bin"),
    ),
    "11b-warm": _11B,
    "11b-thinking": _11B,  # its own is not published
}
