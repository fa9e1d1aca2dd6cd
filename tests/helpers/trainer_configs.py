"""What training tools leave in config.json and generation_config.json beside the model's own fields.

Written after configs as unsloth, axolotl, TRL, PEFT, LLaMA-Factory, mergekit, torchtune, Megatron converters and
versions of transformers from 4.28 to 5 write them. None of these fields changes what the model computes: all have to be
exported without --ignore-field.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]
_LABELS: Fields = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
_OLD_GENERATION: Fields = {
    **{"max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1},
    **{"num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0},
    **{"bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False},
    **{"exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None},
}
_OLD_DEFAULTS: Fields = {
    **{"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False},
    **{"torch_dtype": "bfloat16", "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}},
    **{"chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False},
    **{"cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False},
    **{"finetuning_task": None, "tokenizer_class": None, "prefix": None, "sep_token_id": None},
    **{"decoder_start_token_id": None, "task_specific_params": None, "problem_type": None, **_LABELS},
}
# Name -> extra fields of config.json.
CONFIGS: dict[str, Fields] = {
    "unsloth": {"unsloth_version": "2024.12.4", "_name_or_path": "unsloth/mistral-7b-v0.3", "torch_dtype": "float16"},
    "unsloth fixed": {"unsloth_fixed": True, "unsloth_version": "2025.3.19", "model_max_length": 4096},
    "unsloth 5": {"unsloth_fixed": True, "unsloth_version": "2026.9.1", "dtype": "bfloat16", "torch_dtype": None},
    "axolotl": {"_name_or_path": "./outputs/out", "use_cache": False, "transformers_version": "4.46.3"},
    "axolotl, attention": {"_attn_implementation_autoset": True, "axolotl_version": "0.9.0", "use_cache": False},
    "trl sft": {"_name_or_path": "sft", "trl_version": "0.12", "neftune_noise_alpha": 5, "use_cache": False},
    "trl dpo": {"transformers_version": "4.45.0", "attention_dropout": 0.1, "gradient_checkpointing": False},
    "peft merged": {"peft_version": "0.13.2", "base_model_name_or_path": "base", "peft_type": "LORA"},
    "llama factory": {"_name_or_path": "saves/sft", "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1},
    "mergekit": {"_name_or_path": "a/b", "mergekit_version": "0.1", "torch_dtype": "bfloat16"},
    "tensor parallel": {"pretraining_tp": 2, "initializer_range": 0.006},
    "flash attention": {"use_flash_attn": True, "use_flash_attention_2": True, "_flash_attn_2_enabled": True},
    "attention chosen": {"attn_implementation": "flash_attention_2", "_attn_implementation": "sdpa"},
    "transformers.js": {"transformers.js_config": {"dtype": "q4", "use_external_data_format": True}},
    "transformers 4.28 defaults": _OLD_DEFAULTS,
    "transformers 4.28 generation": _OLD_GENERATION,
    "classifier leftovers": {**_LABELS, "num_labels": 2, "problem_type": "single_label_classification"},
    "labels of three": {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    "tokenizer's": {"model_max_length": 2048, "tokenizer_class": "LlamaTokenizer", "padding_side": "right"},
    "llava text part": {"tokenizer_padding_side": "right", "tokenizer_model_max_length": 4096, "unk_token_id": 0},
    "quantised nowhere": {"quantization_config": None, "load_in_8bit": False},
    "dropouts": {"hidden_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.0, "classifier_dropout": None},
    "no experts": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "partial of one": {"partial_rotary_factor": 1.0, "rope_interleaved": False},
    "granite's ones": {"embedding_multiplier": 1.0, "logits_scaling": 1, "residual_multiplier": 1.0},
    "gemma's nulls": {"final_logit_softcapping": None, "attn_logit_softcapping": None, "query_pre_attn_scalar": None},
    "qwen's": {"max_window_layers": 28, "layer_types": None, "qk_norm": False},
    "transformers 5": {
        **{"dtype": "float32", "output_hidden_states": False, "return_dict": True, "is_encoder_decoder": False},
        **{"chunk_size_feed_forward": 0, "per_layer_config": None, "problem_type": None, **_LABELS},
    },
    "rope in both forms": {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
    "rope of 4.43": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "biases nowhere": {"attention_bias": False, "mlp_bias": False},
    "wandb": {"wandb_project": "x", "train_config": {"lr": 1e-5}, "dataset": "d", "license": "apache-2.0"},
}
# Extra fields of generation_config.json.
GENERATION: dict[str, Fields] = {
    "made from the model's": {"_from_model_config": True, "transformers_version": "4.44.0"},
    "llama 2 chat": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096},
    "unsloth": {"max_length": 2048, "use_cache": True},
    "transformers 5": {"output_attentions": False, "output_hidden_states": False, "num_beams": 1, "min_length": 0},
    "drafts": {"num_assistant_tokens": 20, "assistant_confidence_threshold": 0.4, "prompt_lookup_num_tokens": 3},
    "all defaults": {name: value for name, value in _OLD_GENERATION.items() if value is not None},
}
