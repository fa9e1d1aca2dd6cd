"""A model on the scripted engine, with a byte-level tokenizer and NorMistral's template: no weights anywhere."""

import dataclasses
from pathlib import Path
from typing import Any

from sample_artifacts import make_manifest
from tiny_models import TEMPLATE, VOCABULARY, write_tokenizer

from normistral.manifest import SamplingDefaults, Template
from normistral.runtime.engines.scripted import NextLogits, ScriptedBackend, answers
from normistral.runtime.model import Model
from normistral.runtime.tokenizer import Tokenizer

END_OF_TURN = 4  # <|im_end|>
ANSWER_MARKER = "<|im_start|> assistant\n"


def make_tokenizer(folder: Path, *, adds_bos: bool = False) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, VOCABULARY, chat=True, adds_bos=adds_bos)
    return Tokenizer.from_folder(folder)


def make_model(folder: Path, script: list[str] | NextLogits, *, after: str = ANSWER_MARKER, **changes: Any) -> Model:
    """A chat model that has these logits, or gives these answers, each after the text `after`.

    Keyword arguments change its manifest.
    """
    tokenizer = make_tokenizer(folder, adds_bos=changes.get("adds_bos", False))
    if isinstance(script, list):
        marker, *texts = (tokenizer.encode(text, add_special_tokens=False) for text in (after, *script))
        script = answers(texts, after=marker, stop_id=END_OF_TURN, vocabulary=VOCABULARY)
    architecture = dataclasses.replace(make_manifest().architecture, vocabulary=VOCABULARY)
    manifest = make_manifest(
        **{
            "architecture": architecture,
            "template": Template(TEMPLATE, "checkpoint", bos_token="<s>", eos_token="<|im_end|>"),
            "sampling": SamplingDefaults(),
            "context_length": 400,
            "adds_bos": False,
            **changes,
        }
    )
    return Model(ScriptedBackend(script, prefill_chunk=16), manifest, tokenizer, name="scripted")


def make_base_model(folder: Path, script: list[str] | NextLogits, *, after: str = ANSWER_MARKER) -> Model:
    """As `make_model`, but a base model: it has no template, and its tokenizer writes the BOS."""
    return make_model(folder, script, after=after, role="base", template=None, adds_bos=True)
