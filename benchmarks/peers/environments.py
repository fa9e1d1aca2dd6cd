"""One environment for each library: they pull at the same packages, and what one brings must not help another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DONE = ".installed"  # written last, so that an installation that was stopped is begun anew
LLAMA_CPP_FLAGS = {  # CMake's option: the processor's flag in /proc/cpuinfo
    "GGML_AVX": "avx",
    "GGML_AVX2": "avx2",
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
    "GGML_BMI2": "bmi2",
    "GGML_AVX_VNNI": "avx_vnni",
    "GGML_AVX512": "avx512bw",
    "GGML_AVX512_VBMI": "avx512vbmi",
    "GGML_AVX512_VNNI": "avx512_vnni",
    "GGML_AVX512_BF16": "avx512_bf16",
}


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip is asked for, in this order.

    Attributes:
        steps: lists of pip's arguments. torch comes alone, so that pip takes the build it is pointed to.
        cmake_options: of what is compiled here, for this processor; without the cache, which knows no such options.
    """

    steps: tuple[tuple[str, ...], ...]
    cmake_options: Callable[[], str] | None = None


def llama_cpp_options() -> str:
    """CMake options for exactly what this processor has, but AMX, with which llama.cpp crashes (2026-11-24)."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    given = [f"-D{option}={'ON' if flag in flags else 'OFF'}" for option, flag in LLAMA_CPP_FLAGS.items()]
    return " ".join(["-DGGML_NATIVE=OFF", *given])


def compile_from_source(package: str) -> tuple[str, ...]:
    name = package.partition("==")[0]
    return ("numpy", "--no-binary", name, "--no-cache-dir", package)


TORCH = ("torch==2.13.0",)
ENVIRONMENTS = {
    "llama.cpp": Environment((compile_from_source("llama-cpp-python==0.3.36"),), llama_cpp_options),
    "ik_llama.cpp": Environment((compile_from_source("ik-llama-cpp-python==0.1.5"),), lambda: "-DGGML_NATIVE=ON"),
    "openvino-genai": Environment((("numpy", "openvino-genai==2026.4.1.0"),)),
    "optimum-intel": Environment(
        (TORCH, ("optimum-intel==1.27.0", "openvino==2026.4.1", "nncf==3.4.0", "transformers==4.57.6"))
    ),
    "onnxruntime-genai": Environment((("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"),)),
    "transformers": Environment((TORCH, ("transformers==4.57.6", "accelerate"))),
    "normistral": Environment((("--editable", f"{ROOT}[onnx]"),)),
}


def install_all(folder: Path) -> None:
    """Make what is not there yet. llama.cpp and ik_llama.cpp are compiled for this processor: some minutes each.

    Raises:
        subprocess.CalledProcessError: pip failed; it said why.
    """
    for name, environment in ENVIRONMENTS.items():
        place = folder / name
        if (place / DONE).exists():
            continue
        print(f"installing {name} into {place}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        if environment.cmake_options is not None:
            variables["CMAKE_ARGS"] = environment.cmake_options()
        for step in environment.steps:
            pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", *step]
            subprocess.run(pip, check=True, env=variables)
        (place / DONE).touch()


def interpreter(folder: Path, name: str) -> Path:
    """Of an environment.

    Raises:
        SystemExit: it is not installed.
    """
    if not (folder / name / DONE).exists():
        sys.exit(f"error: {name} is not installed in {folder}\nhint: compare.py --install {folder}")
    return folder / name / "bin" / "python"
