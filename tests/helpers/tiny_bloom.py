"""Tiny random BLOOM checkpoints as norallm/norbloom-7b-scratch is published: headless class and names, one .bin file.

    make_bloom(tmp_path / "model", heads=4)

Every bias and norm is random too, so that none can be left out unnoticed. Tokenizer and files as in tiny_models.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_models import VOCABULARY, write_json, write_tokenizer, write_weights

if TYPE_CHECKING:
    import torch


def make_bloom(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = VOCABULARY,
    tied: bool = False,
    tie_key: bool | None = None,
    after_norm: bool = False,
    headless: bool = True,
    dtype: str = "float32",
    safetensors: bool = False,
    shards: int = 1,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a whole checkpoint folder and return it.

    Args:
        tied: whether the weights lack an output layer of their own.
        tie_key: tie_word_embeddings of config.json; None leaves it out, as NorBLOOM's does.
        after_norm: apply_residual_connection_post_layernorm.
        headless: names without the prefix "transformer.", and the class BloomModel.
        fields: more of config.json, such as seq_length.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["BloomModel" if headless else "BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": vocab,
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
        "apply_residual_connection_post_layernorm": after_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if tie_key is not None:
        config["tie_word_embeddings"] = tie_key
    write_json(folder / "config.json", config | fields)
    tensors = random_tensors(layers, hidden, vocab, seed, tied=tied)
    prefix = "" if headless else "transformer."
    named = {name if name == "lm_head.weight" else prefix + name: tensor for name, tensor in tensors.items()}
    import torch

    typed = {name: tensor.to(getattr(torch, dtype)) for name, tensor in named.items()}
    write_weights(folder, typed, shards=shards, safetensors=safetensors)
    write_tokenizer(folder, vocab, chat=False, adds_bos=False)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    return folder


def random_tensors(layers: int, hidden: int, vocab: int, seed: int, *, tied: bool) -> dict[str, torch.Tensor]:
    """Weights scaled by 1/√fan-in, under the headless names."""
    import torch

    noise = torch.Generator().manual_seed(seed)

    def vector(size: int, around: float, spread: float) -> torch.Tensor:
        return around + spread * torch.randn(size, generator=noise)

    def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
        weight = torch.randn(rows, columns, generator=noise) * columns**-0.5
        return {f"{name}.weight": weight, f"{name}.bias": vector(rows, 0.0, 0.3)}

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": vector(hidden, 1.0, 0.1), f"{name}.bias": vector(hidden, 0.0, 0.1)}

    tensors = {"word_embeddings.weight": torch.randn(vocab, hidden, generator=noise)}
    tensors |= norm("word_embeddings_layernorm")
    for layer in range(layers):
        prefix = f"h.{layer}"
        tensors |= norm(f"{prefix}.input_layernorm")
        tensors |= linear(f"{prefix}.self_attention.query_key_value", 3 * hidden, hidden)
        tensors |= linear(f"{prefix}.self_attention.dense", hidden, hidden)
        tensors |= norm(f"{prefix}.post_attention_layernorm")
        tensors |= linear(f"{prefix}.mlp.dense_h_to_4h", 4 * hidden, hidden)
        tensors |= linear(f"{prefix}.mlp.dense_4h_to_h", hidden, 4 * hidden)
    tensors |= norm("ln_f")
    if not tied:
        tensors["lm_head.weight"] = torch.randn(vocab, hidden, generator=noise) * (2 * hidden**-0.5)
    return tensors
