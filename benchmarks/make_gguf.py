"""Turn a Llama or Mistral checkpoint into GGUF for llama.cpp, so that both sides of a comparison run the same model.

    python benchmarks/make_gguf.py convert CHECKPOINT OUTPUT.gguf [--dtype f16|f32]     needs normistral[export]
    python benchmarks/make_gguf.py quantise INPUT.gguf OUTPUT.gguf [--type Q4_K_M]      needs llama-cpp-python

and, to prove the conversion on a small checkpoint, each in the same environments:

    python benchmarks/make_gguf.py reference CHECKPOINT OUTPUT.npz
    python benchmarks/make_gguf.py compare INPUT.npz FILE.gguf

It carries no vocabulary (llama.cpp's tokenizer "none"): benchmarks feed token ids. A sliding window is not carried
either, so a comparison is fair only up to the window. Names and the order of the rotary pairs are those of llama.cpp's
convert_hf_to_gguf.py (LlamaModel).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
COMPARED_TOKENS = 32


def convert(checkpoint: Path, output: Path, dtype: str) -> None:
    """Write float weights, one tensor in memory at a time; norms stay float32."""
    import gguf

    from normistral.export.checkpoint.families import find_family
    from normistral.export.checkpoint.files import read_json
    from normistral.export.checkpoint.tensor import WeightReader
    from normistral.export.checkpoint.weights import find_weight_files, read_tensors, with_prefix

    config = read_json(checkpoint / "config.json")
    family = find_family(config)
    architecture = family.architecture(config)
    reader = WeightReader(with_prefix(read_tensors(find_weight_files(checkpoint)), family))
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    matrix_type = np.dtype(np.float16 if dtype == "f16" else np.float32)
    names = list(tensor_names(config["num_hidden_layers"], tied="lm_head.weight" not in reader))
    stored = {
        target: matrix_type if len(reader.shape(source)) > 1 else np.dtype(np.float32) for target, source in names
    }
    for target, source in names:
        shape = reader.shape(source)
        writer.add_tensor_info(target, shape, stored[target], int(np.prod(shape)) * stored[target].itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for target, source in names:
        values = reader.read(source)
        kind = target.split(".")[-2]
        if kind in heads:
            values = pair_neighbours(values, heads[kind])
        writer.write_tensor_data(np.ascontiguousarray(values, stored[target]))
    writer.close()


def tensor_names(layers: int, *, tied: bool) -> Iterator[tuple[str, str]]:
    """GGUF's name and the checkpoint's."""
    yield "token_embd.weight", "model.embed_tokens.weight"
    for layer in range(layers):
        for target, source in {**NORMS, **MATRICES}.items():
            yield f"blk.{layer}.{target}.weight", f"model.layers.{layer}.{source}.weight"
    yield "output_norm.weight", "model.norm.weight"
    if not tied:
        yield "output.weight", "lm_head.weight"


def pair_neighbours(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows [heads · head_dim, in] reordered: transformers rotates (i, i + head_dim/2), llama.cpp (2i, 2i + 1)."""
    halves = matrix.reshape(heads, 2, -1, matrix.shape[1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)


def quantise(source: Path, output: Path, kind: str) -> None:
    """llama.cpp's own quantiser, without an importance matrix."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = os.cpu_count()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(parameters))
    if code:
        sys.exit(f"error: llama.cpp could not quantise {source} (code {code})")


def reference(checkpoint: Path, output: Path) -> None:
    """Logits [tokens, vocabulary] of random tokens by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, COMPARED_TOKENS)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.savez(output, ids=ids, logits=logits)


def compare(expected: Path, file: Path) -> None:
    """Largest difference of a logit between `reference` and llama.cpp."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from run_llama_cpp import LlamaRunner

    with np.load(expected) as saved:
        ids, logits = saved["ids"].tolist(), saved["logits"]
    runner = LlamaRunner(file, {"threads": "1", "flash_attention": "off"})
    found = np.stack([runner.logits([token]).copy() for token in ids])  # one by one: the cache is compared too
    figures = {
        "file": file.name,
        "max_difference": float(np.abs(found - logits).max()),
        "spread_of_logits": float(logits.max() - logits.min()),
        "same_top_token": float((found.argmax(-1) == logits.argmax(-1)).mean()),
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("convert", "quantise", "reference", "compare"))
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=("f16", "f32"), default="f16")
    parser.add_argument("--type", default="Q4_K_M", help="Q4_K_M, Q4_0, Q8_0 ...: llama.cpp's name")
    arguments = parser.parse_args()
    if arguments.command == "convert":
        convert(arguments.source, arguments.output, arguments.dtype)
    elif arguments.command == "quantise":
        quantise(arguments.source, arguments.output, arguments.type)
    elif arguments.command == "reference":
        reference(arguments.source, arguments.output)
    else:
        compare(arguments.source, arguments.output)


if __name__ == "__main__":
    main()
