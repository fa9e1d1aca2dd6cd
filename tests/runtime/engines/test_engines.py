"""What every engine has to do, on a random checkpoint with the family's quirks, against transformers in float32.

The reference gets the weights that the artifact holds (rounded to float16, or dequantised by dequantise.py), and
the engine runs in `exact` mode, so that only the order of float32 sums differs. Tolerances are shares of the logits'
spread (largest minus smallest): for OpenVINO about ten times what was seen (2e-5), for onnxruntime too (2e-7 to 4e-7).
A dropped window or a wrong head size gives more than 1e-2 (test_onnx_engine.py).
"""

import numpy as np
import pytest
from dequantise import dequantised

import normistral
from normistral.artifact.artifact import Artifact
from normistral.errors import ClosedError
from normistral.runtime.engines.base import load_hint
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

TOLERANCES = {"openvino": 2e-4, "onnx": 5e-6}
STATEFUL = "openvino-fp16-stateful"  # the attention that other devices than the CPU take
ONNX_EXPORTS = ("onnx-fp32-plain", "onnx-fp32-fused", "onnx-int8", "onnx-int4", "onnx-int4-asymmetric")
EXPORTS = ("openvino-fp16", STATEFUL, *ONNX_EXPORTS)
TOKENS = np.random.default_rng(0).integers(5, 261, 48).tolist()  # three windows long


@pytest.fixture(scope="module", params=EXPORTS)
def export(request):
    return request.param


@pytest.fixture(scope="module")
def artifact(export, request):
    if export.startswith("openvino"):
        return request.getfixturevalue("tiny_fp16")
    return request.getfixturevalue("tiny_onnx")(export)


@pytest.fixture(scope="module")
def settings(export):
    return {"attention": "stateful"} if export == STATEFUL else {}


@pytest.fixture(scope="module")
def backend(artifact, settings):
    return load_backend(Artifact.open(artifact, verify=False), EngineConfig(exact=True, settings=settings))


@pytest.fixture
def engine(backend):
    return backend.create_engine()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, export, artifact):
    """Logits [48, vocabulary] of transformers in float32, with the artifact's weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    rounded = {} if export.startswith("openvino") else dequantised(artifact)
    assert len(rounded) == (16 if "int" in export else 0)  # 2 layers of 7 matrices, embedding and output layer
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in rounded:
                parameter.copy_(torch.from_numpy(rounded.pop(name)))
            elif parameter.ndim >= 2 and export.startswith("openvino"):
                parameter.copy_(parameter.half().float())
        assert not rounded
        return model(torch.tensor([TOKENS])).logits[0].numpy()


@pytest.fixture
def assert_close(export):
    tolerance = TOLERANCES[export.partition("-")[0]]

    def check(found, expected):
        spread = expected.max() - expected.min()
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= tolerance * spread

    return check


def test_prefill_at_once_matches_transformers_beyond_the_window(engine, reference, assert_close):
    assert_close(engine.forward(TOKENS, last=48), reference)


def test_token_by_token_matches_transformers_beyond_the_window(engine, reference, assert_close):
    assert_close(np.concatenate([engine.forward([token]) for token in TOKENS]), reference)


@pytest.mark.parametrize("cuts", [(1, 20), (16,), (15, 17, 33), (40, 41, 42)])
def test_any_chunking_matches_transformers(engine, reference, cuts, assert_close):
    starts, ends = (0, *cuts), (*cuts, 48)
    pieces = [engine.forward(TOKENS[a:b], last=b - a) for a, b in zip(starts, ends, strict=True)]
    assert_close(np.concatenate(pieces), reference)


def test_only_the_asked_for_positions_are_returned(engine, reference, assert_close):
    assert_close(engine.forward(TOKENS, last=3), reference[-3:])
    assert engine.length == 48


@pytest.mark.parametrize("length", [47, 30, 16, 1, 0])
def test_a_trimmed_sequence_goes_on_as_if_the_rest_had_never_been(engine, reference, length, assert_close):
    engine.forward(TOKENS[:length] + [7] * (48 - length) if length < 48 else TOKENS)
    engine.trim(length)
    assert engine.length == length
    assert_close(engine.forward(TOKENS[length:], last=48 - length), reference[length:])


def test_save_and_restore(backend, engine, reference, assert_close):
    engine.forward(TOKENS[:20])
    saved = list(engine.save(20))
    engine.forward([9, 9, 9])
    other = backend.create_engine()
    other.restore(20, saved)
    assert_close(other.forward(TOKENS[20:], last=28), reference[20:])
    engine.restore(20, saved)
    assert_close(engine.forward(TOKENS[20:], last=28), reference[20:])


def test_engines_of_one_backend_have_caches_of_their_own(backend, engine, reference, assert_close):
    other = backend.create_engine()
    for start in range(0, 48, 4):
        engine.forward(TOKENS[start : start + 4])
        other.forward([5 + start] * 3)
    engine.trim(47)
    assert_close(engine.forward(TOKENS[47:]), reference[47:])


def test_a_second_turn_gives_the_tokens_of_a_fresh_run(artifact, settings):
    options = {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0}
    with normistral.load(artifact, exact=True, settings=settings) as model:
        chat = model.chat()
        chat.send("A", **options)
        before = list(chat.messages)
        answer = chat.send("B", **options)
        fresh = model.chat()
        fresh.replace(before)
        assert fresh.send("B", **options).token_ids == answer.token_ids
        assert answer.timings.cached_tokens > 0


def test_two_models_live_in_one_process(artifact, settings):
    with (
        normistral.load(artifact, settings=settings) as one,
        normistral.load(artifact, exact=True, settings=settings) as other,
    ):
        options = {"max_new_tokens": 4, "temperature": 0}
        assert one.generate("Hei", **options).token_ids == one.generate("Hei", **options).token_ids
        assert other.generate("Hei", **options).token_ids


def test_close_frees_engine_and_chats(artifact, settings):
    model = normistral.load(artifact, settings=settings)
    chat = model.chat()
    chat.send("Hei", max_new_tokens=2)
    backend, engine = model._backend, chat._sequence._engine
    model.close()
    with pytest.raises(ClosedError):
        chat.send("Hei")
    with pytest.raises(ClosedError):
        backend.create_engine()
    with pytest.raises(ClosedError):
        engine.forward([5])
    # Nothing native is left behind: what remains are numbers, settings and small arrays.
    kept = [*vars(backend).values(), *vars(engine).values()]
    assert not [value for value in kept if hasattr(value, "__dict__") and "EngineInfo" not in type(value).__name__]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Exception during initialization: std::bad_alloc", "free some"),  # onnxruntime, under RLIMIT_DATA
        ("can't alloc", "free some"),  # OpenVINO, likewise
        ("Unable to read the model", "info ARTIFACT --check"),
    ],
)
def test_a_failed_load_speaks_of_memory_only_if_memory_failed(said, hint):
    assert hint in load_hint(said)
