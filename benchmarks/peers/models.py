"""The same weights for every library: one checkpoint, made or unpacked once, and what each library reads of it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from normistral.artifact.manifest import read_manifest
from normistral.evaluation.bench.configuration import Configuration
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.weights import find_weight_files, read_tensors
from normistral.progress import NoProgress

BENCHMARKS = Path(__file__).parents[1]
SHAPES = ("demo", "half", "7b", "tiny")
IK_TYPES = ("IQ4_KS", "IQ4_KSS", "IQ4_KT")  # GGUF types that only ik_llama.cpp has
TINY = {"hidden": 256, "feed_forward": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "positions": 4096}


class Models:
    """Files of one shape in a folder; what is missing is made when it is asked for.

    Attributes:
        quantisers: interpreters with llama-cpp-python ("llama.cpp") and ik-llama-cpp-python ("ik_llama.cpp"), whose
            quantisers make the GGUF files.
    """

    def __init__(self, shape: str, folder: Path, quantisers: Mapping[str, Path]) -> None:
        self.shape, self.folder, self.quantisers = shape, folder.resolve(), quantisers
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str) -> Path:
        """Of a kind: "checkpoint", "openvino", "onnx", or a GGUF type such as "Q4_0".

        Raises:
            subprocess.CalledProcessError: it could not be made; the tool said why.
        """
        if kind == "checkpoint":
            return self._made(self.folder / self.shape, self._make_checkpoint)
        if kind in ("openvino", "onnx"):
            return self._made(self.folder / f"{self.shape}-{kind}", lambda output: self._export(kind, output))
        if kind == "f16":
            return self._made(self.folder / f"{self.shape}-f16.gguf", self._convert)
        return self._made(self.folder / f"{self.shape}-{kind}.gguf", lambda output: self._quantise(kind, output))

    def vocabulary(self) -> int:
        return int(self._config()["vocab_size"])

    def bytes_per_token(self, kind: str, dtype: str | None = None) -> int:
        """Bytes of weights that one decoded token reads: all but an input embedding that is not the output layer too,
        of which it reads one row. The KV cache is not counted; of a GGUF file, an embedding is taken to have as many
        bits a weight as the whole file.
        """
        config = self._config()
        unread = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
        path = self.path(kind)
        if kind == "checkpoint":
            stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            element = 2 if dtype == "bfloat16" else 4
            return stored * element // (4 if config["torch_dtype"] == "float32" else 2) - unread * element
        if kind in ("openvino", "onnx"):
            return Configuration(kind, path, read_manifest(path)).weight_bytes_per_token
        embedded = config["vocab_size"] * config["hidden_size"]
        weights = sum(math.prod(shape) for shape in self._shapes())
        return int(path.stat().st_size * (1 - (unread and embedded / weights)))

    def cache_elements_per_token(self) -> int:
        """Values that the KV cache holds for a token."""
        config = self._config()
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.path("checkpoint") / "config.json").read_text(encoding="utf-8"))
        return config

    def _shapes(self) -> list[tuple[int, ...]]:
        tensors = read_tensors(find_weight_files(self.path("checkpoint")))
        return [tuple(tensor.shape) for tensor in tensors.values()]

    def _made(self, path: Path, make: Callable[[Path], None]) -> Path:
        if not path.exists():
            print(f"making {path}", flush=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix="unfinished-") as scratch:
                make(Path(scratch) / path.name)
                (Path(scratch) / path.name).rename(path)
        return path

    def _make_checkpoint(self, output: Path) -> None:
        if self.shape == "demo":
            unpack_demo(output)
        elif self.shape == "tiny":
            sys.path.insert(0, str(BENCHMARKS.parent / "tests" / "helpers"))
            from tiny_models import make_mistral

            make_mistral(output, **TINY)
        else:
            layers = ["--layers", "16"] if self.shape == "half" else []
            run([BENCHMARKS / "make_checkpoint.py", output, "--shape", "7b", *layers])

    def _export(self, format: str, output: Path) -> None:
        arguments = ["--format", format, "--recipe", "fast", "--no-verify"]  # values do not change the speed
        run(["-m", "normistral", "export", self.path("checkpoint"), output, *arguments])

    def _convert(self, output: Path) -> None:
        run([BENCHMARKS / "make_gguf.py", "convert", self.path("checkpoint"), output])

    def _quantise(self, kind: str, output: Path) -> None:
        if kind in IK_TYPES:
            run(
                ["-m", "ik_llama_cpp.quantize", "quantize", self.path("f16"), output, kind],
                self.quantisers["ik_llama.cpp"],
            )
        else:
            arguments = ["quantise", self.path("f16"), output, "--type", kind]
            run([BENCHMARKS / "make_gguf.py", *arguments], self.quantisers["llama.cpp"])


def unpack_demo(output: Path) -> None:
    """The preset's checkpoint, as transformers reads it."""
    from normistral.export.checkpoint.open import open_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        source = locate("demo", progress=NoProgress())
        checkpoint = open_checkpoint(source, Path(scratch), progress=NoProgress())
        shutil.copytree(checkpoint.folder, output)


def run(arguments: list[str | Path], python: Path | None = None) -> None:
    subprocess.run([python or sys.executable, *arguments], check=True)
