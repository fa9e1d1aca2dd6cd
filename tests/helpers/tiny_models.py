"""Tiny random checkpoints with the family's quirks, written as the hub would serve them.

    make_mistral(tmp_path / "model", head_dim=24, sliding_window=16, shards=2)

Grouped KV heads, head_dim that is not hidden/heads, untied output, a byte-level tokenizer (ids 0 to 4 are special, 5
to 260 are the bytes), NorMistral's own chat template, and its files that disagree about the stop token: config.json
and special_tokens_map.json say `</s>` (2), tokenizer_config.json and generation_config.json say `<|im_end|>` (4).

`thinking=True` makes a model that reasons between <think> and </think>: those and the other tags of
normistral-11b-thinking's template are special tokens behind the bytes (ids 261 to 266), and its turns end with `</s>`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = len(SPECIALS) + 256
THINKING_SPECIALS = ("<think>", "</think>", "<system_prompt>", "</system_prompt>", "<instruction>", "</instruction>")
THINKING_VOCABULARY = VOCABULARY + len(THINKING_SPECIALS)
THINK, END_THINK = VOCABULARY, VOCABULARY + 1  # token ids
# Grouped KV heads, head_dim 32 where hidden/heads is 16, a window of 16 in 64 positions, untied output.
QUIRKS = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "sliding_window": 16, "positions": 64}
# tokenizer_config.json of norallm/normistral-7b-warm-instruct, word for word; note the blank after <|im_start|>.
TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}"
    "{{'<|im_start|> ' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\\n' }}{% endif %}"
)
# After normistral-11b-thinking; the model answers ` <think> {reasoning}</think> {answer}</s>`.
THINKING_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<system_prompt> ' + message['content'] + '</system_prompt>' }}"
    "{% elif message['role'] == 'user' %}{{ '<instruction> ' + message['content'] + '</instruction>' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def make_mistral(folder: Path, *, sliding_window: int | None = None, **options: Any) -> Path:
    """A random MistralForCausalLM; options are those of `make_checkpoint`."""
    extra = {"sliding_window": sliding_window}
    return make_checkpoint(folder, "mistral", "MistralForCausalLM", extra, **options)


def make_llama(folder: Path, **options: Any) -> Path:
    """A random LlamaForCausalLM; options are those of `make_checkpoint`."""
    extra = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    return make_checkpoint(folder, "llama", "LlamaForCausalLM", extra, **options)


def make_checkpoint(
    folder: Path,
    model_type: str,
    architecture: str,
    extra: dict[str, Any],
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 24,
    feed_forward: int = 128,
    vocab: int | None = None,
    tied: bool = False,
    dtype: str = "float32",
    shards: int = 1,
    safetensors: bool = True,
    positions: int = 64,
    seed: int = 0,
    chat: bool = True,
    adds_bos: bool = False,
    thinking: bool = False,
) -> Path:
    """Write a whole checkpoint folder and return it; parents are made. `vocab` None is no fillers."""
    folder.mkdir(parents=True)
    if vocab is None:
        vocab = THINKING_VOCABULARY if thinking else VOCABULARY
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": dtype,
        "use_cache": True,
        **extra,
    }
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(config, seed), shards=shards, safetensors=safetensors)
    write_tokenizer(folder, vocab, chat=chat, adds_bos=adds_bos, thinking=thinking)
    generation: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if chat:
        generation |= {
            "eos_token_id": 2 if thinking else 4,
            "sample": True,
            "temperature": 0.3,
            "top_k": 64,
            "top_p": 0.9,
        }
        generation |= {"repetition_penalty": 1.0, "max_new_tokens": 1024}
    write_json(folder / "generation_config.json", generation)
    return folder


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights scaled by 1/√fan-in, so that activations stay near 1 and logits differ visibly between tokens."""
    import torch

    noise = torch.Generator().manual_seed(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    dtype = getattr(torch, config["torch_dtype"])

    def weight(rows: int, columns: int, scale: float | None = None) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=noise) * (columns**-0.5 if scale is None else scale)
        return values.to(dtype)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden, scale=1.0)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        tensors[f"{prefix}.self_attn.q_proj.weight"] = weight(queries, hidden)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = weight(keys, hidden)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = weight(keys, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = weight(hidden, queries)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = weight(config["intermediate_size"], hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = weight(config["intermediate_size"], hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(hidden, config["intermediate_size"])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = 1.0 + 0.1 * torch.randn(hidden, generator=noise).to(dtype)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(vocab, hidden, scale=2 * hidden**-0.5)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int, safetensors: bool) -> None:
    """One file, or `shards` files and their index; safetensors, or pytorch_model.bin."""
    import torch
    from safetensors.torch import save_file

    stem, suffix = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        if safetensors:
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.{suffix}.index.json", index)


def write_tokenizer(folder: Path, vocab: int, *, chat: bool, adds_bos: bool, thinking: bool = False) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json; the last ids are fillers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    specials = [*SPECIALS, *(THINKING_SPECIALS if thinking else ())]
    words = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *specials[len(SPECIALS) :]]
    words += [f"<filler_{i}>" for i in range(vocab - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(words.index(word)): {
                "content": word,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            }
            | {"special": True}
            for word in specials
        },
        "bos_token": "<s>",
        "eos_token": "<|im_end|>" if chat and not thinking else "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 1000000000000000019884624838656,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        settings["chat_template"] = THINKING_TEMPLATE if thinking else TEMPLATE
    write_json(folder / "tokenizer_config.json", settings)
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", special_tokens)


def write_json(path: Path, document: object) -> None:
    """UTF-8, as the hub's files are."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Set fields of a JSON file; `...` takes a field away."""
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is ...:
            document.pop(key, None)
        else:
            document[key] = value
    write_json(path, document)
