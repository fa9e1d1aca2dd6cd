"""transformers on a checkpoint.

python run_transformers.py CHECKPOINT dtype=bfloat16|float32 [threads=2]
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from hf_generate import generate
from worker import Settings, Trace, serve


class TransformersRunner:
    """A model with transformers' own choice of attention."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        if "threads" in settings:
            torch.set_num_threads(int(settings["threads"]))
        dtype = getattr(torch, settings["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        attention = self.model.config._attn_implementation
        self.settings = {"dtype": settings["dtype"], "threads": str(torch.get_num_threads()), "attention": attention}

    def describe(self) -> Settings:
        return {"library": f"transformers {transformers.__version__}, torch {torch.__version__}", **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        generate(self.model, token_ids, count, trace)


if __name__ == "__main__":
    serve(TransformersRunner)
