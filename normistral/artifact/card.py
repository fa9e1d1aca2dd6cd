"""The model card of an artifact: README.md with the hub's metadata, made from the manifest.

What comes from a checkpoint's files (names, fields, notes) stands in code spans, in one line each, without control and
formatting characters, so that it is shown and never becomes markup, a link or metadata.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normistral.artifact.extra_files import CARD_NAME, HUB_ID, seal_card
from normistral.artifact.manifest import Manifest, RecipeRecord
from normistral.artifact.presets import Preset, find_preset, find_source_preset
from normistral.errors import UsageError
from normistral.progress import format_bytes

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@-]{0,199}")
_MOST_SHOWN = 200  # characters of a foreign text
_QUESTION = {"en": "What is the capital of Norway?"}
_NORWEGIAN_QUESTION = "Hva heter hovedstaden i Norge?"
_BEGINNING = {"en": "The capital of Norway is"}
_NORWEGIAN_BEGINNING = "Hovedstaden i Norge heter"


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What a manifest does not say.

    Attributes:
        published_as: "owner/name" on a hub; None for a folder of this machine.
        licence: of the base model, as an SPDX identifier; None takes the preset's.
        base_model: hub repository of the base model; None takes the manifest's or the preset's.
    """

    published_as: str | None = None
    licence: str | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and not _LICENCE.fullmatch(self.licence):
            raise UsageError(f"{self.licence!r} is no identifier of a licence", "such as Apache-2.0, MIT or other")
        if self.base_model is not None and not HUB_ID.fullmatch(self.base_model):
            raise UsageError(f"{self.base_model!r} is no hub id", "a hub id looks like: owner/name")


def write_card(folder: Path, manifest: Manifest, name: str) -> None:
    """Write the card into an artifact's folder.

    Args:
        name: of the folder that it will be.
    """
    (folder / CARD_NAME).write_bytes(render_card(manifest, name))


def render_card(manifest: Manifest, name: str, options: CardOptions | None = None) -> bytes:
    """The card in Markdown, UTF-8, with metadata in YAML and `extra_files.seal_card`'s last line.

    Args:
        name: of the artifact's folder; one that is not plain is not shown.
    """
    options = options or CardOptions()
    card = _Card(manifest, name if _PLAIN_NAME.fullmatch(name) else "ARTIFACT", options)
    return seal_card("\n".join([*card.metadata(), "", *card.text(), ""]))


def find_licence(manifest: Manifest, options: CardOptions) -> str | None:
    """The base model's licence as the hub spells it, in lower case; None where nobody said."""
    preset = _find_preset(manifest, options)
    licence = options.licence or (preset.licence if preset is not None else None)
    return None if licence is None else licence.lower()


def find_reference(manifest: Manifest) -> str | None:
    """What `eval --reference` takes for the checkpoint of an artifact; None where only its maker has it."""
    preset = _find_preset(manifest, CardOptions())
    if manifest.source.kind == "package":
        return None if preset is None else preset.name
    return _find_base_model(manifest, None, CardOptions())


def card_licence(card: bytes) -> str | None:
    """The licence that a card's metadata names; None if it names none."""
    found = re.match(rb"---\r?\n(.*?)\n---\s", card, re.DOTALL)
    named = None if found is None else re.search(rb"^license:[ \t]*[\"']?([A-Za-z0-9.+-]+)", found[1], re.MULTILINE)
    return None if named is None else named[1].decode()


class _Card:
    def __init__(self, manifest: Manifest, name: str, options: CardOptions) -> None:
        self.manifest, self.options = manifest, options
        self.name = options.published_as or name
        self.preset = _find_preset(manifest, options)
        self.base_model = _find_base_model(manifest, self.preset, options)
        self.licence = find_licence(manifest, options)
        self.languages = () if self.preset is None else self.preset.languages

    def metadata(self) -> Iterator[str]:
        """YAML of the hub; every value is a quoted string: no and nn would be something else without."""
        recipe, manifest = self.manifest.recipe, self.manifest
        yield "---"
        if self.base_model is not None:
            yield f"base_model: {_quoted(self.base_model)}"
            yield f"base_model_relation: {_quoted('quantized')}"
        if self.languages:
            yield "language:"
            yield from (f"- {_quoted(one)}" for one in self.languages)
        yield f"library_name: {_quoted(manifest.format)}"
        if self.licence is not None:
            yield f"license: {_quoted(self.licence)}"
        yield f"pipeline_tag: {_quoted('text-generation')}"
        yield "tags:"
        tags = ["normistral", manifest.format, recipe.weights, *(["conversational"] if manifest.template else [])]
        yield from (f"- {_quoted(tag)}" for tag in tags)
        yield "---"

    def text(self) -> Iterator[str]:
        manifest = self.manifest
        engine = {"openvino": "OpenVINO IR", "onnx": "ONNX"}[manifest.format]
        yield f"# {self.name}"
        yield ""
        yield f"{self._base_link()} as {engine} with {manifest.recipe.weights} weights, for CPUs. Made by `normistral`"
        yield f"on {_code(manifest.created[:10])}."
        yield ""
        yield from self._facts()
        yield ""
        yield "## Certificate"
        yield ""
        yield from self._certificate()
        yield ""
        yield "## How to run it"
        for title, language, lines in self._snippets():
            yield ""
            yield f"### {title}"
            yield ""
            yield f"```{language}"
            yield from lines
            yield "```"

    def _base_link(self) -> str:
        if self.base_model is None:
            return _code(self.manifest.source.id)
        return f"[{_code(self.base_model)}](https://huggingface.co/{self.base_model})"

    def _facts(self) -> Iterator[str]:
        manifest, shape = self.manifest, self.manifest.architecture
        source = manifest.source
        revision = "" if source.revision is None else f" at {_code(source.revision)}"
        kind = {"hub": "on the hub", "folder": "a folder", "gguf": "a .gguf file", "package": "a package"}[source.kind]
        yield f"- **Made from**: {_code(source.id)}{revision} ({kind})"
        if self.licence is None:
            yield "- **Licence**: that of the base model; this card's maker did not name it"
        else:
            yield f"- **Licence**: {_code(self.licence)}, that of the base model"
        yield f"- **Architecture**: {_code(shape.name)}, {shape.parameters / 1e6:,.0f} million parameters"
        yield f"- **Context**: {manifest.context_length:,} tokens, prompt and answer together"
        yield f"- **Recipe**: {describe_recipe(manifest.recipe)}"
        if manifest.recipe.calibration_tokens is not None:
            yield f"- **Calibration**: {manifest.recipe.calibration_tokens:,} tokens of Norwegian, English and code"
        yield f"- **Size**: {format_bytes(manifest.total_bytes)}"
        tools = (f"{tool} {version}" for tool, version in manifest.tools.items())
        yield f"- **Tools**: {', '.join(map(_code, tools))}"

    def _certificate(self) -> Iterator[str]:
        manifest = self.manifest
        yield {
            "run": "When it was made it was run, and compared with the checkpoint:",
            "read": "When it was made its files were compared with the checkpoint; it was too large to be run there:",
            "no": "It was **not compared** with the checkpoint, as its maker asked.",
            "failed": "The comparison with the checkpoint **failed**, and it was kept all the same.",
            None: "It was made before comparisons with the checkpoint were recorded.",
        }[manifest.verified]
        yield ""
        quality = manifest.quality or {}
        if "matrices" in quality:
            yield f"- {quality['matrices']:.0f} matrices of weights are the checkpoint's, quantized by the recipe"
        if "tokenizer_tokens" in quality:
            yield f"- the tokenizer gives the same {quality['tokenizer_tokens']:,.0f} tokens of sample texts"
        if quality.get("template_conversations"):
            yield f"- the chat template gives the same text in {quality['template_conversations']:.0f} conversations"
        if "graph_error" in quality:
            error = quality["graph_error"]
            yield f"- it computes what transformers computes with these weights, to {error:.1g} of the logits' spread"
        if "probe_kl_nats" in quality:
            tokens, kl = quality.get("probe_tokens", 0), quality["probe_kl_nats"]
            yield f"- KL divergence from the checkpoint: {kl:.3g} nats a token, on {tokens:.0f} tokens of a fixed text"
        if "probe_top1_agreement" in quality:
            yield f"- the same most likely token as the checkpoint: {quality['probe_top1_agreement']:.0%} of them"
        if manifest.ignored_fields:
            fields = ", ".join(map(_code, manifest.ignored_fields))
            yield f"- fields of the checkpoint's files that were ignored, as its maker asked: {fields}"
        yield ""
        yield "These figures are the word of whoever published it. To measure it yourself:"
        yield ""
        yield "```sh"
        reference = self.options.base_model or find_reference(self.manifest) or "CHECKPOINT"
        yield f"normistral eval {self.name} --text FILE --reference {reference}"
        yield "```"

    def _snippets(self) -> Iterator[tuple[str, str, list[str]]]:
        yield "normistral", "sh", self._command()
        yield "normistral in Python", "python", self._normistral()
        if self.manifest.format == "openvino":
            yield "optimum-intel", "python", self._optimum("optimum.intel", "OVModelForCausalLM", "")
            yield "openvino_genai", "python", self._openvino_genai()
            return
        yield (
            "optimum-onnx",
            "python",
            self._optimum("optimum.onnxruntime", "ORTModelForCausalLM", ", use_io_binding=False"),
        )
        if self.manifest.recipe.graph == "fused":
            yield "onnxruntime_genai", "python", self._onnxruntime_genai()

    def _command(self) -> list[str]:
        if self.manifest.template is not None:
            return [f"normistral chat {self.name}"]
        return [f'normistral generate {self.name} --prompt "{self._beginning}"']

    def _normistral(self) -> list[str]:
        load = f"normistral.load({_quoted(self.name)}{', download=True' if self.options.published_as else ''})"
        answer = f"model.generate({_quoted(self._beginning)}, max_new_tokens=40).text"
        if self.manifest.template is not None:
            answer = f"model.chat().send({_quoted(self._question)}).text"
        return ["import normistral", "", f"with {load} as model:", f"    print({answer})"]

    def _optimum(self, module: str, model: str, options: str) -> list[str]:
        name = _quoted(self.name)
        return [
            f"from {module} import {model}",
            "from transformers import AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
            f"model = {model}.from_pretrained({name}{options})",
            *self._encode('return_tensors="pt"'),
            'ids, mask = inputs["input_ids"], inputs["attention_mask"]  # some tokenizers add token_type_ids',
            "answer = model.generate(ids, attention_mask=mask, max_new_tokens=40)",
            "print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
        ]

    def _openvino_genai(self) -> list[str]:
        prompt = self._question if self.manifest.template is not None else self._beginning
        return [
            "import openvino_genai",
            *self._folder(),
            "",
            'pipeline = openvino_genai.LLMPipeline(folder, "CPU")',
            f"print(pipeline.generate({_quoted(prompt)}, max_new_tokens=40))",
        ]

    def _onnxruntime_genai(self) -> list[str]:
        return [
            "import onnxruntime_genai",
            "from transformers import AutoTokenizer",
            *self._folder(),
            "",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            *self._encode(""),
            'prompt = inputs["input_ids"]',
            "model = onnxruntime_genai.Model(folder)",
            "params = onnxruntime_genai.GeneratorParams(model)",
            "params.set_search_options(max_length=len(prompt) + 40)",
            "generator = onnxruntime_genai.Generator(model, params)",
            "generator.append_tokens(prompt)",
            "while not generator.is_done():",
            "    generator.generate_next_token()",
            "print(tokenizer.decode(generator.get_sequence(0)[len(prompt) :], skip_special_tokens=True))",
        ]

    def _folder(self) -> list[str]:
        name = _quoted(self.name)
        if self.options.published_as is None:
            return ["", f"folder = {name}"]
        return ["from huggingface_hub import snapshot_download", "", f"folder = snapshot_download({name})"]

    def _encode(self, options: str) -> list[str]:
        options = f", {options}" if options else ""
        if self.manifest.template is None:
            return [f"inputs = tokenizer({_quoted(self._beginning)}{options})"]
        return [
            f'messages = [{{"role": "user", "content": {_quoted(self._question)}}}]',
            f"inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True{options})",
        ]

    @property
    def _question(self) -> str:
        return _QUESTION.get("".join(self.languages), _NORWEGIAN_QUESTION)

    @property
    def _beginning(self) -> str:
        return _BEGINNING.get("".join(self.languages), _NORWEGIAN_BEGINNING)


def describe_recipe(recipe: RecipeRecord) -> str:
    """How the weights were quantized, in a few words."""
    parts: list[str] = [recipe.weights]
    if recipe.symmetric is not None:
        parts.append("symmetric" if recipe.symmetric else "asymmetric")
    if recipe.group_size is not None:
        parts.append("one scale a channel" if recipe.group_size == -1 else f"groups of {recipe.group_size}")
    methods = {"fast": "rounded to nearest", "balanced": "scales searched", "best": "GPTQ, with scales searched"}
    if recipe.recipe is not None:
        parts.append(f"recipe {recipe.recipe} ({methods[recipe.recipe]})")
    if recipe.ratio is not None and recipe.ratio != 1.0:
        parts.append(f"{recipe.ratio:.0%} of the layers' weights in {recipe.weights}")
    if recipe.backup is not None:
        parts.append(f"the others {_code(recipe.backup)}")
    if recipe.output_layer_bits is not None:
        parts.append(f"output layer {recipe.output_layer_bits} bits")
    if recipe.graph is not None:
        parts.append(f"{recipe.graph} graph")
    return ", ".join(parts)


def _find_preset(manifest: Manifest, options: CardOptions) -> Preset | None:
    if options.base_model is not None:
        return find_preset(options.base_model)
    return find_source_preset(manifest.source.kind, manifest.source.id)


def _find_base_model(manifest: Manifest, preset: Preset | None, options: CardOptions) -> str | None:
    if options.base_model is not None:
        return options.base_model
    if manifest.source.kind == "hub" and HUB_ID.fullmatch(manifest.source.id):
        return manifest.source.id
    return None if preset is None else preset.original


def _quoted(text: str) -> str:
    """A string of Python, and of YAML, in ASCII."""
    return json.dumps(text)


def _code(text: str) -> str:
    """A foreign text as a code span in one line."""
    shown = "".join(" " if unicodedata.category(one)[0] in "CZ" else one for one in text).replace("`", "'")
    shown = " ".join(shown.split())
    return f"`{shown[:_MOST_SHOWN] or '?'}`"
