"""Our own products of int4 weights: the operator against plain arithmetic, and models that use it."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from importlib.resources import files

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from tiny_models import make_mistral

import normistral
from normistral.artifact.artifact import Artifact
from normistral.commands.doctor import doctor_lines
from normistral.errors import EngineError, ResourceError, SessionError, UsageError
from normistral.hardware import INT8_DOT_PRODUCT, read_machine
from normistral.runtime.collect_env import collect_env
from normistral.runtime.engines.openvino import load_openvino
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.kernels.compiler import VARIANTS
from normistral.runtime.kernels.library import build_library, find_library, library_path, open_library
from normistral.runtime.kernels.openvino_int4 import pack_products, replace_products
from normistral.tuning import predict, settings_kl

OURS = {"int4_kernel": "normistral"}
RUNNABLE = [variant for variant in VARIANTS if read_machine().instruction_sets >= variant.needed]


def rounded_product(rows, groups, group, *, kind="u4", transpose=True, seed=0):
    """A model x @ weights.T as NNCF writes it, codes - zeros [rows, groups, group], and scales [rows, groups, 1]."""
    random = np.random.default_rng(seed)
    low = -8 if kind == "i4" else 0
    codes = random.integers(low, low + 16, (rows, groups, group))
    zeros = random.integers(low, low + 16, (rows, groups, 1)) if kind == "u4" else np.zeros((rows, groups, 1), int)
    scales = random.uniform(0.01, 0.1, (rows, groups, 1)).astype(np.float16)
    x = ops.parameter([-1, -1, groups * group if transpose else rows], ov.Type.f32, name="x")

    def four_bits(values):
        constant = ov.op.Constant(getattr(ov.Type, kind), ov.Shape(values.shape), values.reshape(-1).tolist())
        return ops.convert(constant, "f16")

    weights = four_bits(codes)
    if kind == "u4":
        weights = ops.subtract(weights, four_bits(zeros))
    weights = ops.multiply(weights, ops.constant(scales))
    weights = ops.convert(ops.reshape(weights, ops.constant(np.array([rows, groups * group])), False), "f32")
    return ov.Model([ops.matmul(x, weights, False, transpose)], [x]), codes - zeros, scales.astype(np.float32)


def wide_product(rows, columns, *, kind="u8", zeros_given=True, extremes=None, seed=0):
    """A model x @ weights.T of 8-bit weights with a scale for each row, as NNCF writes it; and weights [rows, columns].

    Args:
        extremes: all codes and all zero points.
    """
    random = np.random.default_rng(seed)
    low = -128 if kind == "i8" else 0
    codes = random.integers(low, low + 256, (rows, columns))
    codes[:, :2] = low, low + 255
    zeros = random.integers(low, low + 256, (rows, 1)) if zeros_given else np.zeros((rows, 1), int)
    if extremes is not None:
        codes[:], zeros[:] = extremes
    scales = random.uniform(0.01, 0.1, (rows, 1)).astype(np.float16)
    x = ops.parameter([-1, -1, columns], ov.Type.f32, name="x")
    kept = np.dtype(np.int8 if kind == "i8" else np.uint8)
    weights = ops.convert(ops.constant(codes.astype(kept)), "f16")
    if zeros_given:
        weights = ops.subtract(weights, ops.convert(ops.constant(zeros.astype(kept)), "f16"))
    weights = ops.convert(ops.multiply(weights, ops.constant(scales)), "f32")
    return ov.Model([ops.matmul(x, weights, False, True)], [x]), (codes - zeros) * scales.astype(np.float64)


def expected_product(x, values, scales):
    """The same by the definition: activations rounded in groups, exact sums, groups added in float64."""
    rows, groups, group = values.shape
    grouped = x.reshape(-1, groups, group).astype(np.float64)
    steps = np.abs(grouped).max(axis=2, keepdims=True) / 127
    rounded = np.divide(grouped, steps, out=np.zeros_like(grouped), where=steps > 0).round()
    sums = np.einsum("tgk,rgk->trg", rounded, values)
    return (sums * scales[:, :, 0] * steps[:, None, :, 0]).sum(axis=2).reshape(*x.shape[:2], rows)


@pytest.fixture(params=RUNNABLE, ids=lambda variant: variant.name)
def pack(compiled_home, every_kernel, tmp_path, request):
    """Weights of a model that no file holds, for each version of the operator that can run here."""
    library = every_kernel[request.param]
    numbers = itertools.count()

    def pack(model):
        file = tmp_path / f"{next(numbers)}.xml"
        file.with_suffix(".bin").touch()
        return pack_products(model, file, open_library(library))

    return pack


def run(model, pack, x):
    core, packed = ov.Core(), pack(model)
    replace_products(core, model, packed)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(x)[0], packed


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 11, 12, 13, 25])
@pytest.mark.parametrize(
    ("kind", "rows", "groups", "group"), [("u4", 96, 3, 128), ("i4", 64, 5, 64), ("u4", 32, 3, 32)]
)
def test_the_operator_computes_what_its_file_says(pack, kind, rows, groups, group, tokens):
    model, values, scales = rounded_product(rows, groups, group, kind=kind)
    x = np.random.default_rng(1).standard_normal((1, tokens, groups * group)).astype(np.float32)
    x[0, 0, :group] = 0  # a group that has no scale
    found, _ = run(model, pack, x)
    expected = expected_product(x, values, scales)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 12, 25])
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "zeros_given"),
    [("u8", 96, 384, True), ("i8", 64, 320, False), ("i8", 64, 128, True), ("u8", 32, 96, True)],
)
def test_weights_of_8_bits_lose_nothing_beside_their_rounding(pack, kind, rows, columns, zeros_given, tokens):
    """Activations have 16 bits: 2 ** -16 of the largest of a group is the most that one is off."""
    model, weights = wide_product(rows, columns, kind=kind, zeros_given=zeros_given)
    random = np.random.default_rng(1)
    x = random.standard_normal((1, tokens, columns)).astype(np.float32)
    x[0, 0, :32] *= 100  # an outlier's group
    x[0, -1, : columns // 2] = 0
    found, packed = run(model, pack, x)
    assert len(packed.numbers) == 1
    expected = x.astype(np.float64) @ weights.T
    bound = np.abs(x).max(axis=2, keepdims=True) / 127 / 256 / 2 * np.abs(weights).sum(axis=1)
    assert (np.abs(found - expected) <= bound + 1e-6 * np.abs(expected).max()).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_8_bit_values_fit(pack, sign):
    x = np.full((1, 9, 256), sign, np.float32)
    for extremes in ((255, 0), (0, 255)):
        model, weights = wide_product(32, 256, extremes=extremes)
        found, _ = run(model, pack, x)
        assert np.abs(found[0] / (x[0].astype(np.float64) @ weights.T) - 1).max() < 1e-6


def test_no_tokens_give_none(pack):
    for model in (rounded_product(64, 2, 128)[0], wide_product(64, 256)[0]):
        found, _ = run(model, pack, np.empty((1, 0, 256), np.float32))
        assert found.shape == (1, 0, 64)


def test_a_token_does_not_depend_on_how_many_come_with_it(pack):
    x = np.random.default_rng(1).standard_normal((1, 31, 256)).astype(np.float32)
    for make in (lambda: rounded_product(64, 2, 128)[0], lambda: wide_product(64, 256)[0]):
        together, _ = run(make(), pack, x)
        for token in range(31):
            alone, _ = run(make(), pack, x[:, token : token + 1])
            assert np.array_equal(alone[0, 0], together[0, token])


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_touches_no_other_token(pack, odd):
    x = np.ones((1, 3, 256), np.float32)
    x[0, 1, 200] = odd
    for model in (rounded_product(64, 2, 128)[0], wide_product(64, 256)[0]):
        found, _ = run(model, pack, x)
        assert not np.isfinite(found[0, 1]).any()
        assert np.array_equal(found[0, 0], found[0, 2])
        assert np.isfinite(found[0, 0]).all()


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 48, "groups": 2, "group": 64},  # no whole number of tiles
        {"rows": 64, "groups": 1, "group": 256},
        {"rows": 64, "groups": 4, "group": 16},
        {"rows": 64, "groups": 2, "group": 64, "transpose": False},
    ],
)
def test_what_does_not_suit_the_kernel_is_left_to_openvino(pack, options):
    assert pack(rounded_product(**options)[0]) is None


@pytest.mark.parametrize("shape", [(48, 128), (64, 80)])
def test_8_bit_weights_of_other_widths_are_left_to_openvino(pack, shape):
    assert pack(wide_product(*shape)[0]) is None


def test_a_model_uses_it_where_it_is_compiled_and_says_so(demo_int4, int4_library):
    question = "What is the capital of Norway?"
    with normistral.load(demo_int4) as ours, normistral.load(demo_int4, settings={"int4_kernel": "openvino"}) as theirs:
        assert ours.capabilities.settings["int4_kernel"] == "normistral"
        assert theirs.capabilities.settings["int4_kernel"] == "openvino"
        answers = [model.chat().send(question, temperature=0.0).text for model in (ours, theirs)]
    assert all("Oslo" in answer for answer in answers)
    lines = "\n".join(doctor_lines(collect_env()))
    assert f"from the store: {int4_library}" in lines


def test_its_loss_is_that_of_activations_rounded_to_8_bits(demo_int4, int4_library):
    """Mean KL divergence from exact arithmetic, in nats; OpenVINO rounds them too where it has dot products of int8."""
    text = files("normistral.export").joinpath("texts/english.txt").read_text(encoding="utf-8")
    losses = {}
    with normistral.load(demo_int4, exact=True) as exact:
        ids = exact.tokenizer.encode(text)[:256]
        reference = predict(exact, ids)
    for kernel in ("normistral", "openvino"):
        with normistral.load(demo_int4, settings={"int4_kernel": kernel}) as model:
            losses[kernel] = settings_kl(reference, model, ids)
    assert 0 < losses["normistral"] < 0.01
    if read_machine().instruction_sets & INT8_DOT_PRODUCT:
        assert losses["normistral"] < 1.25 * losses["openvino"]


def test_int8_artifacts_use_it_and_lose_nothing_that_could_be_told(int4_library, tmp_path):
    checkpoint = make_mistral(tmp_path / "checkpoint", layers=2, head_dim=16, vocab=320)
    folder = tmp_path / "int8"
    normistral.export_model(str(checkpoint), folder, weights="int8")
    ids = np.random.default_rng(1).integers(0, 300, 64).tolist()
    with normistral.load(folder, exact=True) as exact:
        assert "int4_kernel" not in exact.capabilities.settings
        reference = predict(exact, ids)
    with normistral.load(folder) as ours, normistral.load(folder, settings={"int4_kernel": "openvino"}) as theirs:
        assert ours.capabilities.settings["int4_kernel"] == "normistral"
        losses = [settings_kl(reference, model, ids) for model in (ours, theirs)]  # both have a KV cache of 8 bits
    assert losses[0] < 1.25 * losses[1]
    file = folder / "openvino_model.xml"
    packed = pack_products(ov.Core().read_model(file), file, open_library(find_library(read_machine())))
    assert len(packed.numbers) == 2 * 7 + 1  # every matrix of both layers, and the output layer


def test_an_engine_outlives_the_backend_it_came_from(tiny_int4, int4_library):
    backend = load_openvino(Artifact.open(tiny_int4, verify=False), EngineConfig(settings=OURS))
    engine = backend.create_engine()
    before = engine.forward([1, 2, 3])
    engine.reset()
    backend.close()
    del backend
    gc.collect()
    assert np.array_equal(engine.forward([1, 2, 3]), before)


def test_sessions_are_not_carried_from_one_arithmetic_to_the_other(tiny_int4, int4_library, tmp_path):
    path = tmp_path / "session"
    with normistral.load(tiny_int4) as ours:
        ours.prefill("Oslo er hovedstaden i Norge.").save(path)
        ours.restore_prefix(path).close()
    with (
        normistral.load(tiny_int4, settings={"int4_kernel": "openvino"}) as theirs,
        pytest.raises(SessionError, match="int4_kernel"),
    ):
        theirs.restore_prefix(path)


def test_exact_arithmetic_does_without(tiny_int4, int4_library):
    with normistral.load(tiny_int4, exact=True) as model:
        assert "int4_kernel" not in model.capabilities.settings
    with pytest.raises(UsageError, match="reference arithmetic"):
        normistral.load(tiny_int4, exact=True, settings=OURS)


def test_asked_for_where_it_is_not_there_it_is_an_error_with_the_way_out(
    tiny_int4, tmp_path, monkeypatch, no_packaged_kernel
):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="int4_kernel cannot be normistral") as caught:
        normistral.load(tiny_int4, settings=OURS)
    assert caught.value.hint in ("compile it: normistral build-kernel", "say openvino")
    with normistral.load(tiny_int4) as model:  # not asked for, OpenVINO's own serve
        assert model.capabilities.settings["int4_kernel"] == "openvino"


def test_other_weights_know_no_such_setting(tiny_fp16):
    with pytest.raises(UsageError, match="no setting 'int4_kernel'"):
        normistral.load(tiny_fp16, settings=OURS)


def test_a_processor_without_the_instructions_is_told_which_it_lacks():
    old = replace(read_machine(), instruction_sets=frozenset({"avx", "fma"}))
    assert find_library(old) is None
    with pytest.raises(EngineError, match=r"avx2, f16c|Linux on x86-64"):
        build_library(old)


def test_a_compiler_that_is_missing_or_fails_leaves_nothing_behind(int4_library, tmp_path, monkeypatch):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EngineError, match="CXX names no-such-compiler, which is not there"):
        build_library(read_machine())
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(EngineError, match="failed"):
        build_library(read_machine())
    assert not library_path(read_machine()).exists()
    assert list(tmp_path.rglob("*.so")) == []


def test_a_store_that_is_no_folder_is_an_error(int4_library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="cannot write"):
        build_library(read_machine())


def test_a_damaged_library_is_not_used_and_said_so(tiny_int4, int4_library, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NORMISTRAL_HOME", str(tmp_path))
    library_path(read_machine()).parent.mkdir(parents=True)
    library_path(read_machine()).write_bytes(int4_library.read_bytes()[:1000])
    with normistral.load(tiny_int4) as model:
        assert model.capabilities.settings["int4_kernel"] == "openvino"
    assert "damaged" in caplog.text
    assert "build-kernel" in caplog.text
    with pytest.raises(EngineError, match="damaged") as caught:
        normistral.load(tiny_int4, settings=OURS)
    assert "build-kernel" in caught.value.hint
