"""Rounding to blocks, and the reader and writer that it streams between."""

import numpy as np
import onnx
import pytest
from checkpoint_headers import read_headers
from dequantise import dequantise
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_models import make_mistral

from normistral.errors import CheckpointError
from normistral.export.checkpoint import tensor as reading
from normistral.export.checkpoint.tensor import WeightReader
from normistral.export.onnx.graph import ALIGNMENT, ExternalData
from normistral.export.quantize.rtn import quantize_rtn
from normistral.export.quantize.scheme import QuantScheme

GRIDS = [QuantScheme(bits, group, symmetric) for bits in (4, 8) for group in (16, 32) for symmetric in (True, False)]
ROWS = arrays.arrays(np.float32, (3, 96), elements=st.floats(-1e4, 1e4, width=32))


def dequantize(rounded, grid):
    return dequantise(rounded.qweight, rounded.scales, rounded.zero_points, grid.bits, grid.group_size)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@given(rows=ROWS)
def test_no_weight_moves_by_more_than_its_step_allows(grid, rows):
    rounded = quantize_rtn(rows, grid)
    step = np.repeat(np.abs(rounded.scales), grid.group_size, axis=1)
    # Half a step; the symmetric grid has one code less on the side away from its largest weight: there a whole one.
    # An asymmetric zero point is a whole code, which may move a weight by another half.
    allowed = step * 1.001 + 2**grid.bits * 1e-37  # scales below 1e-38 count as zero
    assert (np.abs(dequantize(rounded, grid) - rows) <= allowed).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_most_weights_move_by_half_a_step_at_most(grid):
    rows = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    rounded = quantize_rtn(rows, grid)
    step = np.repeat(np.abs(rounded.scales), grid.group_size, axis=1)
    moved = np.abs(dequantize(rounded, grid) - rows) <= 0.501 * step
    assert moved.mean() > 0.95


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_stay_exactly_where_they_are(grid):
    low = -(2 ** (grid.bits - 1)) if grid.symmetric else 0
    codes = np.random.default_rng(1).integers(low, low + 2**grid.bits, (8, 96))
    codes[:, :: grid.group_size] = low  # both ends of the grid occur in every block
    codes[:, 1 :: grid.group_size] = low + 2**grid.bits - 1
    rows = (codes * 0.25).astype(np.float32)
    np.testing.assert_array_equal(dequantize(quantize_rtn(rows, grid), grid), rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_of_zeros_stay_zeros(grid):
    rounded = quantize_rtn(np.zeros((2, 96), np.float32), grid)
    assert np.isfinite(rounded.scales).all()
    np.testing.assert_array_equal(dequantize(rounded, grid), 0)


def test_an_odd_number_of_zero_points_is_filled_up():
    grid = QuantScheme(4, 32, symmetric=False)
    rounded = quantize_rtn(np.random.default_rng(2).standard_normal((5, 96)).astype(np.float32), grid)
    assert rounded.zero_points.shape == (5, grid.zero_point_bytes(96)) == (5, 2)
    assert (rounded.zero_points[:, 1] >> 4 == 0).all()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"shards": 3}, {"safetensors": False}], ids=["one", "shards", "bin"])
def test_the_reader_gives_what_torch_reads(tmp_path, monkeypatch, stored, options):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(reading, "_BLOCK_VALUES", 1000)  # several blocks to a matrix, the last one shorter
    folder = make_mistral(tmp_path / "model", dtype=stored, **options)
    reader = WeightReader(read_headers(folder).tensors)
    for name, parameter in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").named_parameters():
        expected = parameter.detach().float().numpy()
        found = np.concatenate(list(reader.blocks(name))) if expected.ndim == 2 else reader.read(name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_a_checkpoint_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    folder = make_mistral(tmp_path / "model")
    reader = WeightReader(read_headers(folder).tensors)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        list(reader.blocks("lm_head.weight"))


def test_tensors_in_the_data_file_start_on_pages_of_their_own(tmp_path):
    first, second = np.arange(5, dtype=np.float32), np.arange(12, dtype=np.uint8).reshape(3, 4)
    with ExternalData(tmp_path / "data") as data:
        tensors = [
            data.write("first", onnx.TensorProto.FLOAT, (5,), [first[:2], first[2:]]),
            data.write("second", onnx.TensorProto.UINT8, (3, 4), [second]),
        ]
    for tensor, expected in zip(tensors, (first, second), strict=True):
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert int(where["offset"]) % ALIGNMENT == 0
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor, str(tmp_path)), expected)
