"""Make a random-weight checkpoint at NorMistral-7B's exact shape, for measuring memory and speed.

The weights are noise: the text it writes means nothing, and no quality figure may come from it. Speed and memory
do not depend on the values. It is written one shard at a time, so it needs about 2 GiB of memory and, at the
full 32 layers, 14.5 GB of disk.

    python benchmarks/make_checkpoint.py OUTPUT [--layers 32] [--tokenizer FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

# Shape of norallm/normistral-7b-warm-instruct (its config.json).
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 32768
LAYERS_PER_SHARD = 4
CHATML = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|> ' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"
)


def config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def layer_tensors(layer: int, noise: torch.Generator) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}"
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
        "mlp.up_proj": (FEED_FORWARD, HIDDEN),
        "mlp.down_proj": (HIDDEN, FEED_FORWARD),
    }
    tensors = {f"{prefix}.{name}.weight": random_weight(shape, noise) for name, shape in shapes.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    return tensors


def random_weight(shape: tuple[int, int], noise: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=noise)


def write_checkpoint(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    noise = torch.Generator().manual_seed(0)
    groups = [range(start, min(start + LAYERS_PER_SHARD, layers)) for start in range(0, layers, LAYERS_PER_SHARD)]
    names = [f"model-{i + 1:05d}-of-{len(groups) + 1:05d}.safetensors" for i in range(len(groups) + 1)]
    weight_map: dict[str, str] = {}
    total = 0
    for name, group in zip(names, [*groups, None], strict=True):
        if group is None:
            tensors = {
                "model.embed_tokens.weight": random_weight((VOCABULARY, HIDDEN), noise),
                "lm_head.weight": random_weight((VOCABULARY, HIDDEN), noise),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        else:
            tensors = {key: value for layer in group for key, value in layer_tensors(layer, noise).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        print(f"{name}: {len(tensors)} tensors", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 1024, "sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of NorMistral's vocabulary size: 256 bytes, 5 specials, fillers that no text makes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *alphabet]
    words += [f"<filler_{i}>" for i in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:5]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer", type=Path, help="copy the tokenizer files of this folder instead of making one")
    arguments = parser.parse_args()
    write_checkpoint(arguments.output, arguments.layers)
    if arguments.tokenizer is None:
        write_tokenizer(arguments.output)
    else:
        for file in arguments.tokenizer.glob("*token*"):
            shutil.copy2(file, arguments.output / file.name)


if __name__ == "__main__":
    main()
