"""openvino-genai's LLMPipeline on an OpenVINO artifact, with its defaults or with properties of the CPU plugin.

python run_openvino_genai.py ARTIFACT [INFERENCE_PRECISION_HINT=f32 ...] [ATTENTION_BACKEND=SDPA]

Its default on CPUs is paged attention with a prefix cache, so no prompt may come twice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai
from worker import Settings, Trace, serve


class TokenStreamer(openvino_genai.StreamerBase):
    """Notes each token as it comes."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for token_id in token if isinstance(token, list) else [token]:
            self.trace.add(token_id)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class PipelineRunner:
    """Greedy generation from token ids."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **settings)

    def describe(self) -> Settings:
        return {"library": f"openvino-genai {openvino_genai.__version__}", **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        self.pipeline.generate(ov.Tensor(np.array([token_ids], np.int64)), config, TokenStreamer(trace))


if __name__ == "__main__":
    serve(PipelineRunner)
