"""Folders that hold another kind of model are called what they are, and the hint leads on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, make_mistral

from normistral.errors import NormistralError
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.progress import NoProgress

Edit = Callable[[Path], object]
BASE = {"base_model_name_or_path": "norallm/normistral-7b-warm", "peft_type": "LORA"}


def refusal(folder: Path, workspace: Path) -> NormistralError:
    workspace.mkdir()
    with pytest.raises(NormistralError) as caught:
        open_checkpoint(locate(str(folder), progress=NoProgress()), workspace, progress=NoProgress())
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


def files(*names: str, **contents: object) -> Edit:
    """Write files; None is an empty one."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"content")
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("edit", "what", "hint"),
    [
        (
            files("adapter_model.bin", adapter_config=BASE),
            "a LoRA adapter of norallm/normistral-7b-warm",
            "merge_",
        ),
        (files(adapter_config={"r": 8}), "a LoRA adapter, not a whole model", "peft"),
        (files("model_index.json"), "a Diffusers pipeline", "language model"),
        (files("b.gguf", "a.gguf"), "a folder of GGUF files", "a.gguf"),
        (files("openvino_model.xml", "openvino_model.bin"), "an OpenVINO model that another tool made", "original"),
        (files("model.onnx"), "an ONNX model that another tool made", "original"),
        (files("onnx/model_q4.onnx"), "an ONNX model that another tool made", "original"),
        (
            files("consolidated.00.pth", params={}),
            "in the layout of Mistral or Meta (consolidated.00.pth)",
            "config.json",
        ),
        (files("consolidated.safetensors"), "in the layout of Mistral or Meta", "transformers' layout"),
        (files("ggml-model-q4_0.bin"), "a GGML model", "original"),
        (files("weights.00.npz"), "an MLX model (weights.00.npz)", "original"),
        (files("tf_model.h5"), "a TensorFlow model", "from_tf=True"),
        (files("flax_model.msgpack"), "a Flax model", "from_flax=True"),
        (files("qmodel.pt"), "quantised by HQQ", "original"),
        (files("__0_0.distcp"), "a training checkpoint in pieces (FSDP)", "merge-weights"),
        (files("zero_to_fp32.py"), "a training checkpoint in pieces (DeepSpeed)", "zero_to_fp32.py"),
        (files("model.fp16.safetensors"), "a checkpoint in a variant (model.fp16.safetensors)", "rename"),
        (files("model.safetensors.incomplete"), "a download that did not finish: model.safetensors.inc", "again"),
        (files("model.safetensors.aria2"), "a download that did not finish", "again"),
        (files(".cache/huggingface/download/x.incomplete"), "a download that did not finish: x.incomplete", "again"),
        (files("inner/config.json"), "a folder around checkpoints", "inner"),
    ],
)
@pytest.mark.parametrize("has_config", [False, True])
def test_a_folder_without_config_or_weights(tmp_path: Path, edit: Edit, what: str, hint: str, has_config: bool) -> None:
    folder = make_mistral(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    if not has_config:
        (folder / "config.json").unlink()
    edit(folder)
    error = refusal(folder, tmp_path / "workspace")
    assert what in error.message
    assert hint in error.hint


def test_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--norallm--normistral-7b-warm"
    for name in ("snapshots", "blobs", "refs"):
        (folder / name).mkdir(parents=True)
    error = refusal(folder, tmp_path / "workspace")
    assert "it is a folder of the hub's cache" in error.message
    assert "give the hub id norallm/normistral-7b-warm," in error.hint


def config(**fields: object) -> Edit:
    return lambda folder: edit_json(folder / "config.json", **fields)


@pytest.mark.parametrize(
    ("edit", "what", "hint"),
    [
        (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised already, by awq", "original"),
        (config(quantization_config={"quant_method": "gptq"}), "quantised already, by gptq", "original"),
        (config(quantization_config={"load_in_4bit": True}), "quantised already, by bitsandbytes", "original"),
        (config(quantization_config={"quant_method": "compressed-tensors"}), "by compressed-tensors", "original"),
        (config(compression_config={"format": "pack-quantized"}), "quantised already, by", "original"),
        (config(quantization_config={"quant_method": "fp8"}, _name_or_path="a/base"), "by fp8", "(a/base)"),
        (config(quantization_config={"quant_method": "hqq"}), "by hqq", "original"),
        (config(quantization={"group_size": 64, "bits": 4}), "quantised already, by MLX", "original"),
        (files(quantize_config={"bits": 4}), "quantised already, by GPTQ", "original"),
        (files(quant_config={"w_bit": 4}), "quantised already, by AWQ", "original"),
        (files(hf_quant_config={"producer": {}}), "quantised already, by ModelOpt", "original"),
        (
            config(text_config={"hidden_size": 64}, architectures=["Mistral3ForConditionalGeneration"]),
            "a model of text and images ('Mistral3ForConditionalGeneration')",
            "text alone",
        ),
        (files("modules.json"), "a sentence-transformers model", "another model"),
        (files("adapter_model.safetensors", adapter_config=BASE), "a whole model with a LoRA adapter beside", "merge"),
    ],
)
def test_a_checkpoint_of_another_kind(tmp_path: Path, edit: Edit, what: str, hint: str) -> None:
    folder = make_mistral(tmp_path / "model")
    edit(folder)
    error = refusal(folder, tmp_path / "workspace")
    assert what in error.message
    assert hint in error.hint


def test_a_merged_model_keeps_its_adapters_settings_and_is_opened(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model")
    files(adapter_config=BASE)(folder)
    (tmp_path / "workspace").mkdir()
    located = locate(str(folder), progress=NoProgress())
    assert open_checkpoint(located, tmp_path / "workspace", progress=NoProgress()).role == "chat"


def test_a_field_of_quantization_that_was_left_behind_can_be_ignored(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", layers=1)
    config(quantization_config={"load_in_4bit": True})(folder)
    assert "--ignore-field quantization_config" in refusal(folder, tmp_path / "a").hint
    (tmp_path / "b").mkdir()
    located = locate(str(folder), progress=NoProgress())
    names = ("quantization_config",)
    made = open_checkpoint(located, tmp_path / "b", progress=NoProgress(), ignore_fields=names)
    assert made.ignored_fields == names


def test_a_tied_model_that_kept_the_other_name(tmp_path: Path) -> None:
    """As safetensors.torch.save_model does, which keeps the first of the names."""
    folder = make_mistral(tmp_path / "model", layers=1, tied=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder, tmp_path / "workspace")
    assert "lack model.embed_tokens.weight" in error.message
    assert "rename it to model.embed_tokens.weight" in error.hint


def test_weights_under_other_names(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", layers=1)
    (folder / "model.safetensors").rename(folder / "merged.safetensors")
    error = refusal(folder, tmp_path / "a")
    assert error.message.endswith("not under a name that transformers looks for: merged.safetensors")
    assert error.hint == "if merged.safetensors holds the whole model, rename it to model.safetensors"
    (folder / "merged.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert refusal(folder, tmp_path / "b").hint == "copy the shards' index too, model.safetensors.index.json"


@pytest.mark.parametrize(
    ("rename", "dtype", "what"),
    [
        (
            {"q_proj.weight": "q_proj.qweight"},
            torch.int32,
            "the weights of model.safetensors are quantised by GPTQ or AWQ",
        ),
        ({"q_proj.weight": "q_proj.weight.absmax"}, torch.uint8, "are quantised by bitsandbytes"),
        ({"q_proj.weight": "q_proj.weight.absmax"}, torch.float32, "the weights are quantised by bitsandbytes"),
        ({"q_proj.weight": "q_proj.weight_packed"}, torch.int32, "quantised (compressed-tensors or fp8)"),
        ({"q_proj.weight": "q_proj.weight_scale"}, torch.float32, "quantised (compressed-tensors or fp8)"),
        ({"q_proj.weight": "q_proj.W_q"}, torch.uint8, "quantised by HQQ"),
        ({"q_proj.weight": "q_proj.lora_A.weight"}, torch.float32, "a LoRA adapter, not a whole model"),
        ({"q_proj.weight": "q_proj.base_layer.weight"}, torch.float32, "a LoRA adapter that was not merged"),
        ({"embed_tokens": "embed_tokens.modules_to_save.default"}, None, "a LoRA adapter that was not merged"),
        ({"q_proj.weight": "q_proj.scales"}, torch.float16, "quantised by MLX"),
        ({"model.": "_orig_mod.model.", "lm_head": "_orig_mod.lm_head"}, None, "saved from inside torch.compile"),
        ({"model.": "module.model.", "lm_head": "module.lm_head"}, None, "saved from inside torch's DataParallel"),
        ({"model.": "model.model.", "lm_head": "model.lm_head"}, None, "names begin with 'model.model.' and not with"),
        ({"model.": "model.language_model."}, None, "names begin with 'model.language_model.' and not with 'model.'"),
    ],
)
def test_weights_that_another_tool_wrote(
    tmp_path: Path, rename: dict[str, str], dtype: torch.dtype | None, what: str
) -> None:
    folder = make_mistral(tmp_path / "model")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        renamed = name
        for old, new in rename.items():
            renamed = renamed.replace(old, new)
        tensors[renamed] = tensor.to(dtype) if dtype is not None and renamed != name else tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder, tmp_path / "workspace")
    assert what in error.message
    assert error.hint


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight"])
def test_a_head_for_something_else(tmp_path: Path, name: str) -> None:
    folder = make_mistral(tmp_path / "model", layers=1)
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(2, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder, tmp_path / "workspace")
    assert error.message == f"the weights are a model with a classifier's or a value head: they hold {name}"
    assert "without that head" in error.hint


def test_the_empty_tensors_of_a_training_in_pieces(tmp_path: Path) -> None:
    """As DeepSpeed's ZeRO 3 leaves them where the weights were not gathered before they were saved."""
    folder = make_mistral(tmp_path / "model", layers=1)
    tensors = {name: torch.empty(0) for name in load_file(folder / "model.safetensors")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    error = refusal(folder, tmp_path / "workspace")
    assert "model.embed_tokens.weight is empty: DeepSpeed (ZeRO 3)" in error.message
    assert "zero_to_fp32.py" in error.hint


def test_a_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    """transformers draws random numbers in its place, or ties the output layer."""
    folder = make_mistral(tmp_path / "model", layers=1, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"]["lm_head.weight"]
    files(**{"model.safetensors.index": index})(folder)
    message = refusal(folder, tmp_path / "workspace").message
    assert "holds lm_head.weight, which model.safetensors.index.json does not name" in message


def test_the_class_of_a_model_that_was_trained_in_shards(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", layers=1)
    config(architectures=["FSDPMistralForCausalLM"])(folder)
    (tmp_path / "workspace").mkdir()
    located = locate(str(folder), progress=NoProgress())
    opened = open_checkpoint(located, tmp_path / "workspace", progress=NoProgress())
    assert opened.architecture.name == "MistralForCausalLM"


def test_all_missing_shards_are_named_and_the_unfinished_download(tmp_path: Path) -> None:
    folder = make_mistral(tmp_path / "model", shards=6)
    first = "model-00001-of-00006.safetensors"
    (folder / first).unlink()
    assert refusal(folder, tmp_path / "a").message == f"shard {first} is missing from {folder}"
    for path in sorted(folder.glob("model-0000[2-5]*")):
        path.unlink()
    error = refusal(folder, tmp_path / "b")
    assert error.message == f"5 of 6 shards are missing from {folder}: 1, 2, 3, 4, 5"
    (folder / f"{first}.incomplete").touch()
    error = refusal(folder, tmp_path / "c")
    assert error.message.endswith(f"it holds a download that did not finish: {first}.incomplete")
    assert "run the download again" in error.hint
