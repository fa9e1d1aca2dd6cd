"""optimum-intel's OVModelForCausalLM on an OpenVINO artifact, with its defaults or with properties of the CPU plugin.

python run_optimum_intel.py ARTIFACT [INFERENCE_PRECISION_HINT=f32 ...]
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from hf_generate import generate
from optimum.intel import OVModelForCausalLM
from worker import Settings, Trace, serve


class OptimumRunner:
    """A model as optimum-intel loads it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.model = OVModelForCausalLM.from_pretrained(folder, ov_config=dict(settings))

    def describe(self) -> Settings:
        packages = ("optimum-intel", "openvino", "transformers", "torch")
        return {"library": ", ".join(f"{name} {version(name)}" for name in packages), **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        generate(self.model, token_ids, count, trace)


if __name__ == "__main__":
    serve(OptimumRunner)
