"""Tokenizer files as transformers 5 writes and reads them, with the ids that it gives: writes transformers5.json.

    python -m venv /tmp/t5 && /tmp/t5/bin/pip install 'transformers>=5,<6'
    /tmp/t5/bin/python tests/scripts/save_with_transformers5.py tests/data/transformers5.json

Some folders are saved by transformers 5, the others are written by hand as files of other versions and tools come
together in practice. What counts for each is what transformers 5 makes of it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

SENTENCES = [
    "Blåbærsyltetøy på brødskive er godt, sa ærfuglen på Ærøy.",
    "Noreg er eit land i Nord-Europa, og Oslo er hovudstaden i landet.",
    "Hva heter hovedstaden i Norge? Hovedstaden i Norge er Oslo.",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATE = "{{ bos_token }}{{ image_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TEXTS = [
    *(
        "",
        "Hva heter hovedstaden?",
        "  på  Ærøy \n\n",
        "Sámegiella čáŋŧ 😀",
        "grøt<|im_end|>",
        "<|im_start|>user\nJa<|im_end|>\n",
    ),
    *("a <|im_end|> b", "<|im_end|><|im_end|>", "<image> x<image>", "</s> <s>Hei <s> hei", " <|tool|> ", "<0x41>▁Ġ"),
]
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def byte_level() -> Tokenizer:
    """GPT-2's kind; BOS in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Llama 2's kind, older form: a normaliser puts the blank in front; BOS in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*SPECIALS, *letters], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][: len(SPECIALS)]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def saved_by_5(folder: Path) -> None:
    """What `save_pretrained` of version 5 writes, for the classes that it has."""
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **NAMES)
    fast.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.add_tokens(["grøt"])
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(folder / "saved, extra tokens")
    named = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), extra_special_tokens={"image_token": "<image>"}, chat_template=TEMPLATE, **NAMES
    )
    named.save_pretrained(folder / "saved, named token")
    model = json.loads(byte_level().to_str())["model"]
    gpt2 = GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **NAMES)
    gpt2.save_pretrained(folder / "saved, GPT2Tokenizer")
    model = json.loads(metaspace().to_str())["model"]
    llama = LlamaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], **NAMES)
    llama.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    llama.save_pretrained(folder / "saved, LlamaTokenizer")


def written_by_hand() -> dict[str, tuple[Tokenizer, dict[str, dict[str, Any]]]]:
    """Files that version 4 or a tool wrote, beside a config.json of version 5."""
    backend = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **NAMES}
    llama = {"tokenizer_class": "LlamaTokenizer", **NAMES}
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
    new = ["<|im_start|>", "<|im_end|>"]
    token = {"content": "<|im_end|>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    return {
        "BOS of the file, add_bos_token false": (byte_level(), {"settings": llama | {"add_bos_token": False}}),
        "BOS of the file, add_eos_token": (metaspace(), {"settings": fast | {"add_eos_token": True}}),
        "LlamaTokenizer of a Mistral": (metaspace(), {"settings": llama | {"legacy": False}}),
        "LlamaTokenizer, prefix space, no model": (metaspace(), {"settings": llama | {"add_prefix_space": True}}),
        "LlamaTokenizer over ByteLevel": (byte_level(), {"config": LLAMA, "settings": llama}),
        "add_prefix_space without effect": (byte_level(), {"settings": fast | {"add_prefix_space": True}}),
        "no class": (byte_level(), {"config": LLAMA, "settings": NAMES}),
        "tokens of the settings alone": (byte_level(), {"settings": backend | {"extra_special_tokens": new}}),
        "additional_special_tokens": (metaspace(), {"settings": backend | {"additional_special_tokens": new}}),
        "specific tokens": (
            byte_level(),
            {
                "settings": backend
                | {"model_specific_special_tokens": {"image_token": "<image>"}, "chat_template": TEMPLATE}
            },
        ),
        "own token": (byte_level(), {"settings": backend | {"image_token": "<image>", "chat_template": TEMPLATE}}),
        "decoder": (byte_level(), {"settings": backend | {"added_tokens_decoder": {"330": token | {"special": True}}}}),
        "added_tokens.json": (byte_level(), {"settings": backend, "added": {"<|tool|>": 331, "<|im_end|>": 330}}),
        "special map": (
            byte_level(),
            {"settings": backend, "map": {"eos_token": token, "extra_special_tokens": new[:1]}},
        ),
        # Refused: a token is described twice, or version 5 builds the tokenizer anew.
        "special map, twice": (
            byte_level(),
            {"settings": backend, "map": {"eos_token": token, "extra_special_tokens": new}},
        ),
        "LlamaTokenizer of a Llama, older form": (metaspace(), {"config": LLAMA, "settings": llama}),
        "GPT2Tokenizer over other splits": (
            metaspace(),
            {"config": LLAMA, "settings": fast | {"tokenizer_class": "GPT2Tokenizer"}},
        ),
    }


def describe(folder: Path) -> dict[str, Any]:
    """The files, and what transformers 5 makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    case: dict[str, Any] = {"files": {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}}
    case["ids"] = [tokenizer(text)["input_ids"] for text in TEXTS]
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": "Hva?"}]
        case["rendered"] = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return case


def main(output: Path) -> None:
    """Write the cases."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        saved_by_5(root)
        for folder in root.iterdir():
            config = LLAMA if "Tokenizer" in folder.name else MISTRAL
            (folder / "config.json").write_text(json.dumps(config | {"transformers_version": transformers.__version__}))
        for name, (tokenizer, files) in written_by_hand().items():
            folder = root / name
            folder.mkdir()
            tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
            config = files.get("config", MISTRAL) | {"transformers_version": transformers.__version__}
            documents = {"config": config, "tokenizer_config": files["settings"]}
            documents |= {"added_tokens": files.get("added"), "special_tokens_map": files.get("map")}
            for stem, document in documents.items():
                if document is not None:
                    (folder / f"{stem}.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        cases = {folder.name: describe(folder) for folder in sorted(root.iterdir())}
    shared: list[str] = []
    for case in cases.values():
        text = json.dumps(json.loads(case["files"]["tokenizer.json"]), ensure_ascii=False)
        if text not in shared:
            shared.append(text)
        case["files"]["tokenizer.json"] = shared.index(text)
    document = {"transformers": transformers.__version__, "texts": TEXTS, "tokenizers": shared, "cases": cases}
    output.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
