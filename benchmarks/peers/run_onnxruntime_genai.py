"""onnxruntime-genai on an ONNX artifact, with its defaults or with its threads set.

python run_onnxruntime_genai.py ARTIFACT [threads=2] [context=1024]
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it has to be there before the import

import onnxruntime_genai as og
from worker import Settings, Trace, serve


class GenaiRunner:
    """Greedy generation by its Generator, as its own examples do it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = {"threads": "default", "context": "1024"} | settings
        config = og.Config(str(folder))
        if "threads" in settings:
            options = {"intra_op_num_threads": int(settings["threads"])}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)
        self.generator: og.Generator | None = None

    def describe(self) -> Settings:
        library = f"onnxruntime-genai {version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}"
        return {"library": library, **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        self.generator = None  # frees the old cache first
        length = int(self.settings["context"])  # its KV cache is allocated for all of it at once
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        self.generator = og.Generator(self.model, parameters)
        self.generator.append_tokens(token_ids)
        for _ in range(count):
            self.generator.generate_next_token()
            trace.add(self.generator.get_next_tokens()[0])


if __name__ == "__main__":
    serve(GenaiRunner)
