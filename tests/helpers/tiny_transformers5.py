"""Tiny checkpoints as transformers 5 saves them, and the logits that it computes with them.

data/transformers5/ holds the config.json that transformers 5 wrote for each case, byte for byte, and float32 logits of
its own for TOKENS. The weights come from a seed and are float16 numbers, so that every format can hold them exactly.
`make test-transformers5` (compare_transformers5.py) makes all of it anew, in an environment of its own.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import VOCABULARY, write_json, write_tokenizer

STORED = Path(__file__).parents[1] / "data" / "transformers5"
TOKENS = np.random.default_rng(0).integers(5, 261, 48).tolist()  # three windows, and three times the trained context
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS = 32, 4, 2, 16, 64, 2
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_MISTRAL = ("Mistral", _SHAPE | {"sliding_window": 16})
_LLAMA = ("Llama", _SHAPE)
_TRAINED = {"original_max_position_embeddings": 16}
# Name -> class, and what transformers 5 is given; it writes the rest itself.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (kind, fields | {"rope_parameters": rope})
    for name, (kind, fields), rope in (
        ("mistral-theta", _MISTRAL, {"rope_type": "default", "rope_theta": 1e6}),
        ("mistral-yarn", _MISTRAL, {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, **_TRAINED}),
        ("mistral-dynamic", _MISTRAL, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("llama-theta", _LLAMA, {"rope_type": "default", "rope_theta": 1e6}),
        (
            "llama-llama3",
            _LLAMA,
            {
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_TRAINED},
            },
        ),
        (
            "llama-yarn",
            _LLAMA,
            {
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 0.9, "truncate": False},
                **{"beta_fast": 4.0, "beta_slow": 0.5, **_TRAINED},
            },
        ),
        ("llama-linear", _LLAMA, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    )
}
CASES["bloom"] = (
    "Bloom",
    {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 1}
    | {"eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-5},
)


def random_state(name: str) -> dict[str, np.ndarray]:
    """Weights of a case by name, float32."""
    noise = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> np.ndarray:
        values = noise.standard_normal((rows, columns)) * columns**-0.5
        return values.astype(np.float16).astype(np.float32)

    def vector(size: int, around: float) -> np.ndarray:
        return (around + 0.1 * noise.standard_normal(size)).astype(np.float16).astype(np.float32)

    if name == "bloom":
        return _bloom_state(matrix, vector)
    state = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": vector(HIDDEN, 1.0),
    }
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].astype(np.float16).astype(np.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            state[f"{prefix}self_attn.{part}_proj.weight"] = 2 * matrix(heads * HEAD_DIM, HIDDEN)
        state[f"{prefix}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        state[f"{prefix}mlp.gate_proj.weight"] = matrix(FEED_FORWARD, HIDDEN)
        state[f"{prefix}mlp.up_proj.weight"] = matrix(FEED_FORWARD, HIDDEN)
        state[f"{prefix}mlp.down_proj.weight"] = matrix(HIDDEN, FEED_FORWARD)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}{norm}.weight"] = vector(HIDDEN, 1.0)
    return state | {"lm_head.weight": 2 * matrix(VOCABULARY, HIDDEN)}


def _bloom_state(matrix: Any, vector: Any) -> dict[str, np.ndarray]:
    state = {"transformer.word_embeddings.weight": matrix(VOCABULARY, HIDDEN)}

    def add(name: str, rows: int, columns: int = 0) -> None:
        state[f"transformer.{name}.weight"] = matrix(rows, columns) if columns else vector(rows, 1.0)
        state[f"transformer.{name}.bias"] = vector(rows, 0.0)

    add("word_embeddings_layernorm", HIDDEN)
    for layer in range(LAYERS):
        add(f"h.{layer}.input_layernorm", HIDDEN)
        add(f"h.{layer}.self_attention.query_key_value", 3 * HIDDEN, HIDDEN)
        add(f"h.{layer}.self_attention.dense", HIDDEN, HIDDEN)
        add(f"h.{layer}.post_attention_layernorm", HIDDEN)
        add(f"h.{layer}.mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN)
        add(f"h.{layer}.mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN)
    add("ln_f", HIDDEN)
    return state | {"lm_head.weight": 2 * matrix(VOCABULARY, HIDDEN)}


def make_stored(folder: Path, name: str) -> Path:
    """A case as transformers 5 saved it; returns the checkpoint's folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    shutil.copyfile(STORED / f"{name}.json", folder / "config.json")
    tensors = {key: torch.from_numpy(values) for key, values in random_state(name).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, VOCABULARY, chat=False, adds_bos=False)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    return folder


def stored_logits(name: str) -> np.ndarray:
    """Of transformers 5, float32 [16, vocabulary]: the last tokens of TOKENS."""
    return np.load(STORED / f"{name}.npy")
