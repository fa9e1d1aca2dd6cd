"""The model that exports start from: its parameters are the checkpoint's file, and all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_headers import read_headers
from tiny_models import edit_json, make_llama, make_mistral
from transformers import AutoModelForCausalLM

from normistral.errors import CheckpointError, ExportError
from normistral.export.reference.model import load_model

IDS = torch.arange(5, 45)[None]
FINE = ("model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.down_proj.weight")


def mapped_ranges(file: Path) -> list[range]:
    """Addresses at which this process has the file mapped."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [fields[0].split("-") for fields in lines if len(fields) == 6 and fields[5] == str(file.resolve())]
    return [range(int(first, 16), int(last, 16)) for first, last in spans]


def weights_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]


def edit_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_parameters_are_the_mapped_file(tmp_path: Path, safetensors: bool, dtype: str) -> None:
    folder = make_mistral(tmp_path / "model", dtype=dtype, safetensors=safetensors, shards=2)
    model = load_model(read_headers(folder), dtype)
    ranges = [span for path in weights_of(folder) for span in mapped_ranges(path)]
    for name, parameter in model.named_parameters():
        last = parameter.data_ptr() + parameter.nbytes - 1
        assert any(parameter.data_ptr() in span and last in span for span in ranges), name
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_every_parameter_keeps_the_type_that_it_is_stored_in(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", dtype="bfloat16", layers=1)
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].float() for name in FINE}))
    for name, parameter in load_model(read_headers(folder)).named_parameters():
        assert parameter.dtype == (torch.float32 if name in FINE else torch.bfloat16), name


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"dtype": "bfloat16", "shards": 3}])
def test_it_computes_what_transformers_own_loader_gives(
    tmp_path: Path, safetensors: bool, options: dict[str, Any]
) -> None:
    folder = make_mistral(tmp_path / "model", safetensors=safetensors, sliding_window=16, **options)
    ours = load_model(read_headers(folder), "float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert not ours.training
    assert ours.config._attn_implementation == "sdpa"
    assert [name for name, buffer in ours.named_buffers() if buffer.is_meta] == []
    tied = ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    assert tied == options.get("tied", False)


def test_scaled_rotary_positions_survive(tmp_path: Path) -> None:
    """The rotary buffers are computed, not read: they must be those of the config."""
    folder = make_llama(tmp_path / "model", positions=64)
    edit_json(folder / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(read_headers(folder), "float32")
    for (name, buffer), (_, expected) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_copied_output_layer_and_old_rotary_buffers_are_left_out(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", tied=True)
    plain = load_model(read_headers(folder), "float32")(IDS).logits

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((12,), 7.0)

    edit_weights(folder, add)
    assert torch.equal(load_model(read_headers(folder), "float32")(IDS).logits, plain)


def test_names_without_prefix_are_found(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", tied=True)
    plain = load_model(read_headers(folder), "float32")(IDS).logits

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(folder, strip)
    assert torch.equal(load_model(read_headers(folder), "float32")(IDS).logits, plain)


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ExportError, match=r"1 tensors are missing, 0 left over; first 'model\.layers\.1\.mlp\.up_proj"):
        load_model(read_headers(folder), "float32")
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"0 tensors are missing, 8 left over; first 'model\.layers\.1\."):
        load_model(read_headers(folder), "float32")


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", head_dim=24)
    edit_json(folder / "config.json", head_dim=16)
    with pytest.raises(ExportError, match="transformers cannot load the checkpoint: "):
        load_model(read_headers(folder), "float32")


def test_an_odd_place_in_the_file_is_copied_and_not_misread(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    plain = load_model(read_headers(folder), "float32")(IDS).logits
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + whole[8 : 8 + length] + b" " + whole[8 + length :])
    assert torch.equal(load_model(read_headers(folder), "float32")(IDS).logits, plain)


def test_a_damaged_file_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", safetensors=False)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is truncated"):
        load_model(read_headers(folder), "float32")
