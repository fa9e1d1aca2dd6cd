"""Sessions on real engines: caches come back bit by bit, in another process, and not with other settings."""

import json
import sys

import numpy as np
import pytest
from fork_server import run_forked
from hypothesis import given
from hypothesis import strategies as st

import normistral
from normistral import hardware
from normistral.artifact.artifact import Artifact
from normistral.errors import EngineError, SessionError
from normistral.runtime.engines.openvino_stateful import pack, packed_kinds, unpack
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

STATEFUL = "openvino-fp16-stateful"
EXPORTS = ("openvino-fp16", STATEFUL, "onnx-fp16-plain", "onnx-fp32-fused", "onnx-int4")
TOKENS = np.random.default_rng(0).integers(5, 261, 48).tolist()
OPTIONS = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
SHORT = OPTIONS | {"max_new_tokens": 2}  # the context has 64 tokens


@pytest.fixture(params=EXPORTS)
def export(request):
    return request.param


@pytest.fixture
def artifact(export, request):
    if export.startswith("openvino"):
        return request.getfixturevalue("tiny_fp16")
    return request.getfixturevalue("tiny_onnx")(export)


@pytest.fixture
def settings(export):
    return {"attention": "stateful"} if export == STATEFUL else {}


@pytest.mark.parametrize("exact", [False, True])
def test_a_restored_cache_is_the_saved_one_bit_by_bit(artifact, settings, exact):
    backend = load_backend(Artifact.open(artifact, verify=False), EngineConfig(exact=exact, settings=settings))
    engine, other = backend.create_engine(), backend.create_engine()
    engine.forward(TOKENS[:20])
    engine.forward(TOKENS[20:30])
    other.forward(TOKENS[:7])
    saved = list(engine.save(30))
    other.restore(30, saved)
    again = list(other.save(30))
    assert [tensor.name for tensor in again] == [tensor.name for tensor in saved]
    assert all(np.array_equal(old.array, new.array) for old, new in zip(saved, again, strict=True))
    assert other.length == 30
    assert np.array_equal(engine.forward(TOKENS[30:], last=18), other.forward(TOKENS[30:], last=18))


def test_the_beginning_of_a_cache_is_that_of_a_shorter_sequence(artifact, settings):
    backend = load_backend(Artifact.open(artifact, verify=False), EngineConfig(exact=False, settings=settings))
    engine, other, shorter = (backend.create_engine() for _ in range(3))
    engine.forward(TOKENS[:20])
    shorter.forward(TOKENS[:20])
    engine.forward(TOKENS[20:])
    other.restore(20, engine.save(20))
    assert np.array_equal(other.forward([7, 8], last=2), shorter.forward([7, 8], last=2))


@pytest.mark.parametrize("name", ["other", "past"])
def test_tensors_of_another_shape_never_reach_the_engine(artifact, settings, name):
    engine = load_backend(
        Artifact.open(artifact, verify=False), EngineConfig(exact=False, settings=settings)
    ).create_engine()
    engine.forward(TOKENS[:20])
    saved = list(engine.save(20))
    wrong = saved[0]._replace(name="x") if name == "other" else saved[0]._replace(array=saved[0].array[:, :1])
    with pytest.raises(EngineError, match="is not this model's"):
        engine.restore(20, [wrong, *saved[1:]])
    with pytest.raises(EngineError, match=r"has no (past_key_values|value_cache)"):
        engine.restore(20, saved[:-1])
    engine.reset()
    assert np.isfinite(engine.forward(TOKENS)).all()


IN_ANOTHER_PROCESS = """
import json, sys
import normistral
artifact, path, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with normistral.load(artifact) as model:
    chat, document = model.restore_chat(path + ".chat"), model.restore_prefix(path + ".prefix")
    answers = [chat.send("B", **options), document.generate("å?", **options)]
    print(json.dumps([[answer.token_ids, answer.timings.cached_tokens] for answer in answers]))
"""


def test_another_process_goes_on_with_the_same_tokens(artifact, tmp_path):
    with normistral.load(artifact) as model:
        chat, document = model.chat(), model.prefill("Blåbærsyltetøy på brød")
        chat.send("A", **SHORT)
        chat.save(tmp_path / "s.chat")
        document.save(tmp_path / "s.prefix")
        expected = [chat.send("B", **OPTIONS).token_ids, document.generate("å?", **OPTIONS).token_ids]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(artifact), str(tmp_path / "s"), json.dumps(OPTIONS)]
    done = run_forked(command, cwd=tmp_path, text=True, timeout=120, tools=True)
    assert done.returncode == 0, done.stderr
    (chat_ids, chat_cached), (document_ids, document_cached) = json.loads(done.stdout)
    assert [chat_ids, document_ids] == [list(ids) for ids in expected]
    assert chat_cached > 10
    assert document_cached > 20


def test_a_copied_beginning_gives_the_tokens_of_a_fresh_run(artifact, monkeypatch):
    monkeypatch.setattr("normistral.runtime.sequence.WORTH_COPYING", 8)
    with normistral.load(artifact, exact=True) as model:
        expected = model.chat(system="Abc").send("B", **OPTIONS)
        first, second = model.chat(system="Abc"), model.chat(system="Abc")
        first.send("A", **SHORT)
        answer = second.send("B", **OPTIONS)
        assert answer.timings.cached_tokens >= 8
        assert expected.timings.cached_tokens == 0
        assert answer.token_ids == expected.token_ids


def test_a_fork_goes_on_with_the_same_tokens(artifact):
    with normistral.load(artifact) as model:
        chat = model.chat()
        chat.send("A", **SHORT)
        fork = chat.fork()
        answer = fork.send("B", **OPTIONS)
        assert answer.timings.cached_tokens > 10
        assert chat.send("B", **OPTIONS).token_ids == answer.token_ids


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_other_settings_and_other_engines_are_refused(tiny_fp16, tiny_onnx, tmp_path, name):
    artifact = tiny_fp16 if name == "openvino" else tiny_onnx("onnx-int4")
    with normistral.load(artifact) as model:
        model.chat().save(tmp_path / "s")
    with normistral.load(artifact, exact=True) as model, pytest.raises(SessionError, match="was saved with") as caught:
        model.restore_chat(tmp_path / "s")
    assert {"openvino": "KV_CACHE_PRECISION", "onnx": "accuracy_level 4 instead of 1"}[name] in caught.value.message
    other = tiny_onnx("onnx-int4") if name == "openvino" else tiny_fp16
    with normistral.load(other) as model, pytest.raises(SessionError, match="another artifact and engine"):
        model.restore_chat(tmp_path / "s")


# OpenVINO's cache in few bytes


def quantise(rows):
    """As OpenVINO's CPU plugin does it: codes, scale and zero point of each row."""
    least, most = rows.min(-1, keepdims=True), rows.max(-1, keepdims=True)
    scale = (most - least) / np.float32(255)
    scale = np.where(scale == 0, np.float32(1e-4), scale)
    zero = -least / scale
    return np.rint(rows / scale + zero), scale, zero


def show(codes, scale, zero):
    """As a state shows it."""
    return ((codes - zero) * scale).astype(np.float32)


@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]))
def test_quantised_rows_come_back_as_the_same_codes_and_scales(seed, size, shift):
    rows = np.random.default_rng(seed).normal(shift, 1.0, (1, 2, 50, 64)).astype(np.float32) * np.float32(size)
    stored = quantise(rows)
    shown = show(*stored)
    packed = pack(shown, "u8")
    assert packed.dtype == np.uint8
    assert packed.shape == (1, 2, 50, 72)
    assert all(np.array_equal(old, new) for old, new in zip(stored, quantise(unpack(packed)), strict=True))


@pytest.mark.parametrize("shift", [-20.0, -8.0, -4.0, 4.0, 8.0, 20.0])
def test_rows_far_from_zero_are_shown_the_same(shift):
    rows = np.random.default_rng(0).normal(shift, 1.0, (1, 2, 2000, 64)).astype(np.float32)
    shown = show(*quantise(rows))
    packed = pack(shown, "u8")
    assert packed.dtype == np.uint8
    assert np.array_equal(show(*quantise(unpack(packed))), shown)


def test_rows_that_are_all_the_same_come_back():
    for value in (0.0, 1.5, -2.25):
        shown = show(*quantise(np.full((1, 1, 3, 16), value, np.float32)))
        assert np.array_equal(show(*quantise(unpack(pack(shown, "u8")))), shown)


@pytest.mark.parametrize("precision", ["u8", "f16", "bf16", "f32", "u4"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30])
def test_what_does_not_fit_is_kept_as_it_is(precision, odd):
    values = np.random.default_rng(0).normal(size=(1, 2, 5, 16)).astype(np.float32)
    values[0, 1, 2, 3] = odd
    assert pack(values, precision) is values
    assert np.array_equal(unpack(values), values, equal_nan=True)


@pytest.mark.parametrize(("precision", "dtype"), [("f16", np.float16), ("bf16", np.uint16)])
def test_sixteen_bits_are_two_bytes(precision, dtype):
    values = np.random.default_rng(0).normal(size=(1, 2, 5, 16)).astype(np.float16).astype(np.float32)
    if precision == "bf16":
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    packed = pack(values, precision)
    assert packed.dtype == dtype
    assert np.array_equal(unpack(packed), values)
    assert (packed.dtype, packed.shape) in packed_kinds(values.shape)


@pytest.mark.parametrize("precision", ["u8", "f16", "f32"])
def test_what_openvino_shows_is_what_packing_expects(tiny_fp16, precision, monkeypatch):
    """Of a quantised cache no tensor may fall back to float32: that would be quantised anew."""
    plan = hardware.plan_openvino
    monkeypatch.setattr(
        "normistral.hardware.plan_openvino", lambda *given: {**plan(*given), "KV_CACHE_PRECISION": precision}
    )
    backend = load_backend(
        Artifact.open(tiny_fp16, verify=False), EngineConfig(exact=False, settings={"attention": "stateful"})
    )
    assert backend.capabilities.kv_cache_key["KV_CACHE_PRECISION"] == precision
    engine, other = backend.create_engine(), backend.create_engine()
    engine.forward(TOKENS[:20])
    saved = list(engine.save(20))
    expected = {"u8": np.uint8, "f16": np.float16, "f32": np.float32}[precision]
    assert {tensor.array.dtype for tensor in saved} == {np.dtype(expected)}
    other.restore(20, saved)
    assert np.array_equal(engine.forward(TOKENS[20:], last=28), other.forward(TOKENS[20:], last=28))


def test_the_shortened_cache_is_the_old_one_bit_by_bit(tiny_fp16):
    backend = load_backend(
        Artifact.open(tiny_fp16, verify=False), EngineConfig(exact=False, settings={"attention": "stateful"})
    )
    engine, other = backend.create_engine(), backend.create_engine()
    engine.forward(TOKENS[:20])
    other.forward(TOKENS[:20])
    engine.forward([9] * 5)
    engine.trim(20)
    assert all(np.array_equal(a.array, b.array) for a, b in zip(engine.save(20), other.save(20), strict=True))


def test_threads_are_no_part_of_the_key(tiny_fp16):
    numerics = load_backend(Artifact.open(tiny_fp16, verify=False), EngineConfig(exact=False)).capabilities.kv_cache_key
    assert numerics.keys().isdisjoint({"INFERENCE_NUM_THREADS", "PERFORMANCE_HINT"})
