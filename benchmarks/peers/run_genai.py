"""onnxruntime-genai on an ONNX artifact, with its defaults or with its threads set.

python run_genai.py ARTIFACT [threads=2]
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime_genai as og
from serve import Settings, serve

CONTEXT = 1024  # tokens; its KV cache is allocated for max_length at once


class GenaiRunner:
    """Greedy generation by its Generator, as its own examples do it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = {"threads": "default"} | settings
        config = og.Config(str(folder))
        if "threads" in settings:
            options = {"intra_op_num_threads": int(settings["threads"])}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def describe(self) -> Settings:
        return {"library": f"onnxruntime-genai {og.__version__}", **self.settings}

    def prefill(self, token_ids: list[int]) -> None:
        self.generator = None  # frees the old cache first
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, min_length=CONTEXT, max_length=CONTEXT)
        self.generator = og.Generator(self.model, parameters)
        self.generator.append_tokens(token_ids)
        self.generator.generate_next_token()  # only picks the token; the next call computes

    def decode_step(self) -> None:
        self.generator.generate_next_token()


if __name__ == "__main__":
    serve(GenaiRunner)
