"""Scale search, GPTQ and the calibration that feeds them."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from peak_memory import peak_bytes
from tiny_bloom import make_bloom
from tiny_models import make_llama, make_mistral

from normistral.errors import ExportError
from normistral.export import resources
from normistral.export.checkpoint.locate import locate
from normistral.export.checkpoint.open import open_checkpoint
from normistral.export.quantize import calibrate as calibrate_module
from normistral.export.quantize import plan
from normistral.export.quantize.calibrate import quantize_layers
from normistral.export.quantize.gptq import HessianFactor, correct, factorize, mean_squares, quantize_gptq
from normistral.export.quantize.plan import QuantPlan, calibration_windows
from normistral.export.quantize.rtn import minmax_params, quantize
from normistral.export.quantize.scale_search import search_params, weighted_error
from normistral.export.quantize.scheme import QuantParams, QuantScheme, dequantize, round_scales, unpack
from normistral.export.quantize.tensor_store import QuantizedTensorStore
from normistral.export.reference.model import load_model
from normistral.progress import NoProgress, Uncounted

GRIDS = [
    QuantScheme(bits, group, symmetric, float16_scales=True)
    for bits in (4, 8)
    for group in (16, 32)
    for symmetric in (True, False)
]
ROWS = arrays.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32))
IMPORTANCE = arrays.arrays(np.float32, (64,), elements=st.floats(0, 100, width=32))


def half(steps):
    return QuantParams(steps.scales.astype(np.float16).astype(np.float32), steps.zero_points)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated_inputs(columns, tokens=400):
    return gaussian(tokens, columns, seed=1) @ gaussian(columns, columns, seed=2) + gaussian(1, columns, seed=3)


def output_error(rows, restored, inputs):
    return float(np.square((rows - restored) @ inputs.T).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=25)
@given(rows=ROWS, importance=IMPORTANCE)
def test_the_search_is_never_worse_than_the_span_in_any_block(grid, rows, importance):
    found = search_params(rows, grid, importance)
    assert np.isfinite(found.scales).all()
    assert (found.zero_points == np.clip(np.rint(found.zero_points), 0, grid.top)).all()
    np.testing.assert_array_equal(found.scales, half(found).scales)
    plain = weighted_error(rows, half(minmax_params(rows, grid)), grid, importance)
    energy = (rows**2 * importance).reshape(len(rows), -1, grid.group_size).sum(axis=-1)
    assert (weighted_error(rows, found, grid, importance) <= plain * (1 + 1e-4) + 1e-9 * energy).all()


@np.errstate(over="ignore")
def test_float32_scales_differ_from_float16_ones_only_beyond_its_range():
    scales = np.float32([[1e-20, 1e-6, -3e-5, 0, 1e-3, -0.3, 60000, 1e6, 3e30]])
    steps = QuantParams(scales, np.zeros_like(scales))
    np.testing.assert_array_equal(
        round_scales(steps, QuantScheme(4, 32, True, float16_scales=True)).scales, half(steps).scales
    )
    found = round_scales(steps, QuantScheme(4, 32, True)).scales
    held = (np.abs(scales) >= 2.0**-14) & (np.abs(scales) <= 65504)
    np.testing.assert_array_equal(found, np.where(held, half(steps).scales, scales))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_takes_a_quarter_off_the_error_of_gaussian_weights_with_uneven_inputs(symmetric):
    grid, rows, importance = QuantScheme(4, 32, symmetric), gaussian(64, 128), np.exp(2 * gaussian(128, seed=4))
    plain = weighted_error(rows, half(minmax_params(rows, grid)), grid, importance).sum()
    found = weighted_error(rows, search_params(rows, grid, importance), grid, importance).sum()
    assert found < 0.75 * plain


def test_chunks_of_the_search_are_put_together_in_order():
    grid, rows, importance = QuantScheme(4, 64, True), gaussian(5000, 64), np.ones(64, np.float32)
    found = search_params(rows, grid, importance)
    one = search_params(rows[4321:4322], grid, importance)
    np.testing.assert_array_equal(found.scales[4321:4322], one.scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_correlation_gptq_rounds_to_nearest(grid):
    rows = gaussian(24, 160 if grid.group_size == 16 else 192)
    steps = half(minmax_params(rows, grid))
    codes = quantize_gptq(rows, factorize(torch.eye(rows.shape[1]) * 3), steps, grid)
    np.testing.assert_array_equal(codes, quantize(rows, steps, grid))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 192])  # less than one batch of columns, and more
def test_gptq_halves_the_outputs_error_on_correlated_inputs(columns, symmetric):
    grid, rows, inputs = QuantScheme(4, 32, symmetric), gaussian(48, columns), correlated_inputs(columns)
    steps = half(minmax_params(rows, grid))
    plain = dequantize(quantize(rows, steps, grid), steps, grid)
    codes = quantize_gptq(rows, factorize(torch.from_numpy(inputs)), steps, grid)
    assert output_error(rows, dequantize(codes, steps, grid), inputs) < 0.5 * output_error(rows, plain, inputs)


@pytest.mark.parametrize("group", [32, 64])  # 64: one group a row
def test_gptq_leaves_its_arguments_as_they_are(group):
    grid, rows, inputs = QuantScheme(8, group, False), gaussian(48, 64), correlated_inputs(64)
    steps = half(minmax_params(rows, grid))
    before = [values.copy() for values in (rows, steps.scales, steps.zero_points)]
    quantize_gptq(rows, factorize(torch.from_numpy(inputs)), steps, grid)
    for values, old in zip((rows, steps.scales, steps.zero_points), before, strict=True):
        np.testing.assert_array_equal(values, old)


def test_gptq_takes_inputs_that_are_fewer_than_columns_or_always_zero():
    grid, rows = QuantScheme(4, 32, True), gaussian(16, 64)
    inputs = gaussian(10, 64)
    inputs[:, 5:9] = 0
    steps = half(minmax_params(rows, grid))
    codes = quantize_gptq(rows, factorize(torch.from_numpy(inputs)), steps, grid)
    error = output_error(rows, dequantize(codes, steps, grid), inputs)
    assert error < output_error(rows, dequantize(quantize(rows, steps, grid), steps, grid), inputs)
    silent = quantize_gptq(rows, factorize(torch.zeros(64, 64)), steps, grid)
    np.testing.assert_array_equal(silent, quantize(rows, steps, grid))


def own_inputs(inputs, seed=4):
    """Inputs that follow from `inputs`, with an error of two per cent."""
    columns = inputs.shape[1]
    return inputs + np.float32(0.02) * inputs @ gaussian(columns, columns, seed=seed)


@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_correction_lessens_the_error_towards_the_own_inputs_outputs(columns, share):
    grid, rows, inputs = QuantScheme(4, 32, False), gaussian(48, columns), correlated_inputs(columns, tokens=2000)
    own = own_inputs(inputs)
    found = factorize(torch.from_numpy(inputs), own=torch.from_numpy(own), share=share)
    errors = []
    for wanted in (rows, correct(torch.from_numpy(rows.copy()), found).numpy()):
        steps = half(minmax_params(wanted, grid))
        codes = quantize_gptq(wanted, found, steps, grid)
        errors.append(float(np.square(rows @ own.T - dequantize(codes, steps, grid) @ inputs.T).sum()))
    assert errors[1] < (1 - 0.2 * share) * errors[0]


@pytest.mark.parametrize("of_own", [500, 2000])  # the first tokens, and all
def test_the_correction_is_handed_on_from_column_to_column(of_own):
    """Column by column: each takes over, from those that are rounded before it, what it can explain of their error."""
    rows, inputs = torch.from_numpy(gaussian(8, 48)), torch.from_numpy(correlated_inputs(48, tokens=2000))
    own = torch.from_numpy(own_inputs(inputs.numpy()))[:of_own]
    found = factorize(inputs, own=own, share=0.5)
    order = found.order
    hessian = (inputs.T @ inputs / len(inputs)).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    hessian = hessian[order][:, order]
    moments = ((own - inputs[:of_own]).T @ inputs[:of_own] / of_own)[order][:, order].double()
    expected = rows[:, order].double()
    for column in reversed(range(1, len(order))):
        share = torch.linalg.solve(hessian[:column, :column], moments[column, :column])
        expected[:, :column] += 0.5 * expected[:, column : column + 1] * share
    corrected = correct(rows.clone(), found)[:, order]
    torch.testing.assert_close(corrected, expected.float(), atol=1e-3, rtol=1e-3)


def test_own_inputs_that_are_the_inputs_correct_nothing():
    inputs = torch.from_numpy(correlated_inputs(64))
    assert torch.equal(factorize(inputs, own=inputs, share=0.5).correction, torch.zeros(64, 64))


def test_gptq_refuses_inputs_that_are_no_numbers():
    with pytest.raises(ExportError, match="computes values that are not numbers"):
        factorize(torch.full((40, 32), torch.nan))


def test_windows_come_from_all_texts_in_turn_and_have_one_length(monkeypatch):
    monkeypatch.setattr(plan, "CALIBRATION_TOKENS", resources.CALIBRATION_TOKENS)
    seen = []

    def encode(text):
        seen.append(text)
        return [len(seen)] * len(text)

    windows = calibration_windows(encode, 4096)
    assert {len(window) for window in windows} == {512}
    assert [window[0] for window in windows[:5]] == [1, 2, 3, 4, 1]
    assert sum(map(len, windows)) == 8192
    assert {len(window) for window in calibration_windows(encode, 100)} == {100}


# Calibration

WINDOWS = [np.random.default_rng(seed).integers(5, 200, 48).tolist() for seed in range(6)]
MODELS = {
    "mistral": lambda folder, **options: make_mistral(folder, sliding_window=16, **options),
    "llama": lambda folder, **options: make_llama(folder, dtype="bfloat16", tied=True, **options),
    "bloom": lambda folder, **options: make_bloom(folder, **options),
}


def calibrate(folder, scratch, plan, windows=WINDOWS):
    scratch.mkdir()
    (scratch / "tables").mkdir()
    checkpoint = open_checkpoint(locate(str(folder), progress=NoProgress()), scratch, progress=NoProgress())
    tables = QuantizedTensorStore(scratch / "tables")
    quantize_layers(checkpoint, plan, windows, tables, Uncounted())
    return checkpoint, tables


def inputs_of(model, names):
    """Inputs [tokens, columns] of matrices while all windows pass through the model."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(given[0][0])
        )
        for name in names
    ]
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def restored(tables, name):
    rounded, grid = tables.read(name), tables.schemes[name]
    zeros = np.full_like(rounded.scales, grid.middle)
    if rounded.zero_points is not None:
        zeros = unpack(rounded.zero_points, grid.bits)[:, : zeros.shape[1]].astype(np.float32)
    return dequantize(unpack(rounded.qweight, grid.bits), QuantParams(rounded.scales, zeros), grid)


@pytest.mark.parametrize("correction", [0.0, 1.0])
@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_is_rounded_for_the_inputs_that_the_rounded_layers_before_it_give(
    kind, correction, tmp_path, monkeypatch
):
    """The whole model in transformers, all matrices rounded, gives the second layer's inputs: the same codes.

    A matrix's inputs depend on those before it only, so that all may be rounded. With a correction, the model as it was
    gives the checkpoint's own inputs.
    """
    monkeypatch.setattr(calibrate_module, "_FAST_BFLOAT16", set())  # in float32, as the model below
    folder = MODELS[kind](tmp_path / "model")
    plan = QuantPlan("gptq", 4, 16, symmetric=False, correction=correction)
    checkpoint, tables = calibrate(folder, tmp_path / "scratch", plan)
    model = load_model(checkpoint, "float32")
    state = {name: parameter for name, parameter in model.named_parameters() if name in tables.schemes}
    assert state.keys() == tables.schemes.keys()
    last = [name for name in state if f"{checkpoint.family.layer_prefix}1." in name]
    assert 2 * len(last) == len(state)
    exact = {name: state[name].detach().numpy().copy() for name in last}
    own = inputs_of(model, last)
    with torch.no_grad():
        for name in state:
            state[name].copy_(torch.from_numpy(restored(tables, name)))
    for name, inputs in inputs_of(model, last).items():
        rows, factor, scheme = exact[name], factorize(inputs), plan.scheme(inputs.shape[1])
        if correction and inputs.shape[1] < 2 * model.config.hidden_size:
            factor = factorize(inputs, own=own[name], share=correction)
            rows = correct(torch.from_numpy(rows.copy()), factor).numpy()
            grid = minmax_params(rows, scheme)
            assert (quantize(rows, grid, scheme) != quantize(exact[name], grid, scheme)).mean() > 0.01, name
        steps = search_params(rows, scheme, mean_squares(inputs).numpy())
        codes = quantize_gptq(rows, factor, steps, scheme)
        same = (codes == unpack(tables.read(name).qweight, 4)).mean()
        assert same > 0.995, name  # sums in another order turn a code here and there


@pytest.mark.parametrize("method", ["search", "gptq"])
def test_two_calibrations_give_the_same_bytes(method, tmp_path):
    folder = make_mistral(tmp_path / "model")
    for name in ("first", "second"):
        calibrate(folder, tmp_path / name, QuantPlan(method, 4, 16, symmetric=True))
    files = sorted((tmp_path / "first" / "tables").iterdir())
    assert len(files) == 2 * 14  # codes and scales
    for file in files:
        assert file.read_bytes() == (tmp_path / "second" / "tables" / file.name).read_bytes()


def test_no_factor_of_a_layer_is_held_while_the_next_one_runs(tmp_path, monkeypatch):
    """At the 7B's widths the last one and its inputs take 1.3 GB."""
    record, held = calibrate_module._record_inputs, []

    def watched(*arguments):
        held.append([each for each in gc.get_objects() if isinstance(each, HessianFactor)])
        return record(*arguments)

    monkeypatch.setattr(calibrate_module, "_record_inputs", watched)
    plan = QuantPlan("gptq", 4, 16, symmetric=False, correction=0.5)
    calibrate(make_mistral(tmp_path / "model"), tmp_path / "scratch", plan)
    assert held == [[], []]


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """Twelve more layers are 50 MB in float32; neither rounding nor the choice of matrices for 8 bits keeps them."""
    peaks = peak_bytes(tmp_path)
    assert peaks.keys() == {"round_layers", "sensitivity"}
    for of_layers in peaks.values():
        assert of_layers[14] < of_layers[2] + 15e6, peaks
