"""The same weights for every library: one checkpoint, made or unpacked once, and what each library reads of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from normistral.artifact.manifest import read_manifest
from normistral.evaluation.bench.configuration import Configuration
from normistral.export.checkpoint.locate import locate
from normistral.progress import NoProgress

BENCHMARKS = Path(__file__).parents[1]
SHAPES = ("demo", "half", "7b", "tiny")
TINY = {"hidden": 256, "feed_forward": 512, "heads": 4, "kv_heads": 2, "head_dim": 64, "positions": 4096}


class Models:
    """Files of one shape in a folder; what is missing is made when it is asked for.

    Attributes:
        llama_python: interpreter with llama-cpp-python, whose quantiser makes the GGUF files.
    """

    def __init__(self, shape: str, folder: Path, llama_python: Path | None) -> None:
        self.shape, self.folder, self.llama_python = shape, folder.resolve(), llama_python
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
        config = json.loads((self.path("checkpoint") / "config.json").read_text(encoding="utf-8"))
        return int(config["vocab_size"])

    def bytes_per_token(self, kind: str, dtype: str | None = None) -> int:
        """Bytes of weights that one decoded token reads: all but an input embedding that is not the output layer too,
        of which it reads one row. The KV cache is not counted.
        """
        config = json.loads((self.path("checkpoint") / "config.json").read_text(encoding="utf-8"))
        unread = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
        path = self.path(kind)
        if kind == "checkpoint":
            stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            element = 2 if dtype == "bfloat16" else 4
            return stored * element // (4 if config["torch_dtype"] == "float32" else 2) - unread * element
        if kind in ("openvino", "onnx"):
            return Configuration(kind, path, read_manifest(path)).weight_bytes_per_token
        import gguf

        tensors = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
        embedding = tensors["token_embd.weight"] if "output.weight" in tensors else 0
        return sum(tensors.values()) - embedding

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
        run(["-m", "normistral", "export", self.path("checkpoint"), output, "--format", format, "--no-verify"])

    def _convert(self, output: Path) -> None:
        run([BENCHMARKS / "make_gguf.py", "convert", self.path("checkpoint"), output])

    def _quantise(self, kind: str, output: Path) -> None:
        arguments = ["quantise", self.path("f16"), output, "--type", kind]
        run([BENCHMARKS / "make_gguf.py", *arguments], self.llama_python)


def unpack_demo(output: Path) -> None:
    """The preset's checkpoint, as transformers reads it."""
    from normistral.export.checkpoint.open import open_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        source = locate("demo", progress=NoProgress())
        checkpoint = open_checkpoint(source, Path(scratch), progress=NoProgress())
        shutil.copytree(checkpoint.folder, output)


def run(arguments: list[str | Path], python: Path | None = None) -> None:
    subprocess.run([python or sys.executable, *arguments], check=True)
