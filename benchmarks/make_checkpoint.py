"""Make a random-weight checkpoint at the exact shape of a NORA.LLM model, for measuring memory and speed.

The weights are noise: the text it writes means nothing, and no quality figure may come from it. Speed and memory
do not depend on the values.

    python benchmarks/make_checkpoint.py OUTPUT [--shape 7b|norbloom|11b] [--layers N] [--tokenizer FOLDER]

    shape      checkpoint                   written as         disk at all layers             memory
    7b         normistral-7b-warm-instruct  safetensors        14.5 GB                        1.8 GiB
    norbloom   norbloom-7b-scratch          pytorch_model.bin  13.4 GB, 26.9 while it writes  0.3 GiB
    11b        normistral-11b-warm          safetensors        22.9 GB                        2.2 GiB

Safetensors are written one shard at a time. A .bin is one file with every tensor in it, so its tensors lie in scratch
files in OUTPUT until it is saved: that takes the disk a second time, and page cache instead of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS_PER_SHARD = 4
CHATML = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|> ' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"
)

Shapes = dict[str, tuple[int, ...]]  # tensor name -> [out, in], or [width] of a norm or bias


@dataclass(frozen=True, slots=True)
class MistralShape:
    """A MistralForCausalLM (its config.json). Heads times `head_dim` need not be `hidden`."""

    layers: int
    hidden: int
    vocabulary: int
    positions: int
    sliding_window: int | None
    rope_theta: float
    pad: int
    chat: bool = False
    feed_forward: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def config(self, layers: int) -> dict[str, Any]:
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "sliding_window": self.sliding_window,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": self.pad,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }

    def layer(self, layer: int) -> Shapes:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: Shapes = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.feed_forward, self.hidden),
            "mlp.up_proj": (self.feed_forward, self.hidden),
            "mlp.down_proj": (self.hidden, self.feed_forward),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}

    def outer(self) -> Shapes:
        matrix = (self.vocabulary, self.hidden)
        return {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "model.norm.weight": (self.hidden,)}


@dataclass(frozen=True, slots=True)
class BloomShape:
    """A headless BloomModel (its config.json), and the output matrix of its own that its file size speaks for."""

    layers: int
    hidden: int
    vocabulary: int
    heads: int
    pad: int
    chat: bool = False

    def config(self, layers: int) -> dict[str, Any]:
        return {
            "architectures": ["BloomModel"],
            "model_type": "bloom",
            "hidden_size": self.hidden,
            "n_layer": layers,
            "n_head": self.heads,
            "vocab_size": self.vocabulary,
            "layer_norm_epsilon": 1e-05,
            "apply_residual_connection_post_layernorm": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": self.pad,
        }

    def layer(self, layer: int) -> Shapes:
        shapes: Shapes = {
            "self_attention.query_key_value": (3 * self.hidden, self.hidden),
            "self_attention.dense": (self.hidden, self.hidden),
            "mlp.dense_h_to_4h": (4 * self.hidden, self.hidden),
            "mlp.dense_4h_to_h": (self.hidden, 4 * self.hidden),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return with_biases({f"h.{layer}.{name}": shape for name, shape in shapes.items()})

    def outer(self) -> Shapes:
        matrix, norm = (self.vocabulary, self.hidden), (self.hidden,)
        norms = with_biases({"word_embeddings_layernorm": norm, "ln_f": norm})
        return {"word_embeddings.weight": matrix, "lm_head.weight": matrix, **norms}


def with_biases(shapes: Shapes) -> Shapes:
    """Weights of these shapes, and a bias as long as each one's output."""
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}


Shape = MistralShape | BloomShape
SHAPES: dict[str, Shape] = {
    "7b": MistralShape(
        layers=32, hidden=4096, vocabulary=32768, positions=4096, sliding_window=4096, rope_theta=1e4, pad=2, chat=True
    ),
    "norbloom": BloomShape(layers=32, hidden=4096, vocabulary=32768, heads=32, pad=0),
    "11b": MistralShape(
        layers=40, hidden=5120, vocabulary=51200, positions=1024000, sliding_window=None, rope_theta=1e6, pad=3
    ),
}


def random_tensors(shapes: Shapes, noise: torch.Generator, scratch: Path | None = None) -> dict[str, torch.Tensor]:
    """Matrices and biases are normal(0, 0.02), the weights of norms are 1; in memory, or in files in `scratch`."""
    tensors = {}
    for name, shape in shapes.items():
        if scratch is None:
            tensor = torch.empty(shape, dtype=torch.bfloat16)
        else:
            flat = torch.from_file(str(scratch / name), shared=True, size=math.prod(shape), dtype=torch.bfloat16)
            tensor = flat.view(shape)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        tensors[name] = tensor.fill_(1.0) if is_norm else tensor.normal_(0.0, 0.02, generator=noise)
    return tensors


def write_safetensors(folder: Path, shape: Shape, layers: int, noise: torch.Generator) -> None:
    """Shards of four layers, one of what is outside of them, and their index."""
    starts = range(0, layers, LAYERS_PER_SHARD)
    groups = [[shape.layer(i) for i in range(start, min(start + LAYERS_PER_SHARD, layers))] for start in starts]
    groups.append([shape.outer()])
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = random_tensors({key: size for shapes in group for key, size in shapes.items()}, noise)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{name}: {len(tensors)} tensors", flush=True)
        del tensors  # before the next shard is made
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_torch_file(folder: Path, shape: Shape, layers: int, noise: torch.Generator) -> None:
    """One pytorch_model.bin. Every tensor has a scratch file of its own, because torch.save keeps storages whole."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="scratch-") as scratch:
        tensors = random_tensors(shape.outer(), noise, Path(scratch))
        for layer in range(layers):
            tensors |= random_tensors(shape.layer(layer), noise, Path(scratch))
        torch.save(tensors, folder / "pytorch_model.bin")
        print(f"pytorch_model.bin: {len(tensors)} tensors", flush=True)


def write_configs(folder: Path, shape: Shape, layers: int) -> None:
    (folder / "config.json").write_text(json.dumps(shape.config(layers), indent=2))
    generation: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    generation |= {"max_new_tokens": 1024, "sample": True} if shape.chat else {"pad_token_id": shape.pad}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """A byte-level tokenizer of the model's vocabulary size: specials, 256 bytes, fillers that no text makes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", *(["<|im_start|>", "<|im_end|>"] if shape.chat else ["<pad>"])]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<filler_{i}>" for i in range(shape.vocabulary - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>" if shape.chat else "</s>",
        pad_token=words[shape.pad],
        unk_token="<unk>",
    )
    if shape.chat:
        fast.chat_template = CHATML
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="default: all of the model's")
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer files of this folder instead of making one")
    arguments = parser.parse_args()
    folder, shape = arguments.output, SHAPES[arguments.shape]
    layers = shape.layers if arguments.layers is None else arguments.layers
    folder.mkdir(parents=True)
    write_weights = write_torch_file if isinstance(shape, BloomShape) else write_safetensors
    write_weights(folder, shape, layers, torch.Generator().manual_seed(0))
    write_configs(folder, shape, layers)
    if arguments.tokenizer is None:
        write_tokenizer(folder, shape)
    else:
        for file in arguments.tokenizer.glob("*token*"):
            shutil.copy2(file, folder / file.name)


if __name__ == "__main__":
    main()
