"""A model on the scripted engine, with a byte-level tokenizer and NorMistral's templates: no weights anywhere."""

import dataclasses
from pathlib import Path
from typing import Any

from sample_artifacts import make_manifest
from tiny_models import (
    END_THINK,
    TEMPLATE,
    THINK,
    THINKING_TEMPLATE,
    THINKING_VOCABULARY,
    VOCABULARY,
    write_tokenizer,
)

from normistral.artifact.manifest import ReasoningMarkers, SamplingDefaults, Template
from normistral.artifact.tokenizer import Tokenizer
from normistral.runtime.engines.scripted import NextLogits, ScriptedBackend, answers
from normistral.runtime.model import Model

END_OF_TURN = 4  # <|im_end|>
END_OF_THINKING_TURN = 2  # </s>
ANSWER_MARKER = "<|im_start|> assistant\n"
TAG_TOKENS = ReasoningMarkers("<think>", "</think>", THINK, END_THINK)
TAG_TEXTS = ReasoningMarkers("<think>", "</think>")


def make_tokenizer(folder: Path, *, adds_bos: bool = False, thinking: bool = False) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = THINKING_VOCABULARY if thinking else VOCABULARY
    write_tokenizer(folder, vocabulary, chat=True, adds_bos=adds_bos, thinking=thinking)
    return Tokenizer.from_folder(folder)


def make_model(folder: Path, script: list[str] | NextLogits, *, after: str | None = None, **changes: Any) -> Model:
    """A chat model that has these logits, or gives these answers, each after the text `after`.

    Without `after`, they come after what opens an answer. Keyword arguments change its manifest; with
    `reasoning=TAG_TOKENS` it has the tokens and the template of normistral-11b-thinking.
    """
    thinking = changes.get("reasoning") == TAG_TOKENS
    tokenizer = make_tokenizer(folder, adds_bos=changes.get("adds_bos", False), thinking=thinking)
    vocabulary = THINKING_VOCABULARY if thinking else VOCABULARY
    if isinstance(script, list):
        after = after or ("</instruction>" if thinking else ANSWER_MARKER)
        marker, *texts = (tokenizer.encode(text, add_special_tokens=False) for text in (after, *script))
        stop_id = END_OF_THINKING_TURN if thinking else END_OF_TURN
        script = answers(texts, after=marker, stop_id=stop_id, vocabulary=vocabulary)
    architecture = dataclasses.replace(make_manifest().architecture, vocabulary=vocabulary)
    text, eos_token = (THINKING_TEMPLATE, "</s>") if thinking else (TEMPLATE, "<|im_end|>")
    manifest = make_manifest(
        **{
            "architecture": architecture,
            "template": Template(text, "checkpoint", bos_token="<s>", eos_token=eos_token),
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
