"""What rounding costs, as exact arithmetic: the rounded weights, as floats, in transformers float32.

    python benchmarks/rounding_study.py MODEL --text en=FILE --text nb=FILE --json OUT [--cache FOLDER] \\
        [--artifact NAME=FOLDER ...] [--gguf NAME=FILE ...]

MODEL is the checkpoint that the artifacts and GGUF files were made from. The first 1,536 tokens of each text are run in
three windows; KL divergence from the checkpoint's own float32 logits, in nats. Weights are read by the dequantisers of
tests/, which share no code with the exporter. Bits per weight: bytes of the weight file (GGUF: of all its tensors) by
unique parameters; "inner" leaves out embedding and output layer.

The demo model's weights lie on llama.cpp's Q4_1 grid (blocks of 32, float minimum): a format that can hold that grid
looks lossless here and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from normistral.export.checkpoint import open_checkpoint
from normistral.export.locate import locate
from normistral.export.progress import NoProgress
from normistral.export.reference import load_model
from normistral.export.tokenizer_ir import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

WINDOW_TOKENS = 512
WINDOWS = 3


def log_probabilities(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """[windows, tokens, vocabulary]"""
    with torch.inference_mode():
        return torch.stack([model(window[None]).logits[0].log_softmax(-1) for window in windows])


def compare(reference: torch.Tensor, model: Any, windows: torch.Tensor) -> dict[str, float]:
    kl, same, loss = [], [], []
    for expected, window in zip(reference, windows, strict=True):
        found = log_probabilities(model, window[None])[0]
        kl.append((expected.exp() * (expected - found)).sum(-1))
        same.append((expected.argmax(-1) == found.argmax(-1)).float())
        loss.append(-found[:-1].gather(1, window[1:, None]))
    every = torch.cat(kl)
    return {
        "kl_mean": every.mean().item(),
        "kl_median": every.median().item(),
        "kl_p99": every.quantile(0.99).item(),
        "top1": torch.cat(same).mean().item(),
        "perplexity": torch.cat(loss).mean().exp().item(),
    }


def artifact_model(model: Any, folder: Path) -> tuple[Any, dict[str, float]]:
    """`model` with an artifact's weights."""
    onnx = (folder / "model.onnx").exists()
    if onnx:
        import dequantise as reader
    else:
        import dequantise_ir as reader
    state = {name: torch.from_numpy(values) for name, values in reader.dequantised(folder).items()}
    model.load_state_dict(state, strict=False)
    size = (folder / ("model.onnx.data" if onnx else "openvino_model.bin")).stat().st_size
    unique = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    return model, {"bytes": size, "bits_per_weight": 8 * size / sum(unique.values())}


def gguf_model(file: Path) -> tuple[Any, dict[str, Any]]:
    """A GGUF file as transformers unpacks it."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tensors = gguf.GGUFReader(file).tensors
    inner = [tensor for tensor in tensors if tensor.name not in ("token_embd.weight", "output.weight")]
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)

    def bits(some: list[Any]) -> float:
        return 8 * sum(int(tensor.n_bytes) for tensor in some) / sum(int(tensor.n_elements) for tensor in some)

    size = {"bytes": sum(int(tensor.n_bytes) for tensor in tensors), "bits_per_weight": bits(tensors)}
    return model, size | {"bits_per_inner_weight": bits(inner), "types": types}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("text", "artifact", "gguf"):
        parser.add_argument(f"--{name}", action="append", default=[], type=lambda pair: pair.split("=", 1))
    parser.add_argument("--cache", type=Path, help="keeps the checkpoint's logits between runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(
            locate(arguments.model, progress=NoProgress()), Path(scratch), progress=NoProgress()
        )
        tokenizer = load_tokenizer(checkpoint.folder)
        windows, reference = {}, {}
        for language, file in arguments.text:
            ids = tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"][: WINDOWS * WINDOW_TOKENS]
            windows[language] = torch.tensor(ids).view(WINDOWS, WINDOW_TOKENS)
            kept = None if arguments.cache is None else arguments.cache / f"{language}.pt"
            if kept is None or not kept.exists():
                reference[language] = log_probabilities(load_model(checkpoint.folder, "float32"), windows[language])
                if kept is not None:
                    torch.save(reference[language], kept)
            else:
                reference[language] = torch.load(kept, mmap=True, weights_only=True)

        def measure(name: str, model: Any, size: dict[str, Any]) -> None:
            quality = {language: compare(reference[language], model, windows[language]) for language in windows}
            results[name] = size | quality
            print(name, json.dumps(results[name]), flush=True)
            arguments.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        if "float32" not in results:
            measure("float32", load_model(checkpoint.folder, "float32"), {"bits_per_weight": 32.0})
        for name, folder in arguments.artifact:
            measure(name, *artifact_model(load_model(checkpoint.folder, "float32"), Path(folder)))
        for name, file in arguments.gguf:
            measure(name, *gguf_model(Path(file)))


if __name__ == "__main__":
    main()
