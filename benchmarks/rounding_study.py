"""Loss of quantized weights in exact arithmetic: dequantized to floats, run by transformers in float32.

    python benchmarks/rounding_study.py MODEL --text en=FILE --text nb=FILE --json OUT [--cache FOLDER] \\
        [--artifact NAME=FOLDER ...] [--gguf NAME=FILE ...] [--onnx NAME=FOLDER ...]

MODEL is the checkpoint that the artifacts and GGUF files were made from. The first 1,536 tokens of each text are run in
three windows; KL divergence from the checkpoint's own float32 logits, in nats. Weights are read by the dequantisers of
tests/, which share no code with the exporter; --artifact takes any IR of optimum-intel too. --onnx is for decoders that
others wrote and these cannot read: onnxruntime runs them, with its products of rounded weights in float32 (accuracy
level 1). Bits per weight: bytes of the weight file (GGUF: of all its tensors) by unique parameters; "inner" leaves out
embedding and output layer.

The demo model's weights lie on llama.cpp's Q4_1 grid (blocks of 32, float minimum): a format that can hold that grid
looks lossless here and proves nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.export.checkpoint.vocabulary import load_tokenizer
from normistral.export.reference.model import load_model
from normistral.progress import NoProgress

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

WINDOW_TOKENS = 512
WINDOWS = 3

Texts = Sequence[tuple[str, str]]  # language, file


Predict = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [tokens] → log-probabilities of what comes after each, float32 [tokens, vocabulary]."""


def predict_with(model: Any) -> Predict:
    """A transformers model."""

    def predict(window: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(window[None]).logits[0]
        return logits.log_softmax(-1)

    return predict


def compare(reference: torch.Tensor, predict: Predict, windows: torch.Tensor) -> dict[str, float]:
    """Figures of one text.

    Args:
        reference: log-probabilities [windows, tokens, vocabulary].
        windows: token ids [windows, tokens].
    """
    kl, same, loss = [], [], []
    for expected, window in zip(reference, windows, strict=True):
        found = predict(window)
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
    loaded = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in state}
    floats = [name for name, matrix in model.named_parameters() if matrix.dim() > 1 and matrix.data_ptr() not in loaded]
    if floats:  # else weights that this reader does not find would pass for lossless ones
        sys.exit(f"error: {folder.name} has no rounded weights for {', '.join(floats[:3])}")
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


def onnx_model(folder: Path, parameters: int) -> tuple[Predict, dict[str, float]]:
    """A decoder with a genai_config.json, on an empty KV cache."""
    import numpy as np
    import onnxruntime

    from normistral.runtime.engines.onnx_graph import OnnxGraph, set_accuracy_level

    graph = OnnxGraph((folder / "model.onnx").read_bytes())
    set_accuracy_level(graph, 1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(bytes(graph), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    nothing = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    empty = {name: nothing for name in names if name.startswith("past_key_values.")}

    def predict(window: torch.Tensor) -> torch.Tensor:
        ids = window[None].numpy()
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty
        if "position_ids" in names:
            inputs["position_ids"] = np.arange(len(window))[None]
        return torch.from_numpy(session.run(["logits"], inputs)[0][0]).log_softmax(-1)

    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return predict, {"bytes": size, "bits_per_weight": 8 * size / parameters}


def load_windows(folder: Path, texts: Texts, count: int = WINDOWS) -> dict[str, torch.Tensor]:
    """Token ids [count, tokens] of each text's beginning, as the checkpoint's tokenizer gives them."""
    tokenizer = load_tokenizer(folder)
    windows = {}
    for language, file in texts:
        ids = tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"][: count * WINDOW_TOKENS]
        windows[language] = torch.tensor(ids).view(count, WINDOW_TOKENS)
    return windows


def load_reference(
    checkpoint: Checkpoint, windows: dict[str, torch.Tensor], cache: Path | None
) -> dict[str, torch.Tensor]:
    """The checkpoint's log-probabilities [windows, tokens, vocabulary] of each text, mapped from `cache` if they are
    there; the caller sees to it that a cache has one checkpoint and one set of texts.
    """
    reference = {}
    for language, ids in windows.items():
        kept = None if cache is None else cache / f"{language}.pt"
        if kept is not None and kept.exists():
            reference[language] = torch.load(kept, mmap=True, weights_only=True)
            continue
        predict = predict_with(load_model(checkpoint, "float32"))
        reference[language] = torch.stack([predict(window) for window in ids])
        if kept is not None:
            torch.save(reference[language], kept)
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("text", "artifact", "gguf", "onnx"):
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
        windows = load_windows(checkpoint.folder, arguments.text)
        reference = load_reference(checkpoint, windows, arguments.cache)

        def measure(name: str, predict: Predict, size: dict[str, Any]) -> None:
            quality = {language: compare(reference[language], predict, windows[language]) for language in windows}
            results[name] = size | quality
            print(name, json.dumps(results[name]), flush=True)
            arguments.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        model = load_model(checkpoint, "float32")
        parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        if "float32" not in results:
            measure("float32", predict_with(model), {"bits_per_weight": 32.0})
        for name, folder in arguments.artifact:
            model, size = artifact_model(load_model(checkpoint, "float32"), Path(folder))
            measure(name, predict_with(model), size)
        for name, file in arguments.gguf:
            model, size = gguf_model(Path(file))
            measure(name, predict_with(model), size)
        for name, folder in arguments.onnx:
            measure(name, *onnx_model(Path(folder), parameters))


if __name__ == "__main__":
    main()
