"""Llama and Mistral: rotary positions, RMS norms, grouped key-value heads, a gated feed-forward layer.

Fields that are missing take the default of transformers' LlamaConfig or MistralConfig, written out, so that both sides
mean the same model.

Rotary positions are those of rope_theta and rope_scaling (transformers 4) or of rope_parameters (5). What comes out is
transformers 4's form, which is the one that the exporter's tools read.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from normistral.artifact.manifest import Architecture
from normistral.errors import CheckpointError
from normistral.export.checkpoint.config_fields import LLAMA_FIELDS, MISTRAL_FIELDS
from normistral.export.checkpoint.families.base import Config, Family, Shapes
from normistral.export.checkpoint.fields import (
    AS_PUBLISHED,
    MAX_POSITIONS,
    KnownField,
    check_fields,
    harmless,
    harmless_at,
    read_choice,
    read_flag,
    read_integer,
    read_number,
    shorten,
    used,
)

_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


def read_llama(config: Config) -> Config:
    """Fields of a Llama."""
    clean = _read_shared(config, default_positions=2048)
    heads = clean["num_attention_heads"]
    clean |= _read_heads(config, clean["hidden_size"], heads, default_kv_heads=heads)
    clean["attention_bias"] = read_flag(config, "attention_bias", False)
    clean["mlp_bias"] = read_flag(config, "mlp_bias", False)
    return clean


def read_mistral(config: Config) -> Config:
    """Fields of a Mistral."""
    clean = _read_shared(config, default_positions=4096 * 32)
    heads = clean["num_attention_heads"]
    clean |= _read_heads(config, clean["hidden_size"], heads, default_kv_heads=min(8, heads))
    window = config.get("sliding_window", 4096)  # the default of transformers' MistralConfig
    clean["sliding_window"] = None if window is None else read_integer(config, "sliding_window", 1, 2**31, 4096)
    return clean


def describe(config: Config, parameters: int) -> Architecture:
    """The shape, from sanitised fields."""
    return Architecture(
        name=config["architectures"][0],
        model_type=config["model_type"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        feed_forward=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        sliding_window=config.get("sliding_window"),
        tied_embeddings=config["tie_word_embeddings"],
        parameters=parameters,
        positions="rotary",
    )


def outer_tensors(config: Config) -> Shapes:
    """Embedding and last norm."""
    hidden = config["hidden_size"]
    return {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}


def layer_tensors(config: Config) -> Shapes:
    """One layer."""
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
    }
    tensors: Shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    for name, shape in linear.items():
        if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
            tensors[f"{name}.bias"] = shape[:1]
    return tensors | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _read_shared(config: Config, default_positions: int) -> Config:
    return {
        "hidden_size": read_integer(config, "hidden_size", 1, 2**17),
        "intermediate_size": read_integer(config, "intermediate_size", 1, 2**20),
        "num_hidden_layers": read_integer(config, "num_hidden_layers", 1, 2**12),
        "num_attention_heads": read_integer(config, "num_attention_heads", 1, 2**12),
        "max_position_embeddings": read_integer(config, "max_position_embeddings", 1, MAX_POSITIONS, default_positions),
        **read_rope(config),
        "rms_norm_eps": read_number(config, "rms_norm_eps", 1e-12, 0.1, 1e-6),
        "hidden_act": read_choice(config, "hidden_act", _ACTIVATIONS, "silu"),
        "tie_word_embeddings": read_flag(config, "tie_word_embeddings", False),
    }


def _read_heads(config: Config, hidden: int, heads: int, default_kv_heads: int) -> Config:
    """Heads and their width. NorMistral-11b has head_dim 128 where hidden/heads is 160."""
    if "num_key_value_heads" in config and config["num_key_value_heads"] is None:
        default_kv_heads = heads  # transformers tells null from a field that is not there
    kv_heads = read_integer(config, "num_key_value_heads", 1, heads, default_kv_heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly", AS_PUBLISHED
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"config.json has no head_dim, and hidden_size {hidden} is not divisible by {heads} heads", AS_PUBLISHED
        )
    head_dim = read_integer(config, "head_dim", 2, 2**12, hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs", AS_PUBLISHED)
    dropout = read_number(config, "attention_dropout", 0.0, 1.0, 0.0)
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim, "attention_dropout": dropout}


_ROPE_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")

LLAMA = Family(
    model_type="llama",
    causal_class="LlamaForCausalLM",
    headless_class="LlamaModel",
    prefix="model.",
    embedding="model.embed_tokens.weight",
    context_field="max_position_embeddings",
    fields=LLAMA_FIELDS,
    read_fields=read_llama,
    describe=describe,
    outer_tensors=outer_tensors,
    layer_tensors=layer_tensors,
    layer_prefix="model.layers.",
    computed=_ROPE_BUFFER,
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    causal_class="MistralForCausalLM",
    headless_class="MistralModel",
    fields=MISTRAL_FIELDS,
    read_fields=read_mistral,
)


DEFAULT_THETA = 10000.0  # of transformers' LlamaConfig and MistralConfig
# The types of scaling: their fields, and whether each has to be there.
SCALINGS = {
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
    "yarn": {
        "factor": True,
        "attention_factor": False,
        "beta_fast": False,
        "beta_slow": False,
        "mscale": False,
        "mscale_all_dim": False,
    },
}
_HAS_TRAINED_LENGTH = ("llama3", "yarn")
ROPE_FIELDS: dict[str, KnownField] = {
    "rope_type": used("the type of scaling"),
    "type": used("the type of scaling, as it was called first"),
    "rope_theta": used("base of the angles"),
    "partial_rotary_factor": harmless_at(1.0, reason="only a part of each head is turned"),
    "finetuned": harmless("of the first YaRN models; transformers does not read it"),
    "original_max_position_embeddings": used("trained context, of llama3 and yarn"),
    "truncate": used("of yarn"),
    **{name: used(f"of {kind}") for kind, names in reversed(SCALINGS.items()) for name in names},
}


def read_rope(config: Config) -> Config:
    """The fields rope_theta and rope_scaling, from whichever form they are given in.

    Raises:
        CheckpointError: forms that contradict each other, positions that differ between layers, or a type of scaling
            that is not supported.
    """
    forms = {name: _as_object(config, name) for name in ("rope_scaling", "rope_parameters")}
    thetas = {"rope_theta": config.get("rope_theta")}
    scalings: dict[str, Config | None] = {}
    for name, form in forms.items():
        if form:
            thetas[f"{name}.rope_theta"] = form.get("rope_theta")
            scalings[name] = _read_scaling(form, name, config)
    given = {name: read_number({name: theta}, name, 1.0, 1e12) for name, theta in thetas.items() if theta is not None}
    _require_one("rope_theta", given)
    _require_one("the scaling of positions", scalings)
    theta, scaling = next(iter(given.values()), DEFAULT_THETA), next(iter(scalings.values()), None)
    if scaling is not None and scaling["rope_type"] == "yarn" and theta == 1.0:
        raise CheckpointError("config.json: yarn needs a rope_theta above 1", AS_PUBLISHED)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _as_object(config: Config, name: str) -> Config:
    form = config.get(name)
    if form is None:
        return {}
    if not isinstance(form, dict):
        raise CheckpointError(f"config.json: {name} is {shorten(form)}, not an object", AS_PUBLISHED)
    layered = [key for key, value in form.items() if isinstance(value, dict)]
    if layered:
        raise CheckpointError(
            f"config.json: {name} gives layers positions of their own ({', '.join(map(shorten, layered[:4]))}), which "
            "is not supported",
            "transformers' Llama and Mistral know one kind of positions for all layers",
        )
    return form


def _read_scaling(form: Config, where: str, config: Config) -> Config | None:
    """One form's scaling; None where positions are not scaled."""
    kinds = {form[key] for key in ("rope_type", "type") if isinstance(form.get(key), str)}
    if len(kinds) > 1:
        raise CheckpointError(
            f"config.json contradicts itself: {where} is of type {' and '.join(sorted(kinds))}", AS_PUBLISHED
        )
    kind = kinds.pop() if kinds else form.get("rope_type", form.get("type"))
    if kind not in (None, "default") and (not isinstance(kind, str) or kind not in SCALINGS):
        raise CheckpointError(
            f"config.json: {where} of type {shorten(kind)} is not supported", f"supported are: {', '.join(SCALINGS)}"
        )
    check_fields(form, ROPE_FIELDS, "config.json", inside=where)
    if kind == "default" or (kind is None and form.keys() <= {"rope_type", "rope_theta", "partial_rotary_factor"}):
        return None
    if kind is None:
        raise CheckpointError(f"config.json: {where} has no rope_type", f"supported are: {', '.join(SCALINGS)}")
    clean: Config = {"rope_type": kind}
    for name, required in SCALINGS[kind].items():
        if required or form.get(name) is not None:
            clean[name] = read_number(form, name, 1e-3, 1e6)
    if kind in _HAS_TRAINED_LENGTH:
        positions = config.get("max_position_embeddings") if kind == "yarn" else None  # as transformers falls back
        clean["original_max_position_embeddings"] = read_integer(
            form, "original_max_position_embeddings", 1, MAX_POSITIONS, positions
        )
    if kind == "yarn":
        clean["truncate"] = read_flag(form, "truncate", True)
    if clean.get("low_freq_factor", 0.0) >= clean.get("high_freq_factor", 1e9):
        raise CheckpointError(f"config.json: {where} needs low_freq_factor below high_freq_factor", AS_PUBLISHED)
    return clean


def _require_one(what: str, values: dict[str, Any]) -> None:
    """Several places have to say the same."""
    if any(value != next(iter(values.values())) for value in values.values()):
        said = ", ".join(f"{name} {shorten(value)}" for name, value in values.items())
        raise CheckpointError(f"config.json contradicts itself about {what}: {said}", AS_PUBLISHED)
