"""Read a checkpoint's config.json and write it anew from known, checked fields.

Whitelist, not blacklist: whatever is not listed here (`auto_map`, `_attn_implementation_internal`, anything that a
later version of transformers might act on) never reaches the libraries that load the model. Fields that are missing
take the default of transformers' MistralConfig or LlamaConfig, written out, so that both sides mean the same model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError, UnsupportedArchitectureError
from normistral.manifest import Architecture

SUPPORTED = {
    "MistralForCausalLM": "mistral",
    "MistralModel": "mistral",
    "LlamaForCausalLM": "llama",
    "LlamaModel": "llama",
}
_CLASS_OF = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_MAX_JSON_BYTES = 256 * 2**20
_MAX_PARAMETERS = 2**40
_WHOLE = "use a checkpoint whose config.json is as its authors published it"

# (lowest, highest) of fields that must be there; the bounds leave room for any real model and stop absurd widths
# before anything is allocated.
_SIZES = {
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**12),
    "vocab_size": (1, 2**22),
}
_MAX_POSITIONS = 2**26


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MiB", _WHOLE)
        raw = path.read_bytes()
        document = json.loads(raw)
        if b"\\ud" in raw.lower():  # half a surrogate pair is no character: nothing could write it again
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror}", "check the folder's permissions") from exc
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else exc
        raise CheckpointError(f"{path.name} is not valid JSON: {reason}", "download or copy the file again") from exc
    if not isinstance(document, dict):
        raise CheckpointError(f"{path.name} holds a {type(document).__name__}, not an object", _WHOLE)
    return document


def sanitise_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that matter, checked, with defaults filled in.

    Raises:
        UnsupportedArchitectureError: not a model this package exports.
        CheckpointError: a field is missing, of the wrong type, out of range, or contradicts another.
    """
    model_type = _model_type(config)
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"the checkpoint is already quantised ({_short(method)})",
            "export the original checkpoint with its floating-point weights",
        )
    clean: dict[str, Any] = {"architectures": [_CLASS_OF[model_type]], "model_type": model_type}
    clean |= {name: _integer(config, name, low, high) for name, (low, high) in _SIZES.items()}
    clean |= _attention(config, model_type, clean["hidden_size"], clean["num_attention_heads"])
    positions = 4096 * 32 if model_type == "mistral" else 2048
    clean["max_position_embeddings"] = _integer(config, "max_position_embeddings", 1, _MAX_POSITIONS, positions)
    clean["rope_theta"] = _number(config, "rope_theta", 1.0, 1e12, 10000.0)
    clean["rope_scaling"] = _rope_scaling(config)
    clean["rms_norm_eps"] = _number(config, "rms_norm_eps", 1e-12, 0.1, 1e-6)
    clean["initializer_range"] = _number(config, "initializer_range", 0.0, 10.0, 0.02)
    clean["hidden_act"] = _choice(config, "hidden_act", _ACTIVATIONS, "silu")
    clean["tie_word_embeddings"] = _flag(config, "tie_word_embeddings", False)
    clean["use_cache"] = True
    clean["bos_token_id"] = _token_id(config, "bos_token_id", clean["vocab_size"])
    clean["pad_token_id"] = _token_id(config, "pad_token_id", clean["vocab_size"])
    clean["eos_token_id"] = token_ids(config, "eos_token_id", clean["vocab_size"], "config.json") or None
    if count_parameters(clean) > _MAX_PARAMETERS:
        raise CheckpointError(f"config.json describes {count_parameters(clean):.3g} parameters", _WHOLE)
    return clean


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The model's shape, from a sanitised config."""
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
        parameters=count_parameters(config),
    )


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes [out, in] of all weights of the model, by the names that transformers gives them."""
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    for layer in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_tensors(config).items()}
    tensors["model.norm.weight"] = (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    return tensors


def count_parameters(config: dict[str, Any]) -> int:
    """Parameters of a sanitised config; a tied output layer counts once."""
    layer = sum(math.prod(shape) for shape in _layer_tensors(config).values())
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    return int(config["num_hidden_layers"] * layer + embeddings + config["hidden_size"])


def token_ids(document: dict[str, Any], field: str, vocabulary: int, file: str) -> list[int]:
    """A field that holds one token id, several, or null.

    Raises:
        CheckpointError: anything else, or an id outside the vocabulary.
    """
    value = document.get(field)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if len(values) > 64:
        raise CheckpointError(f"{file}: {field} holds {len(values)} ids", _WHOLE)
    for item in values:
        if not _is_integer(item) or not 0 <= item < vocabulary:
            raise CheckpointError(
                f"{file}: {field} is {_short(value)}, but ids run from 0 to {vocabulary - 1}", f"correct {file}"
            )
    return values


def _model_type(config: dict[str, Any]) -> str:
    """The model type, from `architectures` first: NORA.LLM's configs name the class there."""
    known = ", ".join(name for name in SUPPORTED if name.endswith("ForCausalLM"))
    names = config.get("architectures")
    if names is None and config.get("model_type") in _CLASS_OF:
        return str(config["model_type"])
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UnsupportedArchitectureError(
            f"config.json names no single architecture: architectures is {_short(names)}", f"supported are: {known}"
        )
    model_type = SUPPORTED.get(names[0])
    if model_type is None:
        raise UnsupportedArchitectureError(
            f"the architecture {_short(names[0])} is not supported", f"supported are: {known}"
        )
    if config.get("model_type", model_type) != model_type:
        raise CheckpointError(
            f"config.json contradicts itself: architecture {names[0]}, model_type {_short(config['model_type'])}",
            _WHOLE,
        )
    return model_type


def _attention(config: dict[str, Any], model_type: str, hidden: int, heads: int) -> dict[str, Any]:
    """Heads, their width and the window. NorMistral-11b has head_dim 128 where hidden/heads is 160."""
    fields: dict[str, Any] = {}
    kv_heads = _integer(config, "num_key_value_heads", 1, heads, min(8, heads) if model_type == "mistral" else heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly", _WHOLE
        )
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"config.json has no head_dim, and hidden_size {hidden} is not divisible by {heads} heads", _WHOLE
        )
    head_dim = _integer(config, "head_dim", 2, 2**12, hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"config.json: head_dim {head_dim} is odd; rotary positions need pairs", _WHOLE)
    fields |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    fields["attention_dropout"] = _number(config, "attention_dropout", 0.0, 1.0, 0.0)
    if model_type == "mistral":
        window = config.get("sliding_window", 4096)  # the default of transformers' MistralConfig
        fields["sliding_window"] = None if window is None else _integer(config, "sliding_window", 1, 2**31, 4096)
    else:
        fields["attention_bias"] = _flag(config, "attention_bias", False)
        fields["mlp_bias"] = _flag(config, "mlp_bias", False)
    return fields


def _rope_scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope_scaling is {_short(scaling)}, not an object", _WHOLE)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise CheckpointError(
            f"config.json: rope_scaling of type {_short(kind)} is not supported",
            f"supported are: {', '.join(_ROPE_SCALING)}",
        )
    clean: dict[str, Any] = {"rope_type": kind}
    for name in _ROPE_SCALING[kind]:
        if name == "original_max_position_embeddings":
            clean[name] = _integer(scaling, name, 1, _MAX_POSITIONS)
        else:
            clean[name] = _number(scaling, name, 1e-3, 1e6)
    if clean.get("low_freq_factor", 0.0) >= clean.get("high_freq_factor", 1e9):
        raise CheckpointError("config.json: rope_scaling needs low_freq_factor below high_freq_factor", _WHOLE)
    return clean


def _layer_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
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
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linear.items()}
    for name, shape in linear.items():
        if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
            tensors[f"{name}.bias"] = shape[:1]
    return tensors | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(config: dict[str, Any], name: str, low: int, high: int, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json has no {name}", _WHOLE)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(
            f"config.json: {name} must be a whole number from {low} to {high}, not {_short(value)}", _WHOLE
        )
    return value


def _number(config: dict[str, Any], name: str, low: float, high: float, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise CheckpointError(
            f"config.json: {name} must be a number from {low:g} to {high:g}, not {_short(value)}", _WHOLE
        )
    return float(value)


def _flag(config: dict[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, not {_short(value)}", _WHOLE)
    return value


def _choice(config: dict[str, Any], name: str, choices: tuple[str, ...], default: str) -> str:
    value = config.get(name, default)
    if not isinstance(value, str) or value not in choices:
        raise CheckpointError(f"config.json: {name} must be one of {', '.join(choices)}, not {_short(value)}", _WHOLE)
    return value


def _token_id(config: dict[str, Any], name: str, vocabulary: int) -> int | None:
    if name == "pad_token_id" and _is_integer(config.get(name)) and config[name] == -1:
        return None  # how the first Llama configs say "none"
    ids = token_ids(config, name, vocabulary, "config.json")
    if len(ids) > 1:
        raise CheckpointError(f"config.json: {name} must be one id, not {_short(ids)}", _WHOLE)
    return ids[0] if ids else None


def _short(value: object) -> str:
    """A value for a one-line message."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
