"""The fields of config.json, by family: used, or without effect and why. Whatever is not here is refused.

Collected from the sources of transformers 4.57 and 5 (classes of configuration and models, and what its shared code
reads of any configuration), and from configs as trainers write them. docs/fields.md is made from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normistral.export.checkpoint.fields import Document, KnownField, harmless, harmless_at, used
from normistral.export.checkpoint.generation_config import GENERATION_FIELDS

Fields = dict[str, KnownField]

_TRAINING = "matters in training only"
_OUTPUT = "chooses what a call returns beside the logits"
_SPEED = "chooses how the same is computed, not what"
_LABELS = "of a classifier, which is not exported"
_LEFTOVER = "left by a training tool; no model code reads it"
_OTHER_MODEL = "of other architectures, whose arithmetic differs"

# Names that training tools put before theirs; no model code reads any of them.
LEFTOVER_PREFIXES = ("unsloth_", "axolotl_", "trl_", "wandb_", "mergekit_", "neftune_")


def _all_layers_alike(value: Any, config: Document) -> bool:
    """Whether layer_types says of every layer what sliding_window says of all."""
    kind = "full_attention" if _window(config) is None else "sliding_attention"
    return isinstance(value, list) and all(item == kind for item in value)


def _window(config: Document) -> Any:
    """The sliding window; of a Mistral that does not name it, the default of its class."""
    is_mistral = "mistral" in f"{config.get('model_type')} {config.get('architectures')}".lower()
    return config.get("sliding_window", 4096 if is_mistral else None)


def _is_scaling_length(value: Any, config: Document) -> bool:
    """Whether the trained context agrees with what the scaling of positions says, or nothing reads it."""
    scalings = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    named = [
        scaling.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        for scaling in scalings
        if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) not in (None, "default")
    ]
    return all(length == value for length in named)


_CODE: Fields = {
    "auto_map": harmless("names code in the checkpoint, which is never run"),
    "custom_pipelines": harmless("names code in the checkpoint, which is never run"),
    "trust_remote_code": harmless("code in the checkpoint is never run"),
    **{
        name: harmless("names code for attention, which is never run: transformers' own is the reference")
        for name in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")
    },
    **{
        name: harmless("names code for mixtures of experts, which these models are not")
        for name in ("_experts_implementation", "_experts_implementation_internal", "experts_implementation")
    },
}
_COMMON: Fields = {
    "architectures": used("the class of the model"),
    "model_type": used("the class of the model"),
    "vocab_size": used("shape of embedding and output layer"),
    "hidden_size": used("shape"),
    "tie_word_embeddings": used("whether the output layer is the embedding"),
    "bos_token_id": used("first token of a text"),
    "eos_token_id": used("one of the tokens that end an answer"),
    "pad_token_id": used("written into generation_config.json"),
    "quantization_config": harmless_at(reason="the weights have to be floats"),
    **_CODE,
    "initializer_range": harmless("of weights before training; read and written again"),
    "use_cache": harmless("keys and values are always cached"),
    "torch_dtype": harmless("the type of the stored weights is read from the weights"),
    "dtype": harmless("the type of the stored weights is read from the weights"),
    "transformers_version": harmless("who wrote the file"),
    "_name_or_path": harmless("where the model was loaded from"),
    "name_or_path": harmless("where the model was loaded from"),
    "_commit_hash": harmless("where the model was loaded from"),
    "_attn_implementation_autoset": harmless(_SPEED),
    "_flash_attn_2_enabled": harmless(_SPEED),
    "use_flash_attn": harmless(_SPEED),
    "use_flash_attention_2": harmless(_SPEED),
    "use_kernels": harmless(_SPEED),
    "chunk_size_feed_forward": harmless("cuts the feed-forward layers' work into pieces; not read by these models"),
    "pretraining_tp": harmless("order of sums in training with tensor parallelism"),
    "base_model_tp_plan": harmless("how to share the work between devices"),
    "base_model_pp_plan": harmless("how to share the work between devices"),
    "base_model_ep_plan": harmless("how to share the work between devices"),
    "gradient_checkpointing": harmless(_TRAINING),
    "hidden_dropout": harmless(_TRAINING),
    "attention_dropout": harmless(_TRAINING),
    **{
        name: harmless(_TRAINING)
        for name in (
            "classifier_dropout",
            "dropout",
            "activation_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "resid_dropout",
            "embedding_dropout",
            "residual_dropout",
            "label_smoothing",
            "loss_type",
            "ignore_index",
            "router_aux_loss_coef",
            "max_loss_scale",
        )
    },
    **{
        name: harmless(_OUTPUT)
        for name in (
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "use_return_dict",
            "keys_to_ignore_at_inference",
            "tie_last_hidden_states",
        )
    },
    "torchscript": harmless("for tracing by hand; the exporter traces without"),
    "use_bfloat16": harmless("of TensorFlow models"),
    "tf_legacy_loss": harmless("of TensorFlow models"),
    **{name: harmless(_LABELS) for name in ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")},
    "task_specific_params": harmless("settings of transformers' pipelines"),
    "tokenizer_class": harmless("the tokenizer's own files say it"),
    "model_max_length": harmless("the tokenizer's; max_position_embeddings bounds the context"),
    "tokenizer_model_max_length": harmless("the tokenizer's; max_position_embeddings bounds the context"),
    "tokenizer_padding_side": harmless(_TRAINING),
    "padding_side": harmless(_TRAINING),
    "max_sequence_length": harmless("max_position_embeddings bounds the context"),
    "max_seq_length": harmless("max_position_embeddings bounds the context"),
    "max_seq_len": harmless("max_position_embeddings bounds the context"),
    "unk_token_id": harmless("the tokenizer's own files say it"),
    "sep_token_id": harmless("no token of a decoder's texts"),
    "decoder_start_token_id": harmless("of models with an encoder"),
    "transformers.js_config": harmless("of another runtime"),
    **{
        name: harmless(_LEFTOVER)
        for name in (
            "peft_version",
            "peft_type",
            "base_model_name_or_path",
            "base_model",
            "dataset",
            "datasets",
            "license",
            "language",
            "tags",
            "training_args",
            "train_config",
            "tokenizer_name",
            "model_name",
            "neftune_noise_alpha",
            "torch_compile",
            "sample_packing",
            "flash_attention",
            "freeze_input_layernorm",
            "freeze_non_embed",
            "quantization_bits",
            "load_in_4bit",
            "load_in_8bit",
            "_load_in_4bit",
            "_load_in_8bit",
            "use_unsloth",
            "is_llama_config",
        )
    },
    # With another value than these, transformers (4.57, 5, or the architecture they come from) computes something else.
    "prefix": harmless_at("", reason="a text before every prompt"),
    "is_decoder": harmless("tells decoders of encoder-decoder pairs apart; these are always decoders"),
    "is_encoder_decoder": harmless_at(False, reason="a model with an encoder"),
    "add_cross_attention": harmless_at(False, reason="attention to an encoder"),
    "cross_attention_hidden_size": harmless_at(reason="attention to an encoder"),
    "tie_encoder_decoder": harmless_at(False, reason="a model with an encoder"),
    "pruned_heads": harmless_at({}, reason="heads that were taken out"),
    "is_causal": harmless_at(True, reason="attention to later tokens"),
    "use_bidirectional_attention": harmless_at(False, reason="attention to later tokens"),
    "per_layer_config": harmless_at({}, reason="layers that differ from each other"),
    "text_config": harmless_at(reason="a model of text and something else"),
    "vision_config": harmless_at(reason="a model of text and something else"),
    "audio_config": harmless_at(reason="a model of text and something else"),
    "logits_scaling": harmless_at(1.0, reason="logits are divided by it"),
    "logit_scale": harmless_at(1.0, reason="logits are multiplied by it"),
    "embedding_multiplier": harmless_at(1.0, reason="embeddings are multiplied by it"),
    "residual_multiplier": harmless_at(1.0, reason="what a layer adds is multiplied by it"),
    "attention_multiplier": harmless_at(reason="scores are multiplied by it"),
    "final_logit_softcapping": harmless_at(reason="logits are bounded by it"),
    "attn_logit_softcapping": harmless_at(reason="scores are bounded by it"),
    "clip_qkv": harmless_at(reason="queries, keys and values are bounded by it"),
    "qk_norm": harmless_at(False, reason="queries and keys are normed"),
    "use_qk_norm": harmless_at(False, reason="queries and keys are normed"),
    "qk_layernorm": harmless_at(False, reason="queries and keys are normed"),
    "parallel_attn": harmless_at(False, reason="attention and feed-forward beside each other"),
    "use_parallel_residual": harmless_at(False, reason="attention and feed-forward beside each other"),
    **{
        name: harmless_at(0, reason=_OTHER_MODEL)
        for name in (
            "num_experts",
            "num_local_experts",
            "num_experts_per_tok",
            "n_routed_experts",
            "num_nextn_predict_layers",
            "num_kv_shared_layers",
        )
    },
}
_ROTARY: Fields = {
    "intermediate_size": used("shape of the feed-forward layers"),
    "num_hidden_layers": used("number of layers"),
    "num_attention_heads": used("shape of attention"),
    "num_key_value_heads": used("shape of attention"),
    "head_dim": used("shape of attention"),
    "max_position_embeddings": used("the context"),
    "rms_norm_eps": used("every norm"),
    "hidden_act": used("activation of the feed-forward layers"),
    "rope_theta": used("angles of positions"),
    "rope_scaling": used("angles of positions, as transformers 4 writes them"),
    "rope_parameters": used("angles of positions, as transformers 5 writes them"),
    "seq_length": harmless("max_position_embeddings bounds the context"),
    "max_window_layers": harmless("of Qwen2; with one window for all layers nothing reads it"),
    "layer_types": KnownField(
        "layers that differ from each other",
        accepts=_all_layers_alike,
        values="all full_attention without a sliding window, all sliding_attention with one",
    ),
    "use_sliding_window": KnownField(
        "whether the window is in force, in other architectures",
        accepts=lambda value, config: value is (_window(config) is not None),
        values="true with a sliding window, false without",
    ),
    "original_max_position_embeddings": KnownField(
        "trained context of scaled positions, which transformers 4 and 5 read differently",
        accepts=_is_scaling_length,
        values="what rope_scaling or rope_parameters says, or any without scaled positions",
    ),
    "hidden_activation": KnownField(
        "activation of other architectures",
        accepts=lambda value, config: value == config.get("hidden_act", "silu"),
        values="the value of hidden_act",
    ),
    "layer_norm_eps": KnownField(
        "every norm, in other architectures",
        accepts=lambda value, config: value == config.get("rms_norm_eps", 1e-6),
        values="the value of rms_norm_eps",
    ),
    "query_pre_attn_scalar": KnownField(
        "scores are divided by its root, in Gemma",
        accepts=lambda value, config: value == config.get("head_dim"),
        values="the value of head_dim",
    ),
    "attention_chunk_size": harmless_at(reason="attention inside pieces of the text only"),
    "partial_rotary_factor": harmless_at(1.0, reason="only a part of each head is turned"),
    "rotary_pct": harmless_at(1.0, reason="only a part of each head is turned"),
    "rope_interleaved": harmless_at(False, reason="neighbours are turned together"),
    "rope_interleave": harmless_at(False, reason="neighbours are turned together"),
    "rope_local_base_freq": harmless_at(reason="other angles in some layers"),
    "no_rope_layers": harmless_at([], reason="layers without positions"),
    "no_rope_layer_interval": harmless_at(reason="layers without positions"),
    "use_rope": harmless_at(True, reason="layers without positions"),
    "alibi": harmless_at(False, reason="another kind of positions"),
    "attn_temperature_tuning": harmless_at(False, 0, reason="scores depend on the position"),
    "use_bias": harmless_at(False, reason="biases"),
}

LLAMA_FIELDS: Fields = {
    **_COMMON,
    **_ROTARY,
    "attention_bias": used("whether attention has biases"),
    "mlp_bias": used("whether feed-forward layers have biases"),
    "sliding_window": harmless_at(reason="of Mistral; transformers' Llama keeps it for its cache only"),
}
MISTRAL_FIELDS: Fields = {
    **_COMMON,
    **_ROTARY,
    "sliding_window": used("how far attention reaches back"),
    "attention_bias": harmless_at(False, reason="of Llama; transformers' Mistral has no biases"),
    "mlp_bias": harmless_at(False, reason="of Llama; transformers' Mistral has no biases"),
}
BLOOM_FIELDS: Fields = {
    **_COMMON,
    "n_embed": used("shape; another name of hidden_size"),
    "n_layer": used("number of layers"),
    "num_hidden_layers": used("number of layers; another name of n_layer"),
    "n_head": used("shape of attention"),
    "num_attention_heads": used("shape of attention; another name of n_head"),
    "layer_norm_epsilon": used("every norm"),
    "apply_residual_connection_post_layernorm": used("where the residual is taken"),
    "seq_length": used("the context"),
    "slow_but_exact": harmless("order of a sum"),
    "offset_alibi": harmless("of Megatron; transformers' BLOOM counts positions itself"),
    "attention_softmax_in_fp32": harmless("the softmax is always in float32"),
    "bias_dropout_fusion": harmless(_SPEED),
    "masked_softmax_fusion": harmless(_SPEED),
    "skip_bias_add": harmless(_SPEED),
    "skip_bias_add_qkv": harmless(_SPEED),
    "n_inner": KnownField(
        "width of the feed-forward layers, of which transformers' BLOOM knows one",
        accepts=lambda value, config: value == 4 * (config.get("hidden_size") or config.get("n_embed") or 0),
        values="4 times hidden_size",
    ),
    "max_position_embeddings": harmless("ALiBi has no table of positions; seq_length gives the context"),
    "layer_types": harmless_at([], reason="layers that differ from each other"),
    "sliding_window": harmless_at(reason="attention that does not reach back to the start"),
    "head_dim": KnownField(
        "width of heads, of which transformers' BLOOM knows one",
        accepts=lambda value, config: (
            value * (config.get("n_head") or config.get("num_attention_heads") or 0)
            == (config.get("hidden_size") or config.get("n_embed"))
        ),
        values="hidden_size divided by the heads",
    ),
}


def known_fields(table: Mapping[str, KnownField], config: Document) -> Fields:
    """A family's table, with what counts only elsewhere: settings of generation, and trainers' own names."""
    leftovers = {name: harmless(_LEFTOVER) for name in config if name.startswith(LEFTOVER_PREFIXES)}
    elsewhere = "a setting of generation: taken where there is no generation_config.json"
    return {**leftovers, **{name: harmless(elsewhere) for name in GENERATION_FIELDS}, **table}
