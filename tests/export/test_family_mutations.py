"""No cell of the family's table is green for nothing: an export that overlooks a quirk turns its cell red.

Each mutation is an export that does not know the quirk, of a checkpoint whose reference does: the window is ignored,
positions are turned by other angles, a bias is dropped. Red is a figure beyond the tolerance, a wrong fact in the
manifest, or an export that is refused; the export's own verification is left out, so that the cells are tested alone.

Every quirk is dropped in both formats and from every row that has it; where rows share it, they take turns.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from family_cells import FORMATS, Cell, make_cell
from safetensors.torch import load_file, save_file
from tiny_family import ROWS, as_gguf, make_tiny, shape_of, source_of, stops_of
from tiny_models import edit_json

from normistral.errors import NormistralError
from normistral.export import recipe
from normistral.export.checkpoint.families import bloom as bloom_family
from normistral.export.checkpoint.files import read_json
from normistral.export.onnx import bloom as bloom_graph

Edit = Callable[[Path, pytest.MonkeyPatch], None]


def edit_config(**changes: object) -> Edit:
    return lambda folder, patch: edit_json(folder / "config.json", **changes)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Edit:
    """Rewrite the checkpoint's one weight file, or its first shard that has what is changed."""

    def edit(folder: Path, patch: pytest.MonkeyPatch) -> None:
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            is_bin = file.suffix == ".bin"
            tensors = torch.load(file, weights_only=True) if is_bin else load_file(file)
            changed = change(tensors)
            torch.save(changed, file) if is_bin else save_file(changed, file, metadata={"format": "pt"})

    return edit


def replaced(suffix: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return edit_tensors(lambda tensors: {k: value(t) if k.endswith(suffix) else t for k, t in tensors.items()})


def tie(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The output layer is overlooked, and the embedding taken for it."""
    edit_tensors(lambda tensors: {k: t for k, t in tensors.items() if k != "lm_head.weight"})(folder, patch)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = {k: file.name for file in folder.glob("*.safetensors") for k in load_file(file)}
        edit_json(index, weight_map=names)


def untie(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Another output layer than the embedding."""

    def add_output(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        noise = torch.Generator().manual_seed(1)
        return tensors | {
            "lm_head.weight": torch.randn(tensors["model.embed_tokens.weight"].shape, generator=noise) * 0.1
        }

    edit_tensors(add_output)(folder, patch)
    edit_json(folder / "config.json", tie_word_embeddings=False)


def no_alibi(folder: Path, patch: pytest.MonkeyPatch) -> None:
    from transformers.models.bloom.modeling_bloom import BloomModel, build_alibi_tensor

    patch.setattr(bloom_graph, "slopes", lambda heads: np.zeros(heads, np.float32))
    patch.setattr(
        BloomModel, "build_alibi_tensor", lambda self, *given, **named: 0 * build_alibi_tensor(*given, **named)
    )


def qkv_in_blocks(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """All queries, then all keys, then all values, as other architectures have them."""
    from transformers.models.bloom.modeling_bloom import BloomAttention

    def split_blocks(reader, name, architecture):
        rows = architecture.heads * architecture.head_dim
        parts = (f"{name}.query", f"{name}.key", f"{name}.value")
        for index, part in enumerate(parts):
            for kind in ("weight", "bias"):
                reader.add_view(f"{part}.{kind}", f"{name}.{kind}", [range(index * rows, (index + 1) * rows)])
        return parts

    def reshape(self, fused):
        batch, length, _ = fused.shape
        return tuple(
            part.reshape(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in fused.view(batch, length, 3, -1).unbind(2)
        )

    patch.setattr(bloom_graph, "split_heads", split_blocks)
    patch.setattr(BloomAttention, "_reshape", reshape)


def headless_names_taken_as_they_are(folder: Path, patch: pytest.MonkeyPatch) -> None:
    family = dataclasses.replace(bloom_family.BLOOM, prefix="")
    patch.setattr("normistral.export.checkpoint.families.FAMILIES", (family,))


def table_of_a_million(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recipe, "FUSED_CONTEXT", 2**20)


def one_file_for_the_stop_token(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """What only config.json says."""
    edit_json(folder / "generation_config.json", eos_token_id=2)
    edit_json(folder / "tokenizer_config.json", eos_token="</s>", chat_template="{{ messages[0].content }}")


def replace_in_tokenizer(old: str, new: str) -> Edit:
    def edit(folder: Path, patch: pytest.MonkeyPatch) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")

    return edit


WINDOWED = [name for name, preset in ROWS.items() if shape_of(preset).sliding_window is not None]
ROTARY = [name for name, preset in ROWS.items() if shape_of(preset).rope_theta is not None]
UNTIED = [name for name, preset in ROWS.items() if not shape_of(preset).tied_embeddings]
WIDE_HEADS = [n for n, p in ROWS.items() if shape_of(p).head_dim * shape_of(p).heads != shape_of(p).hidden_size]
BLOOM = [name for name, preset in ROWS.items() if shape_of(preset).rope_theta is None]

MUTATIONS: dict[str, tuple[list[str], Edit]] = {
    "sliding window": (WINDOWED, edit_config(sliding_window=None)),
    "rope_theta": (ROTARY, edit_config(rope_theta=5e5)),
    "grouped heads": (ROTARY, edit_config(num_key_value_heads=1)),
    "head_dim": (WIDE_HEADS, edit_config(head_dim=...)),
    "vocabulary": ([name for name in ROWS if name != "demo"], edit_config(vocab_size=32000)),  # .gguf: the matrix says
    "untied output": (UNTIED, tie),
    "tied output": (["demo"], untie),
    "ALiBi": (BLOOM, no_alibi),
    "norm of the embedding": (BLOOM, replaced("word_embeddings_layernorm.weight", torch.ones_like)),
    "interleaved QKV": (BLOOM, qkv_in_blocks),
    "biases of projections": (BLOOM, replaced("query_key_value.bias", torch.zeros_like)),
    "biases of the feed-forward": (BLOOM, replaced("dense_h_to_4h.bias", torch.zeros_like)),
    "biases of norms": (BLOOM, replaced("input_layernorm.bias", torch.zeros_like)),
    "residual before the norm": (BLOOM, edit_config(apply_residual_connection_post_layernorm=True)),
    "headless names": (BLOOM, headless_names_taken_as_they_are),
    "a million positions": (["11b-warm", "11b-thinking"], table_of_a_million),
    "stop token": (["7b-warm-instruct"], one_file_for_the_stop_token),
    "template's blank": (["7b-warm-instruct"], replace_in_tokenizer("<|im_start|> '", "<|im_start|>'")),
    "tags of the reasoning": (["11b-thinking"], replace_in_tokenizer("<think>", "<thunk>")),
}
VOCABULARY = 1024  # of all mutants but those that are about it: the published ones are in test_family.py
ONLY_ONNX = ("a million positions",)  # OpenVINO's graph computes the angles
CASES = [
    (quirk, row, format)
    for quirk, (rows, _) in MUTATIONS.items()
    for turn, row in enumerate(rows)
    for format in (("onnx",) if quirk in ONLY_ONNX else (FORMATS[turn % 2],) if len(rows) > 1 else FORMATS)
]


def problems(cell: Cell, row: str) -> Iterator[str]:
    """What test_family.py would find, the cheapest first."""
    manifest = cell.manifest
    if set(manifest.stop_token_ids) != stops_of(ROWS[row]):
        yield "stop tokens"
    if (manifest.reasoning is None) != (row != "11b-thinking"):
        yield "reasoning"
    published = read_json(cell.source / "tokenizer_config.json").get("chat_template")
    if published != (None if manifest.template is None else manifest.template.text):
        yield "template"
    files = {name: record.size for name, record in manifest.files.items() if "token" not in name}
    if sum(files.values()) > 1.5 * manifest.architecture.parameters + 2**20 + 4 * 32768 * 16:
        yield "size"
    yield from cell.problems()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return cache(lambda row, size: source_of(make_tiny(ROWS[row], folder / f"{row}-{size}", size)))


@pytest.mark.parametrize(("quirk", "row", "format"), CASES)
def test_an_export_that_overlooks_a_quirk_turns_its_cell_red(quirk, row, format, originals, tmp_path, monkeypatch):
    original, mutant = originals(row, None if quirk == "vocabulary" else VOCABULARY), tmp_path / row
    shutil.copytree(original, mutant)
    with monkeypatch.context() as patch:  # the reference is not patched
        MUTATIONS[quirk][1](mutant, patch)
        given = as_gguf(mutant) if shape_of(ROWS[row]).weight_files[1] == "gguf" else mutant
        try:
            cell = make_cell(given, tmp_path / "artifact", format, "int8", verify=False)
        except NormistralError:
            return  # red: refused, with a clear error
    cell.source = original
    assert next(problems(cell, row), None) is not None
