"""generation_config.json: its fields, and the sampling defaults that it gives.

Fields are collected from GenerationConfig of transformers 4.57 and 5: used, or without effect on the tokens of one
answer. Limits of an answer's length are not refused: here it ends at max_new_tokens or at the end of the context.
Values that loaders write for "off", and values that transformers accepts and this package does not, are translated. A
value without a meaning is left out with a note: it changes sampling defaults, which a caller may set, not the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from normistral.artifact.manifest import SamplingDefaults
from normistral.export.checkpoint.fields import KnownField, harmless, harmless_at, shorten, used

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


_TOP_K = 50  # what transformers takes where none is given
_LARGEST = 2**31 - 1


def read_sampling_defaults(generation: dict[str, Any], note: Callable[[str], None]) -> SamplingDefaults:
    """The authors' settings.

    Temperature and filters count when it says "do_sample": true, or "sample": true as NorMistral's does; transformers
    knows only the first, and then takes 1.0 and 50 for a temperature and a top_k that are not given. Otherwise decoding
    is greedy, and the penalty counts there too.

    Args:
        note: told, in one line, of each value that is translated or left out.
    """

    def read(name: str, kind: type[int] | type[float], low: float, high: float) -> Any:
        """A number in this range, whole ones also written like 50.0; None where there is none."""
        value = generation.get(name)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high or value != kind(value):
            wanted = f"a number from {low:g} to {high:g}" if kind is float else f"a whole number of at least {low}"
            note(f"generation_config.json: {name} is {shorten(value)}, not {wanted}: it is left out")
            return None
        return kind(value)

    def translate(name: str, meaning: str) -> None:
        note(f"generation_config.json: {name} is {shorten(generation[name])}, which means {meaning}")

    values: dict[str, Any] = {"max_new_tokens": read("max_new_tokens", int, 1, _LARGEST)}
    if generation.get("do_sample") is True or generation.get("sample") is True:
        temperature = read("temperature", float, 0.0, 100.0)
        values["temperature"] = 1.0 if temperature is None else temperature
        if generation.get("top_k") == -1:  # vLLM's way to say "all"
            translate("top_k", "all tokens, as in vLLM")
            values["top_k"] = 0
        else:
            top_k = read("top_k", int, 0, _LARGEST)
            values["top_k"] = _TOP_K if top_k is None else top_k
        values["min_p"] = read("min_p", float, 0.0, 1.0)
        top_p: Any = generation.get("top_p")
        if _is_number(top_p) and top_p == 0:
            translate("top_p", "the likeliest token alone (top_k 1), as in transformers")
            values["top_k"] = 1
        elif _is_number(top_p) and top_p > 1:
            translate("top_p", "no such filter, as in transformers")
        else:
            values["top_p"] = read("top_p", float, 1e-6, 1.0)
    penalty = read("repetition_penalty", float, 0.01, 100.0)
    if penalty != 1.0 or "temperature" in values:
        values["repetition_penalty"] = penalty
    return SamplingDefaults(**values)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
