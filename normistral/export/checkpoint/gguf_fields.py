"""The metadata of a .gguf file that holds a Llama or Mistral: used, or without effect and why. Others are refused.

Collected from the keys of the package `gguf`, and from what llama.cpp reads for its architecture "llama". Keys outside
the architecture's and the tokenizer's own (`general.`, `quantize.`, ...) describe the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normistral.export.checkpoint.fields import Document, KnownField, harmless, harmless_at, used

ARCHITECTURE_PREFIX, TOKENIZER_PREFIX = "llama.", "tokenizer."
_SCALED = "positions that are scaled, which is not read from GGUF"
_EXPERTS = "a mixture of experts"
_MARKER = "a marker of a task; the vocabulary has it as a token"


def _is_trained_context(value: Any, metadata: Document) -> bool:
    return value == metadata.get("llama.context_length") or metadata.get("llama.rope.scaling.type") in (
        "none",
        "linear",
    )


GGUF_FIELDS: dict[str, KnownField] = {
    "general.architecture": used("has to be llama"),
    "general.alignment": used("where tensors begin"),
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
        _SCALED, accepts=_is_trained_context, values="the context, or any where positions are not scaled by YaRN"
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
    """Whether a key says anything about the arithmetic or the tokenizer; others describe the file."""
    return name.startswith((ARCHITECTURE_PREFIX, TOKENIZER_PREFIX)) or name in GGUF_FIELDS


def known_keys(metadata: Mapping[str, Any]) -> dict[str, KnownField]:
    """The table, with the names under which a file keeps further chat templates."""
    further = {name: harmless("a further template") for name in metadata if name.startswith("tokenizer.chat_template.")}
    return further | GGUF_FIELDS
