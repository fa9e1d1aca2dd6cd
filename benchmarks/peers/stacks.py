"""The stacks that are compared: a library, the weights it runs, and its settings."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from environments import interpreter
from models import Models

from normistral import hardware

HERE = Path(__file__).parent
KV_BYTES = {  # of a value in the KV cache, by environment; scale and zero point of 128 values of 8 bits included
    "normistral": {"openvino": 1 + 8 / 128, "onnx": 4.0},
    "openvino-genai": {"openvino": 1 + 8 / 128},
    "optimum-intel": {"openvino": 1 + 8 / 128},
    "onnxruntime-genai": {"onnx": 4.0},
    "transformers": {"bfloat16": 2.0, "float32": 4.0},
}
GGUF_KV_BYTES = 2.0  # llama.cpp's and ik_llama.cpp's default is float16


@dataclass(frozen=True, slots=True)
class Stack:
    """One row of the comparison.

    Attributes:
        environment: a key of `environments.ENVIRONMENTS`.
        worker: the script that runs it.
        model: a kind of `Models.path`.
    """

    name: str
    environment: str
    worker: str
    model: str
    settings: dict[str, str] = field(default_factory=dict)

    def command(self, models: Models, environments: Path) -> list[str]:
        pairs = [f"{key}={value}" for key, value in self.settings.items()]
        python, model = interpreter(environments, self.environment), models.path(self.model)
        return [str(python), str(HERE / self.worker), str(model), *pairs]

    def bytes_per_token(self, models: Models) -> int:
        return models.bytes_per_token(self.model, self.settings.get("dtype"))

    def cache_bytes_per_token(self, models: Models) -> float:
        kinds = KV_BYTES.get(self.environment, {})
        element = kinds.get(self.settings.get("dtype", self.model), GGUF_KV_BYTES)
        return models.cache_elements_per_token() * element


def list_stacks(threads: int, context: int, given: dict[str, dict[str, str]]) -> list[Stack]:
    """All of them, in the order of a repeat.

    Args:
        context: tokens that a sequence may have, for libraries that allocate their KV cache at once.
        given: further settings of ours, by format ("openvino", "onnx").
    """
    plan = hardware.plan_openvino(hardware.read_machine(), "int4") | {"INFERENCE_NUM_THREADS": str(threads)}
    t, c = {"threads": str(threads)}, {"context": str(context)}
    stacks = [
        Stack("normistral OpenVINO", "normistral", "run_normistral.py", "openvino"),
        Stack("normistral ONNX", "normistral", "run_normistral.py", "onnx"),
    ]
    for format, settings in given.items():
        name = f"{stacks[format == 'onnx'].name}, given settings"
        stacks.append(Stack(name, "normistral", "run_normistral.py", format, settings))
    for kind in ("Q4_0", "Q4_K_M"):
        for attention in ("auto", "off"):
            name = f"llama.cpp {kind}" + (", no flash attention" if attention == "off" else "")
            settings = t | c | {"flash_attention": attention}
            stacks.append(Stack(name, "llama.cpp", "run_llama_cpp.py", kind, settings))
    for kind, repack in (("IQ4_KS", "off"), ("Q4_K_M", "on"), ("Q4_0", "on")):
        name = f"ik_llama.cpp {kind}" + (", repacked" if repack == "on" else "")
        stacks.append(Stack(name, "ik_llama.cpp", "run_ik_llama_cpp.py", kind, t | c | {"repack": repack}))
    for library, worker in (("openvino-genai", "run_openvino_genai.py"), ("optimum-intel", "run_optimum_intel.py")):
        stacks.append(Stack(f"{library}, defaults", library, worker, "openvino"))
        stacks.append(Stack(f"{library}, our settings", library, worker, "openvino", plan))
    sdpa = plan | {"ATTENTION_BACKEND": "SDPA"}
    stacks.append(
        Stack("openvino-genai, our settings, SDPA", "openvino-genai", "run_openvino_genai.py", "openvino", sdpa)
    )
    for name, settings in (("defaults", c), (f"{threads} threads", t | c)):
        stack = Stack(f"onnxruntime-genai, {name}", "onnxruntime-genai", "run_onnxruntime_genai.py", "onnx", settings)
        stacks.append(stack)
    for dtype in ("bfloat16", "float32"):
        settings = t | {"dtype": dtype}
        stacks.append(Stack(f"transformers {dtype}", "transformers", "run_transformers.py", "checkpoint", settings))
    return stacks


def describe_revision() -> str:
    """Of this checkout."""
    found = subprocess.run(
        ["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"
