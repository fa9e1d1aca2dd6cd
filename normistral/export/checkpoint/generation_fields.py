"""The fields of generation_config.json: used, or without effect on the tokens of one answer and why.

Collected from GenerationConfig of transformers 4.57 and 5. What bounds an answer is not refused: here an answer
ends at max_new_tokens or where the context does.
"""

from __future__ import annotations

from normistral.export.checkpoint.known_fields import KnownField, harmless, harmless_at, used

_LENGTH = "bounds an answer's length; here max_new_tokens and the context do"
_OUTPUT = "chooses what a call returns beside the tokens"
_SPEED = "chooses how the same is computed, not what"
_BEAMS = "of beam search, which is not in force with one beam"
_DRAFTS = "of speculative decoding, which gives the same tokens"

GENERATION_FIELDS: dict[str, KnownField] = {
    "bos_token_id": used("first token of a text"),
    "eos_token_id": used("one of the tokens that end an answer"),
    "pad_token_id": used("written into generation_config.json"),
    "do_sample": used("whether the settings of sampling count"),
    "sample": used("do_sample, as NorMistral writes it"),
    "temperature": used("sampling"),
    "top_k": used("sampling"),
    "top_p": used("sampling"),
    "min_p": used("sampling"),
    "repetition_penalty": used("sampling"),
    "max_new_tokens": used("longest answer"),
    "max_length": harmless(_LENGTH),
    "max_time": harmless(_LENGTH),
    "transformers_version": harmless("who wrote the file"),
    "_from_model_config": harmless("who wrote the file"),
    "_commit_hash": harmless("who wrote the file"),
    "decoder_start_token_id": harmless("of models with an encoder"),
    "encoder_no_repeat_ngram_size": harmless("of models with an encoder"),
    "encoder_repetition_penalty": harmless_at(1.0, reason="changes how probable the prompt's tokens are"),
    "num_return_sequences": harmless("how many answers a call returns"),
    **{
        name: harmless(_OUTPUT)
        for name in (
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "output_logits",
            "return_dict_in_generate",
            "return_legacy_cache",
        )
    },
    **{
        name: harmless(_SPEED)
        for name in (
            "use_cache",
            "prefill_chunk_size",
            "compile_config",
            "disable_compile",
            "low_memory",
            "continuous_batching_config",
            "max_cache_len",
        )
    },
    **{
        name: harmless(_DRAFTS)
        for name in (
            "is_assistant",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
            "target_lookbehind",
            "prompt_lookup_num_tokens",
            "max_matching_ngram_size",
            "speculation_type",
            "use_mtp",
        )
    },
    **{name: harmless(_BEAMS) for name in ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")},
    "num_beams": harmless_at(1, reason="beam search"),
    "constraints": harmless_at(reason="beam search with constraints"),
    "force_words_ids": harmless_at(reason="beam search with constraints"),
    "penalty_alpha": harmless_at(0.0, reason="contrastive search"),
    "dola_layers": harmless_at(reason="decoding by contrast of layers"),
    "typical_p": harmless_at(1.0, reason="sampling of typical tokens"),
    "top_h": harmless_at(reason="sampling bounded by entropy"),
    "epsilon_cutoff": harmless_at(0.0, reason="sampling without improbable tokens"),
    "eta_cutoff": harmless_at(0.0, reason="sampling without improbable tokens"),
    "no_repeat_ngram_size": harmless_at(0, reason="sequences that may come once only"),
    "bad_words_ids": harmless_at([], reason="sequences that may not come"),
    "sequence_bias": harmless_at({}, [], reason="changes how probable sequences are"),
    "suppress_tokens": harmless_at([], reason="tokens that may not come"),
    "begin_suppress_tokens": harmless_at([], reason="tokens that may not come first"),
    "forced_bos_token_id": harmless_at(reason="an answer's first token"),
    "forced_eos_token_id": harmless_at(reason="an answer's last token"),
    "min_length": harmless_at(0, reason="the end may not come before"),
    "min_new_tokens": harmless_at(0, reason="the end may not come before"),
    "exponential_decay_length_penalty": harmless_at(reason="makes the end more probable"),
    "guidance_scale": harmless_at(1.0, reason="guidance by a second prompt"),
    "watermarking_config": harmless_at(reason="changes how probable tokens are"),
    "stop_strings": harmless_at([], reason="texts that end an answer"),
    "token_healing": harmless_at(False, reason="takes the prompt's last token back"),
    "renormalize_logits": harmless("a sum that changes no choice"),
    "remove_invalid_values": harmless("of logits that are not numbers, which the proof refuses"),
    "cache_implementation": KnownField(
        "how keys and values are kept",
        accepts=lambda value, _: value != "quantized",
        values='all but "quantized", which rounds them',
    ),
    "cache_config": harmless("of cache_implementation"),
    "trust_remote_code": harmless("code in the checkpoint is never run"),
}
