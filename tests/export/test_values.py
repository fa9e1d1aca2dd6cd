"""Values that are no numbers, or that float16 cannot hold: found once, before anything is made of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bloom import make_bloom
from tiny_gguf import byte_level_vocabulary, write_gguf
from tiny_models import make_llama, make_mistral

import normistral
from normistral.errors import CheckpointError, ExportError
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import Checkpoint, open_checkpoint
from normistral.export.quantize.weight_values import read_magnitudes, require_range
from normistral.export.recipe import choose_recipe
from normistral.export.verify.weights import check_rotary_buffers
from normistral.progress import NoProgress

EMBEDDING, QUERIES, NORM = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
KINDS = ["float32", "float16", "bfloat16"]


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], object]) -> Path:
    """Change one tensor of a checkpoint of one file."""
    if (folder / "model.safetensors").exists():
        tensors = load_file(folder / "model.safetensors")
        edit(tensors[name])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        edit(tensors[name])
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def opened(model: Path, workspace: Path) -> Checkpoint:
    workspace.mkdir(exist_ok=True)
    return open_checkpoint(locate(str(model), progress=NoProgress()), workspace, progress=NoProgress())


def put(place: tuple[int, ...], value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.index_put_(
        tuple(torch.tensor(i) for i in place), torch.tensor(value, dtype=tensor.dtype)
    )


# Numbers


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_the_largest_magnitude_of_every_tensor(tmp_path: Path, dtype: str, safetensors: bool) -> None:
    folder = make_mistral(tmp_path / "model", dtype=dtype, safetensors=safetensors)
    change(folder, NORM, lambda tensor: tensor.neg_())  # all of them negative
    change(folder, QUERIES, lambda tensor: tensor.zero_())
    seen: list[int] = []
    checkpoint = opened(folder, tmp_path / "workspace")
    found = read_magnitudes(checkpoint, seen.append)
    load = load_file if safetensors else lambda path: torch.load(path, weights_only=True)
    stored = load(next(folder.glob("*.safetensors" if safetensors else "*.bin")))
    assert found == {name: float(tensor.abs().max()) for name, tensor in stored.items()}
    assert found[QUERIES] == 0
    assert sum(seen) == checkpoint.weight_bytes


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        (EMBEDDING, (260, 63), math.nan, "NaN at [260, 63]"),
        (QUERIES, (0, 0), -math.nan, "NaN at [0, 0]"),
        (QUERIES, (3, 5), math.inf, "inf at [3, 5]"),
        (NORM, (7,), -math.inf, "-inf at [7]"),
    ],
)
def test_a_value_that_is_no_number_is_named(
    tmp_path: Path, dtype: str, name: str, place: tuple[int, ...], value: float, said: str
) -> None:
    folder = change(make_mistral(tmp_path / "model", dtype=dtype), name, put(place, value))
    with pytest.raises(CheckpointError) as caught:
        read_magnitudes(opened(folder, tmp_path / "workspace"))
    assert caught.value.message == f"{name} in model.safetensors holds a value that is no finite number: {said}"
    change(folder, name, lambda tensor: tensor.fill_(value))
    with pytest.raises(CheckpointError, match=r"holds \d+ values that are no finite numbers, first -?(NaN|inf) at \[0"):
        read_magnitudes(opened(folder, tmp_path / "second"))


def test_in_a_torch_file_and_beyond_the_first_block(tmp_path: Path) -> None:
    folder = make_bloom(tmp_path / "model", vocab=40_000, dtype="float32")  # an embedding of ten megabytes
    change(folder, "word_embeddings.weight", put((39_999, 1), math.nan))
    with pytest.raises(CheckpointError, match=r"transformer\.word_embeddings\.weight in .* NaN at \[39999, 1\]"):
        read_magnitudes(opened(folder, tmp_path / "workspace"))


def test_in_a_gguf_file(tmp_path: Path) -> None:
    folder = change(make_llama(tmp_path / "model"), NORM, put((3,), math.nan))
    vocabulary = byte_level_vocabulary(folder)
    vocabulary["tokens"][-1] = "ĠĠ"
    model = write_gguf(tmp_path / "model.gguf", folder, vocabulary)
    assert gguf.GGUFReader(model).tensors
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .* NaN at \[3\]"):
        read_magnitudes(opened(model, tmp_path / "workspace"))


@pytest.mark.parametrize(
    ("format", "weights"),
    [*(("openvino", w) for w in ("int4", "int8", "fp16")), *(("onnx", w) for w in ("int4", "int8", "fp16", "fp32"))],
)
def test_no_export_is_made_of_it(tmp_path: Path, format: str, weights: str) -> None:
    folder = change(make_mistral(tmp_path / "model", head_dim=32), EMBEDDING, put((7, 3), math.nan))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight in model\.safetensors holds a value"):
        normistral.export_model(str(folder), tmp_path / "out", format=format, weights=weights)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Old rotary buffers


@pytest.mark.parametrize(
    ("theta", "dtype", "fits"), [(1e4, "float32", True), (1e4, "bfloat16", True), (5e5, "float32", False)]
)
def test_stored_rotary_frequencies_have_to_be_those_of_the_config(
    tmp_path: Path, theta: float, dtype: str, fits: bool
) -> None:
    folder = make_mistral(tmp_path / "model", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    frequencies = theta ** -(torch.arange(0, 24, 2) / 24)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = frequencies.to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = opened(folder, tmp_path / "workspace")
    if fits:
        check_rotary_buffers(checkpoint)
        return
    with pytest.raises(
        CheckpointError, match=r"rotary_emb\.inv_freq' holds other rotary frequencies than config\.json"
    ):
        check_rotary_buffers(checkpoint)


# Float16


@pytest.mark.parametrize(
    ("format", "weights", "options", "name", "value", "refused"),
    [
        ("openvino", "int8", {}, QUERIES, 1e-4, "below"),
        ("openvino", "int8", {}, QUERIES, 1e-3, None),
        ("openvino", "int8", {}, QUERIES, 0.0, None),
        ("openvino", "int8", {}, QUERIES, 65504.0, None),
        ("openvino", "int8", {}, QUERIES, 8e6, None),
        ("openvino", "int8", {}, QUERIES, 9e6, "beyond"),
        ("openvino", "int4", {}, QUERIES, 4e5, None),
        ("openvino", "int4", {}, QUERIES, 6e5, "beyond"),
        ("openvino", "fp16", {}, QUERIES, 65536.0, "beyond"),
        ("openvino", "int4", {}, QUERIES, 1e-4, None),
        ("openvino", "int4", {}, QUERIES, 1e-5, "below"),
        ("openvino", "int4", {"ratio": 0.8}, QUERIES, 1e-4, "below"),
        ("openvino", "int4", {}, EMBEDDING, 1e-4, "below"),
        ("openvino", "int4", {"backup": "fp", "output_layer_bits": 4}, EMBEDDING, 1e-12, None),
        ("openvino", "int4", {"output_layer_bits": 4}, "lm_head.weight", 1e-4, None),
        ("openvino", "int4", {}, NORM, 1e-12, None),
        ("openvino", "int4", {}, NORM, 1e9, None),
        ("openvino", "fp16", {}, QUERIES, 1e-4, None),
        ("openvino", "fp16", {}, QUERIES, 1e-5, "below"),
        ("openvino", "fp16", {}, NORM, 1e9, None),
        ("onnx", "int8", {}, QUERIES, 1e-30, None),
        ("onnx", "int4", {}, QUERIES, 1e30, None),
        ("onnx", "int4", {}, QUERIES, 3e38, "too large for sums in float32"),
        ("onnx", "fp16", {}, NORM, 1e5, "beyond"),
        ("onnx", "fp16", {}, NORM, 1e-5, "below"),
        ("onnx", "fp32", {}, QUERIES, 1e-30, None),
    ],
)
def test_what_each_recipe_can_hold(
    tmp_path: Path, format: str, weights: str, options: dict[str, object], name: str, value: float, refused: str | None
) -> None:
    checkpoint = opened(make_mistral(tmp_path / "model", dtype="bfloat16"), tmp_path / "workspace")
    largest = read_magnitudes(checkpoint) | {name: value}
    recipe = choose_recipe(format, weights, options)
    if refused is None:
        require_range(largest, checkpoint, recipe)
        return
    with pytest.raises(ExportError, match=f"{name} has .*{refused}") as caught:
        require_range(largest, checkpoint, recipe)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("openvino", {"weights": "int8"}),
        ("openvino", {"weights": "int4", "recipe": "fast"}),
        ("openvino", {"weights": "fp16"}),
        ("onnx", {"weights": "fp16"}),
    ],
)
def test_rows_far_below_float16_become_zeros(tmp_path: Path, format: str, options: dict[str, str]) -> None:
    """As checkpoints have them for tokens that were never seen."""
    folder = make_mistral(tmp_path / "model", head_dim=32, dtype="bfloat16")
    for row, value in ((0, 1e-23), (1, 0.0), (2, 1e-39), (-1, 1e-23)):
        change(folder, EMBEDDING, lambda tensor, row=row, value=value: tensor[row].mul_(0).add_(value))
        change(folder, QUERIES, lambda tensor, row=row, value=value: tensor[row].mul_(0).add_(value))
    manifest = normistral.export_model(str(folder), tmp_path / "out", format=format, **options)
    assert manifest.verified == "run"
    assert manifest.quality is not None
    assert manifest.quality["graph_error"] < 5e-3


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_onnx_holds_in_float32_what_float16_cannot(tmp_path: Path, recipe: str) -> None:
    folder = make_mistral(tmp_path / "model", head_dim=32, dtype="bfloat16")
    change(folder, QUERIES, lambda tensor: tensor.mul_(1e-7))
    change(folder, "model.layers.1.self_attn.k_proj.weight", lambda tensor: tensor.mul_(3e6))
    manifest = normistral.export_model(str(folder), tmp_path / "out", format="onnx", weights="int4", recipe=recipe)
    assert manifest.verified == "run"


def test_a_group_that_should_be_zeros_and_is_not_is_no_rounding(tmp_path: Path) -> None:
    from normistral.export.verify.stored import StoredMatrix
    from normistral.export.verify.weights import _compare

    rows = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    rows[0] *= 1e-23

    class Reader:
        def shape(self, name: str) -> tuple[int, ...]:
            return (4, 64)

        def read_rows(self, name: str, numbers: list[int]) -> np.ndarray:
            return rows[numbers]

    def compare(found: np.ndarray) -> None:
        _compare(StoredMatrix("m", 8, 32, 2.0**-12, lambda numbers: found[list(numbers)]), "m", 0, Reader())

    zeros = rows.copy()
    zeros[0] = 0
    compare(zeros)
    zeros[0, 5] = 0.1
    with pytest.raises(ExportError, match="weights near zero have become large"):
        compare(zeros)
    zeros[:] = 0
    with pytest.raises(ExportError, match="point elsewhere"):
        compare(zeros)
