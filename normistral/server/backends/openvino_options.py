"""Our options in openvino_genai's words, and the refusal of what it would do otherwise.

Read in the sources of version 2026.4.1 (`LogitProcessor`, `Sampler`). As in `runtime/sampling.py` are: the repetition
penalty (prompt included, each token once), top_k, temperature, and what top_p and min_p leave, which does not depend on
their order. Log-probabilities are of the model's bare distribution. Random numbers are others (mt19937, seeded per
request), so a seed gives another text than the library's; and the same one again only as far as other requests leave
the last bits of its logits alone, which is no promise (docs/serving.md).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from typing import Any

import numpy as np

from normistral.runtime.options import GenerationConfig

_SEED_BITS = 32  # mt19937 takes no more
# Logits are float32 of magnitude 10 to 30, with steps of about 2e-6: below this, the most likely token is all there is,
# and openvino_genai, which divides in float32, would come to infinity.
_GREEDY_BELOW = 1e-6
_SINGLE_TOKEN_P = 1e-6  # below it, top_p is reached by the first token of any vocabulary


def find_unhonoured(config: GenerationConfig) -> str | None:
    """What of these options openvino_genai cannot do as the library does it; None if it honours all."""
    if config.structure is not None:
        return "structured output: openvino_genai has another grammar library, which takes and writes other forms"
    if config.logprobs is not None and config.logprobs > 0:
        return f"logprobs={config.logprobs}: openvino_genai tells the log-probability of the chosen token alone"
    if config.logprobs is not None and config.max_reasoning_tokens is not None:
        return "logprobs with max_reasoning_tokens: openvino_genai tells none for a closing tag that is put in"
    return None


def genai_config(config: GenerationConfig, room: int, stop_token_ids: Collection[int], part: int) -> Any:
    """An `openvino_genai.GenerationConfig`.

    Args:
        room: most tokens to generate.
        stop_token_ids: the model's own ends; stop texts are found in our text.
        part: 0 for a whole answer; an answer that is put together from several draws other numbers in each.
    """
    import openvino_genai

    wanted = openvino_genai.GenerationConfig()
    wanted.apply_chat_template = False
    wanted.max_new_tokens = room
    wanted.ignore_eos = config.ignore_eos or not stop_token_ids
    wanted.stop_token_ids = set(stop_token_ids)
    if stop_token_ids:  # without one, the pipeline puts in its own
        wanted.set_eos_token_id(min(stop_token_ids))
    wanted.repetition_penalty = config.repetition_penalty
    wanted.logprobs = 1  # 0 would leave nothing to tell logits that are not finite by
    # Both are rounded to float32 there, where 5e-324 is 0 and 1 - 1e-9 is 1; either leaves the most likely token alone.
    top_p, min_p = np.float32(config.top_p), np.float32(config.min_p)
    wanted.do_sample = config.temperature >= _GREEDY_BELOW and top_p >= _SINGLE_TOKEN_P and min_p < 1.0
    if wanted.do_sample:
        wanted.temperature = config.temperature
        wanted.top_p = float(top_p)
        wanted.min_p = float(min_p)
        if config.top_k:  # its own default is all, and 0 is none
            wanted.top_k = config.top_k
        wanted.rng_seed = _seed(config.seed, part)
    return wanted


def _seed(seed: int | None, part: int) -> int:
    if seed is None:
        return secrets.randbits(_SEED_BITS)
    return (seed ^ seed >> _SEED_BITS) + part & (1 << _SEED_BITS) - 1
