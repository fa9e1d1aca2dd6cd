"""BLOOM: ALiBi instead of position embeddings, layer norms with biases, one key-value head for every query head.

Fields that are missing take the default of transformers' BloomConfig.
"""

from __future__ import annotations

from normistral.artifact.manifest import Architecture
from normistral.errors import CheckpointError
from normistral.export.checkpoint.config_fields import BLOOM_FIELDS
from normistral.export.checkpoint.families.base import Config, Family, Shapes
from normistral.export.checkpoint.fields import (
    AS_PUBLISHED,
    MAX_POSITIONS,
    read_flag,
    read_integer,
    read_number,
    shorten,
)

FEED_FORWARD_RATIO = 4  # of the hidden size; fixed in transformers' BloomMLP


def read_bloom(config: Config) -> Config:
    """Fields of a BLOOM.

    The context is `seq_length` where it is given. NorBLOOM's config has none, and ALiBi needs none.
    """
    hidden = _read_either(config, "hidden_size", "n_embed", 2**17)
    heads = _read_either(config, "n_head", "num_attention_heads", 2**12)
    if hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not divisible by {heads} heads", AS_PUBLISHED)
    clean: Config = {
        "hidden_size": hidden,
        "n_layer": _read_either(config, "n_layer", "num_hidden_layers", 2**12),
        "n_head": heads,
        "layer_norm_epsilon": read_number(config, "layer_norm_epsilon", 1e-12, 0.1, 1e-5),
        "apply_residual_connection_post_layernorm": read_flag(
            config, "apply_residual_connection_post_layernorm", False
        ),
        "hidden_dropout": read_number(config, "hidden_dropout", 0.0, 1.0, 0.0),
        "attention_dropout": read_number(config, "attention_dropout", 0.0, 1.0, 0.0),
        "tie_word_embeddings": read_flag(config, "tie_word_embeddings", True),
    }
    if config.get("seq_length") is not None:
        clean["seq_length"] = read_integer(config, "seq_length", 1, MAX_POSITIONS)
    return clean


def describe(config: Config, parameters: int) -> Architecture:
    """The shape, from sanitised fields."""
    return Architecture(
        name=config["architectures"][0],
        model_type=config["model_type"],
        hidden_size=config["hidden_size"],
        layers=config["n_layer"],
        heads=config["n_head"],
        kv_heads=config["n_head"],
        head_dim=config["hidden_size"] // config["n_head"],
        feed_forward=FEED_FORWARD_RATIO * config["hidden_size"],
        vocabulary=config["vocab_size"],
        sliding_window=None,
        tied_embeddings=config["tie_word_embeddings"],
        parameters=parameters,
        positions="alibi",
    )


def outer_tensors(config: Config) -> Shapes:
    """Embedding with its norm, and last norm."""
    hidden = config["hidden_size"]
    tensors: Shapes = {"transformer.word_embeddings.weight": (config["vocab_size"], hidden)}
    for norm in ("word_embeddings_layernorm", "ln_f"):
        tensors |= {f"transformer.{norm}.weight": (hidden,), f"transformer.{norm}.bias": (hidden,)}
    return tensors


def layer_tensors(config: Config) -> Shapes:
    """One layer. query_key_value has, head after head, the rows of its query, its key and its value."""
    hidden = config["hidden_size"]
    feed_forward = FEED_FORWARD_RATIO * hidden
    tensors: Shapes = {}
    for name, shape in (
        ("self_attention.query_key_value", (3 * hidden, hidden)),
        ("self_attention.dense", (hidden, hidden)),
        ("mlp.dense_h_to_4h", (feed_forward, hidden)),
        ("mlp.dense_4h_to_h", (hidden, feed_forward)),
    ):
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    return tensors


def _read_either(config: Config, name: str, alias: str, high: int) -> int:
    """A size that configs write under either of two names."""
    if config.get(name) is None:
        return read_integer({name: config.get(alias)}, name, 1, high)
    if config.get(alias) not in (None, config[name]):
        raise CheckpointError(
            f"config.json contradicts itself: {name} {shorten(config[name])}, {alias} {shorten(config[alias])}",
            AS_PUBLISHED,
        )
    return read_integer(config, name, 1, high)


BLOOM = Family(
    model_type="bloom",
    causal_class="BloomForCausalLM",
    headless_class="BloomModel",
    prefix="transformer.",
    embedding="transformer.word_embeddings.weight",
    context_field="seq_length",
    fields=BLOOM_FIELDS,
    read_fields=read_bloom,
    describe=describe,
    outer_tensors=outer_tensors,
    layer_tensors=layer_tensors,
    layer_prefix="transformer.h.",
)
