"""Small tokenizers of the kinds that the family and the demo model have, trained on a few sentences."""

from __future__ import annotations

import functools
import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from normistral.artifact.chat_template import ChatTemplate
from normistral.artifact.manifest import Template
from normistral.artifact.tokenizer import Tokenizer

SENTENCES = [
    "Blåbærsyltetøy på brødskive er godt, sa ærfuglen på Ærøy.",
    "Noreg er eit land i Nord-Europa, og Oslo er hovudstaden i landet.",
    "Hva heter hovedstaden i Norge? Hovedstaden i Norge er Oslo.",
    "Du er en hjelpsom assistent som svarer kort.\n\nsystem user assistant\n",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

# normistral-7b-warm-instruct's, word for word (docs of the family: tokenizer_config.json)
NORMISTRAL = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|> ' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\\n' }}{% endif %}"
)


@functools.cache
def byte_level(add_prefix_space: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@functools.cache
def sentencepiece(prepend_scheme: str = "first") -> tokenizers.Tokenizer:
    """Llama's kind: ▁ for blanks, and byte tokens for letters it does not know ("legacy": normalisers do it)."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend_scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=True)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIALS, *bytes_])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][: len(SPECIALS)]  # the bytes are no added tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def copy(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(backend.to_str())


@functools.cache
def wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(copy(backend))


@functools.cache
def reference(backend: tokenizers.Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    """The same tokenizer in transformers."""
    pre_tokenizer = json.loads(backend.to_str())["pre_tokenizer"] or {}
    return PreTrainedTokenizerFast(
        tokenizer_object=copy(backend),
        chat_template=template,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        add_prefix_space=pre_tokenizer.get("add_prefix_space", False),  # it would overrule the file
    )


BACKENDS = {
    "byte-level": byte_level,
    "byte-level with prefix space": functools.partial(byte_level, True),
    "metaspace first": functools.partial(sentencepiece, "first"),
    "metaspace always": functools.partial(sentencepiece, "always"),
    "metaspace never": functools.partial(sentencepiece, "never"),
    "legacy": functools.partial(sentencepiece, "legacy"),
}


def chat_template(backend: tokenizers.Tokenizer, text: str) -> ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return ChatTemplate(Template(text, "checkpoint", **special), wrap(backend))


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
