"""Turn a .gguf file of a Llama or Mistral model into an ordinary checkpoint folder.

The file is read here, and not through transformers' GGUF support, for three reasons: transformers parses the whole
metadata three times with a reader that takes seconds for a vocabulary of 50,000; its tokenizer conversion confuses BOS
and EOS and ignores the pre-tokenizer's name; and a damaged file ends in a traceback. The package `gguf` supplies the
arithmetic of the quantised formats.

The weights come out as float32, so nothing is lost on top of what the file's own quantisation lost.

The metadata that is used, or without effect, is collected from the keys of the package `gguf`, and from what llama.cpp
reads for its architecture "llama"; other keys are refused. Keys outside the architecture's, the tokenizer's and those
of sampling (`general.name`, `quantize.`, ...) describe the file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from normistral.errors import CheckpointError, ResourceError, UnsupportedArchitectureError
from normistral.export.checkpoint.families import find_family, sanitise_config
from normistral.export.checkpoint.families.base import Shapes
from normistral.export.checkpoint.fields import (
    DOWNLOAD_AGAIN,
    IgnoredFields,
    KnownField,
    check_fields,
    harmless,
    harmless_at,
    used,
)
from normistral.export.checkpoint.files import write_json
from normistral.export.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from normistral.export.checkpoint.gguf_tokenizer import write_tokenizer
from normistral.hardware import available_memory_bytes, free_disk_bytes
from normistral.progress import OnBytes, Progress

_ORIGINAL = "export the original checkpoint instead of the .gguf file"
_MARGIN_BYTES = 2**30  # the converter itself, and the largest tensor while it is unpacked
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_REQUIRED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
_LAYER = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)")


def convert_gguf(
    path: Path,
    folder: Path,
    ignored: IgnoredFields,
    *,
    progress: Progress,
    before_weights: Callable[[Path], None] = lambda folder: None,
) -> tuple[str, ...]:
    """Write config.json, generation_config.json, model.safetensors and tokenizer files into `folder`.

    Args:
        ignored: keys that were accepted knowingly, although they may change what the model computes.
        before_weights: called with the folder once all but the weights is there; what it raises stops the conversion.

    Returns:
        notes for the user.

    Raises:
        CheckpointError: the file is truncated, damaged or inconsistent.
        UnsupportedArchitectureError: it holds another kind of model.
        ResourceError: its float copy does not fit in memory or on the disk.
    """
    gguf = read_gguf(path)
    metadata = ignored.take_from(gguf.metadata, GGUF_FIELDS, path.name)
    gguf = replace(gguf, metadata={name: value for name, value in metadata.items() if not _names_no_token(name, value)})
    described = _config(gguf)
    of_the_model = {name: value for name, value in gguf.metadata.items() if describes_model(name)}
    check_fields(of_the_model, known_keys(of_the_model), path.name)
    try:
        config = sanitise_config(described)
    except CheckpointError as exc:
        raise CheckpointError(exc.message.replace("config.json", path.name), _ORIGINAL) from exc
    family = find_family(config)
    sources = _match_tensors(gguf, family.tensor_shapes(config))
    _require_room(path, folder, 4 * family.count_parameters(config))
    folder.mkdir(parents=True, exist_ok=True)
    notes = write_tokenizer(gguf.metadata, folder)
    (folder / "config.json").write_text(json.dumps(described | {"torch_dtype": "float32"}, indent=2), encoding="utf-8")
    if sampling := _sampling(gguf.metadata):
        write_json(folder / "generation_config.json", sampling)
    before_weights(folder)
    with progress.stage("Unpacking the GGUF weights", sum(item.nbytes for item in sources.values()), "bytes") as stage:
        _write_weights(gguf, config, sources, folder / "model.safetensors", stage.advance)
    return notes


def _config(gguf: GgufFile) -> dict[str, Any]:
    """The metadata as the config.json of a Llama model, or of a Mistral one when there is a sliding window."""
    metadata = gguf.metadata
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedArchitectureError(
            f"{gguf.path.name} is of the type {ascii(kind)[:40]}, not a model",
            "merge it into its base model, and export that" if kind == "adapter" else "give the model's own .gguf file",
        )
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedArchitectureError(
            f"{gguf.path.name} holds the architecture {ascii(architecture)[:40]}, which is not supported",
            "supported is: llama, under which llama.cpp keeps Llama and Mistral models",
        )

    def get(name: str) -> Any:
        return metadata.get(f"llama.{name}")

    if "rope_freqs.weight" in gguf.tensors or get("rope.scaling.type") not in (None, "none", "linear"):
        raise UnsupportedArchitectureError(
            f"{gguf.path.name} has scaled rotary positions, which are not read from GGUF", _ORIGINAL
        )
    for required in _REQUIRED:
        if get(required) is None:
            raise CheckpointError(
                f"{gguf.path.name} has no llama.{required}, without which llama.cpp loads no file", _ORIGINAL
            )
    named = [get("rope.dimension_count"), get("attention.key_length"), get("attention.value_length")]
    widths = [width for width in named if width is not None]
    heads, hidden = get("attention.head_count"), get("embedding_length")
    if any(width != widths[0] for width in widths):
        raise UnsupportedArchitectureError(
            f"{gguf.path.name} rotates only a part of each head, or has keys and values of different widths", _ORIGINAL
        )
    embedding = gguf.tensors.get("token_embd.weight")
    window = get("attention.sliding_window")
    return {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if get("attention.head_count_kv") is None else get("attention.head_count_kv"),
        "head_dim": widths[0] if widths else None,
        "vocab_size": None if embedding is None else embedding.shape[0],
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base"),
        "rope_scaling": _linear_scaling(gguf.path.name, metadata),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "sliding_window": window,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            metadata[f"tokenizer.ggml.{name}_token_id"]
            for name in ("eos", "eot", "eom")
            if f"tokenizer.ggml.{name}_token_id" in metadata
        ],
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _names_no_token(key: str, value: Any) -> bool:
    """Whether it is the id -1, which llama.cpp writes for "none" and GGUF keeps without a sign."""
    return key.startswith(TOKENIZER_PREFIX) and key.endswith("_token_id") and value in (-1, 2**32 - 1)


def _linear_scaling(file: str, metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Positions divided by a factor. llama.cpp takes it as linear where no type is given, and 0 as none."""
    if metadata.get("llama.rope.scaling.type") == "none":
        return None
    named = ("llama.rope.scaling.factor", "llama.rope.scale_linear")  # the new name and the old one
    factors = {metadata[name] for name in named if metadata.get(name)}
    if len(factors) > 1:
        raise CheckpointError(f"{file} contradicts itself: {named[0]} and {named[1]} differ", _ORIGINAL)
    factor = factors.pop() if factors else 1.0
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _sampling(metadata: dict[str, Any]) -> dict[str, Any]:
    """The authors' settings of sampling, as generation_config.json has them: llama.cpp's converter reads that.

    It leaves do_sample out: llama.cpp always samples, and has these for its defaults.
    """
    found: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = metadata.get(f"{SAMPLING_PREFIX}{key}")
        if value is not None:  # a decimal number is kept in 32 bits: 0.3 comes back as 0.30000001192092896
            is_array = isinstance(value, array)
            found[name] = float(f"{value:.7g}") if isinstance(value, float) else list(value) if is_array else value
    return found | {"do_sample": True} if found.keys() - {"repetition_penalty"} else found


def _match_tensors(gguf: GgufFile, expected: Shapes) -> dict[str, GgufTensor]:
    """The file's tensors under transformers' names, compared with what the config describes."""
    sources: dict[str, GgufTensor] = {}
    for name, tensor in gguf.tensors.items():
        match = _LAYER.fullmatch(name)
        if name in _NAMES:
            sources[_NAMES[name]] = tensor
        elif match and match[2] in _LAYER_NAMES:
            sources[f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"] = tensor
        else:
            raise CheckpointError(f"{gguf.path.name} holds the unknown tensor {ascii(name)[:80]}", _ORIGINAL)
    for name, shape in expected.items():
        if name not in sources:
            raise CheckpointError(f"{gguf.path.name} lacks {name}", DOWNLOAD_AGAIN)
        if sources[name].shape != shape:
            raise CheckpointError(
                f"{gguf.path.name}: {name} has shape {list(sources[name].shape)}, its metadata asks for {list(shape)}",
                DOWNLOAD_AGAIN,
            )
    extra = sorted(sources.keys() - expected.keys())
    if extra:
        raise CheckpointError(
            f"{gguf.path.name} holds {extra[0]}, which its metadata does not describe", DOWNLOAD_AGAIN
        )
    return {name: sources[name] for name in expected}


def _require_room(path: Path, folder: Path, float_bytes: int) -> None:
    available = available_memory_bytes()
    if float_bytes + _MARGIN_BYTES > available:
        raise ResourceError(
            f"{path.name} unpacks to {float_bytes / 1e9:.1f} GB of float32, and with {_MARGIN_BYTES / 1e9:.1f} GB "
            f"for the converter that does not fit in the {available / 1e9:.1f} GB of memory that is available",
            "export the original checkpoint (it is mapped, not copied), or use a machine with more memory",
        )
    free = free_disk_bytes(folder)
    if float_bytes > free:
        raise ResourceError(
            f"unpacking {path.name} needs {float_bytes / 1e9:.1f} GB of disk, but {folder.parent} has "
            f"{free / 1e9:.1f} GB free",
            "free some space, or write to another disk",
        )


def _write_weights(
    gguf: GgufFile,
    config: dict[str, Any],
    sources: dict[str, GgufTensor],
    output: Path,
    on_bytes: OnBytes,
) -> None:
    """Unpack tensor by tensor into a safetensors file, so that one of them is in memory at a time."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sources.items():
        begin, end = end, end + 4 * math.prod(tensor.shape)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    mapped = {tensor.file: np.memmap(tensor.file, dtype=np.uint8, mode="r") for tensor in sources.values()}
    with output.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in sources.items():
            stored = mapped[tensor.file][tensor.start : tensor.start + tensor.nbytes]
            packed = stored.reshape(*tensor.shape[:-1], -1)
            try:
                values = dequantize(packed, GGMLQuantizationType(tensor.ggml_type)).astype(np.float32, copy=False)
            except NotImplementedError as exc:
                kind = GGMLQuantizationType(tensor.ggml_type).name
                raise CheckpointError(
                    f"{gguf.path.name}: {name} is packed as {kind}, not supported", _ORIGINAL
                ) from exc
            heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
            if heads is not None:
                values = _interleaved_to_halves(values, config[heads])
            file.write(np.ascontiguousarray(values).data)
            del values  # before the next one is unpacked
            on_bytes(tensor.nbytes)


def _interleaved_to_halves(values: Any, heads: int) -> Any:
    """Undo llama.cpp's reordering of rotary dimensions: [heads, half, 2] rows back to [heads, 2, half].

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, of which this is the inverse.
    """
    half = values.shape[0] // heads // 2
    return values.reshape(heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


ARCHITECTURE_PREFIX, TOKENIZER_PREFIX, SAMPLING_PREFIX = "llama.", "tokenizer.", "general.sampling."
# llama.cpp's name of a setting -> transformers'
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_SCALED = "positions that are scaled, which is not read from GGUF"
_EXPERTS = "a mixture of experts"
_MARKER = "a marker of a task; the vocabulary has it as a token"


GGUF_FIELDS: dict[str, KnownField] = {
    "general.architecture": used("has to be llama"),
    "general.alignment": used("where tensors begin"),
    "general.type": used("has to be model"),
    **{f"{SAMPLING_PREFIX}{key}": used(f"{name} of generation_config.json") for key, name in _SAMPLING.items()},
    "general.sampling.penalty_last_n": KnownField(
        "how far back the repetition penalty looks; here it is the whole text",
        accepts=lambda value, metadata: value == -1 or metadata.get("general.sampling.penalty_repeat", 1.0) == 1.0,
        values="-1, or any without a penalty",
    ),
    "general.sampling.sequence": harmless_at(reason="which samplers run, and in which order"),
    "general.sampling.xtc_probability": harmless_at(0.0, reason="sampling without the likeliest tokens"),
    "general.sampling.xtc_threshold": harmless("of xtc_probability"),
    "general.sampling.mirostat": harmless_at(0, reason="sampling of even surprise"),
    "general.sampling.mirostat_tau": harmless("of mirostat"),
    "general.sampling.mirostat_eta": harmless("of mirostat"),
    "llama.vocab_size": KnownField(
        "rows of the embedding",
        accepts=lambda value, metadata: value == len(metadata.get("tokenizer.ggml.tokens") or ()),
        values="the number of tokens",
    ),
    "llama.context_length": used("the context"),
    "llama.embedding_length": used("shape"),
    "llama.block_count": used("number of layers"),
    "llama.feed_forward_length": used("shape of the feed-forward layers"),
    "llama.attention.head_count": used("shape of attention"),
    "llama.attention.head_count_kv": used("shape of attention"),
    "llama.attention.key_length": used("shape of attention"),
    "llama.attention.value_length": used("has to be the keys' width"),
    "llama.attention.layer_norm_rms_epsilon": used("every norm"),
    "llama.attention.sliding_window": used("how far attention reaches back"),
    "llama.rope.dimension_count": used("has to be the heads' width"),
    "llama.rope.freq_base": used("base of the angles"),
    "llama.rope.scaling.type": used("none and linear are read"),
    "llama.rope.scaling.factor": used("of linear, which llama.cpp takes where no type is given"),
    "llama.rope.scale_linear": used("the factor's old name"),
    "llama.rope.scaling.original_context_length": KnownField(
        _SCALED,
        accepts=lambda value, metadata: (
            value == metadata.get("llama.context_length")
            or metadata.get("llama.rope.scaling.type") in ("none", "linear")
        ),
        values="the context, or any where positions are not scaled by YaRN",
    ),
    "llama.rope.scaling.finetuned": harmless("llama.cpp does not read it"),
    "llama.tensor_data_layout": harmless_at("Meta AI original pth", reason="order of the weights"),
    "llama.attention.causal": harmless_at(True, reason="attention to later tokens"),
    "llama.use_parallel_residual": harmless_at(False, reason="attention and feed-forward beside each other"),
    "llama.logit_scale": harmless_at(1.0, 0.0, reason="logits are multiplied by it"),
    "llama.residual_scale": harmless_at(1.0, 0.0, reason="what a layer adds is multiplied by it"),
    "llama.embedding_scale": harmless_at(1.0, 0.0, reason="embeddings are multiplied by it"),
    "llama.attention.scale": harmless_at(0.0, reason="scores are multiplied by it"),
    "llama.attention.clamp_kqv": harmless_at(0.0, reason="queries, keys and values are bounded by it"),
    "llama.attention.max_alibi_bias": harmless_at(0.0, reason="another kind of positions"),
    "llama.attention.temperature_scale": harmless_at(0.0, reason="scores depend on the position"),
    "llama.attention.temperature_length": harmless_at(0, reason="scores depend on the position"),
    "llama.attn_logit_softcapping": harmless_at(0.0, reason="scores are bounded by it"),
    "llama.final_logit_softcapping": harmless_at(0.0, reason="logits are bounded by it"),
    "llama.rope.scaling.attn_factor": harmless_at(1.0, 0.0, reason=_SCALED),
    "llama.pooling_type": harmless("of embeddings, which are not exported"),
    "llama.leading_dense_block_count": harmless_at(0, reason=_EXPERTS),
    "llama.nextn_predict_layers": harmless_at(0, reason="layers that predict further tokens"),
    **{
        f"llama.{name}": harmless_at(0, reason=_EXPERTS)
        for name in (
            "expert_count",
            "expert_used_count",
            "expert_shared_count",
            "expert_group_count",
            "expert_group_used_count",
            "expert_feed_forward_length",
            "expert_shared_feed_forward_length",
            "interleave_moe_layer_step",
            "moe_every_n_layers",
        )
    },
    "tokenizer.ggml.model": used("kind of tokenizer"),
    "tokenizer.ggml.pre": used("how text is cut before merging"),
    "tokenizer.ggml.tokens": used("the vocabulary"),
    "tokenizer.ggml.token_type": used("which tokens are special"),
    "tokenizer.ggml.scores": used("order of merges"),
    "tokenizer.ggml.merges": used("merges"),
    "tokenizer.ggml.bos_token_id": used("first token of a text"),
    "tokenizer.ggml.eos_token_id": used("one of the tokens that end an answer"),
    "tokenizer.ggml.eot_token_id": used("one of the tokens that end an answer"),
    "tokenizer.ggml.eom_token_id": used("one of the tokens that end an answer"),
    "tokenizer.ggml.padding_token_id": used("padding"),
    "tokenizer.ggml.unknown_token_id": used("what stands for unknown letters"),
    "tokenizer.ggml.add_bos_token": used("whether a text begins with BOS"),
    "tokenizer.ggml.add_eos_token": used("refused where true"),
    "tokenizer.ggml.add_space_prefix": used("whether a text begins with a blank"),
    "tokenizer.chat_template": used("the chat template"),
    "tokenizer.ggml.add_sep_token": harmless_at(False, reason="a separator at the end of texts"),
    "tokenizer.ggml.remove_extra_whitespaces": harmless_at(False, reason="blanks that are taken out of texts"),
    "tokenizer.ggml.precompiled_charsmap": harmless_at([], reason="letters that are replaced"),
    "tokenizer.ggml.token_type_count": harmless("of BERT"),
    "tokenizer.ggml.seperator_token_id": harmless("no token of a decoder's texts"),
    "tokenizer.ggml.separator_token_id": harmless("no token of a decoder's texts"),
    "tokenizer.ggml.cls_token_id": harmless("no token of a decoder's texts"),
    "tokenizer.ggml.mask_token_id": harmless("no token of a decoder's texts"),
    "tokenizer.chat_templates": harmless("names of further templates; the first one is taken"),
    "tokenizer.huggingface.json": harmless("a copy; the tokenizer is rebuilt as llama.cpp reads it"),
    **{
        f"tokenizer.ggml.{name}_token_id": harmless(_MARKER)
        for name in (
            *("prefix", "suffix", "middle"),
            *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
        )
    },
}


def describes_model(name: str) -> bool:
    """Whether a key says anything about arithmetic, tokenizer or sampling; others describe the file."""
    return name.startswith((ARCHITECTURE_PREFIX, TOKENIZER_PREFIX, SAMPLING_PREFIX)) or name in GGUF_FIELDS


def known_keys(metadata: Mapping[str, Any]) -> dict[str, KnownField]:
    """The table, with the names under which a file keeps further chat templates."""
    further = {name: harmless("a further template") for name in metadata if name.startswith("tokenizer.chat_template.")}
    return further | GGUF_FIELDS
