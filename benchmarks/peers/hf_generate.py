"""Greedy generation by transformers' `generate`, which optimum-intel's models have too."""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from worker import Trace


class TokenStreamer(BaseStreamer):
    """Notes each token as it comes; the first thing that comes is the prompt."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_came:
            self.trace.add(int(value))
        self.prompt_came = True

    def end(self) -> None:
        pass


def generate(model: Any, token_ids: list[int], count: int, trace: Trace) -> None:
    ids = torch.tensor([token_ids])
    options = {"do_sample": False, "repetition_penalty": 1.0, "min_new_tokens": count, "max_new_tokens": count}
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, pad_token_id=0, streamer=TokenStreamer(trace), **options)
