"""The OpenVINO engine against transformers, on a random checkpoint with the family's quirks.

Tolerance: the artifact's weights are the checkpoint's rounded to float16, and the reference gets the same rounded
weights, so only the order of float32 sums differs. 2e-4 of the logits' spread (largest minus smallest) is about ten
times what was seen, and a hundredth of what a dropped window or a wrong head size gives.
"""

import gc

import numpy as np
import pytest

import normistral
from normistral.errors import ClosedError, DeviceError
from normistral.manifest import read_manifest
from normistral.runtime.engines.openvino import load_openvino, require_device

TOLERANCE = 2e-4
TOKENS = np.random.default_rng(0).integers(5, 261, 48).tolist()  # three windows long


@pytest.fixture(scope="module")
def backend(tiny_fp16):
    return load_openvino(tiny_fp16, read_manifest(tiny_fp16), exact=True)


@pytest.fixture
def engine(backend):
    return backend.create_engine()


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """Logits [48, vocabulary] of transformers in float32, with the weights rounded to float16 as in the artifact."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(parameter.half().float())
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def assert_close(found, expected):
    spread = expected.max() - expected.min()
    assert np.abs(found - expected).max() <= TOLERANCE * spread


def test_prefill_at_once_matches_transformers_beyond_the_window(engine, reference):
    assert_close(engine.forward(TOKENS, last=48), reference)


def test_token_by_token_matches_transformers_beyond_the_window(engine, reference):
    assert_close(np.concatenate([engine.forward([token]) for token in TOKENS]), reference)


@pytest.mark.parametrize("cuts", [(1, 20), (16,), (15, 17, 33), (40, 41, 42)])
def test_any_chunking_matches_transformers(engine, reference, cuts):
    starts, ends = (0, *cuts), (*cuts, 48)
    pieces = [engine.forward(TOKENS[a:b], last=b - a) for a, b in zip(starts, ends, strict=True)]
    assert_close(np.concatenate(pieces), reference)


def test_only_the_asked_for_positions_are_returned(engine, reference):
    assert_close(engine.forward(TOKENS, last=3), reference[-3:])
    assert engine.length == 48


@pytest.mark.parametrize("length", [47, 30, 16, 1, 0])
def test_a_trimmed_sequence_goes_on_as_if_the_rest_had_never_been(engine, reference, length):
    engine.forward(TOKENS[:length] + [7] * (48 - length) if length < 48 else TOKENS)
    engine.trim(length)
    assert engine.length == length
    assert_close(engine.forward(TOKENS[length:], last=48 - length), reference[length:])


def test_save_and_restore(backend, engine, reference):
    engine.forward(TOKENS[:20])
    saved = engine.save()
    engine.forward([9, 9, 9])
    other = backend.create_engine()
    other.restore(saved)
    assert_close(other.forward(TOKENS[20:], last=28), reference[20:])
    engine.restore(saved)
    assert_close(engine.forward(TOKENS[20:], last=28), reference[20:])


def test_engines_of_one_backend_have_caches_of_their_own(backend, engine, reference):
    other = backend.create_engine()
    for start in range(0, 48, 4):
        engine.forward(TOKENS[start : start + 4])
        other.forward([5 + start] * 3)
    engine.trim(47)
    assert_close(engine.forward(TOKENS[47:]), reference[47:])


def test_a_second_turn_gives_the_tokens_of_a_fresh_run(tiny_fp16):
    options = {"max_new_tokens": 5, "ignore_eos": True, "temperature": 0}
    with normistral.load(tiny_fp16, exact=True) as model:
        chat = model.chat()
        chat.send("A", **options)
        before = list(chat.messages)
        answer = chat.send("B", **options)
        fresh = model.chat()
        fresh.replace(before)
        assert fresh.send("B", **options).token_ids == answer.token_ids
        assert answer.timings.cached_tokens > 0


def test_two_models_live_in_one_process(tiny_fp16):
    with normistral.load(tiny_fp16) as one, normistral.load(tiny_fp16, exact=True) as other:
        options = {"max_new_tokens": 4, "temperature": 0}
        assert one.generate("Hei", **options).token_ids == one.generate("Hei", **options).token_ids
        assert other.capabilities.settings["KV_CACHE_PRECISION"] == "f32"
        assert "KV_CACHE_PRECISION" not in one.capabilities.settings


def test_close_frees_engine_and_chats(tiny_fp16):
    model = normistral.load(tiny_fp16)
    chat = model.chat()
    chat.send("Hei", max_new_tokens=2)
    model.close()
    with pytest.raises(ClosedError):
        chat.send("Hei")
    compiled = model._backend._compiled
    gc.collect()
    assert compiled is None
    assert chat._sequence._engine._request is None


@pytest.mark.parametrize("device", ["GPU", "NPU", "CUDA", "", "AUTO:GPU"])
def test_a_device_that_is_not_there_is_an_error_that_lists_those_that_are(device):
    with pytest.raises(DeviceError) as caught:
        require_device(device, ["CPU"])
    assert "CPU" in caught.value.hint


@pytest.mark.parametrize(
    ("device", "available"),
    [
        ("CPU", ["CPU"]),
        ("AUTO", ["CPU"]),
        ("GPU", ["CPU", "GPU.0", "GPU.1"]),
        ("GPU.1", ["CPU", "GPU.0", "GPU.1"]),
        ("GPU.0", ["CPU", "GPU"]),
        ("AUTO:GPU,CPU", ["CPU", "GPU"]),
    ],
)
def test_devices_that_are_there_are_taken(device, available):
    require_device(device, available)
