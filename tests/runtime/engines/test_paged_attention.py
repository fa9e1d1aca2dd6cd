"""The block pool under PagedAttention: sequences share it, and none of them can tell."""

import gc

import numpy as np
import pytest

import normistral
from normistral.artifact.artifact import Artifact
from normistral.errors import SessionError
from normistral.runtime.engines.openvino_paged import PagedCall
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

TOKENS = np.random.default_rng(3).integers(5, 261, 60).tolist()
BLOCK = 32


@pytest.fixture(params=["u8", "f16", "f32"])
def backend(tiny_fp16, request):
    given = {"KV_CACHE_PRECISION": request.param}
    return load_backend(Artifact.open(tiny_fp16, verify=False), EngineConfig(exact=False, settings=given))


def used_blocks(backend):
    backend._pool._count_returned()
    return backend._pool._capacity - len(backend._pool._free)


def test_the_cpu_pages(tiny_fp16):
    with normistral.load(tiny_fp16) as model:
        assert model.capabilities.settings["attention"] == "paged"
    for settings in ({"attention": "stateful"}, {"KV_CACHE_PRECISION": "bf16"}):
        with normistral.load(tiny_fp16, settings=settings) as model:
            assert "attention" not in model.capabilities.settings
            assert model.generate("Hei", max_new_tokens=2).token_ids


def test_a_pool_that_grows_under_others_changes_nothing_for_them(backend):
    alone = backend.create_engine().forward(TOKENS, last=60)
    engine, others = backend.create_engine(), []
    pieces = []
    for start in range(0, 60, 20):
        pieces.append(engine.forward(TOKENS[start : start + 20], last=20))
        for _ in range(6):  # more than the pool has in the beginning, so that it moves
            others.append(backend.create_engine())
            others[-1].forward([7 + start] * 40)
    again = backend.create_engine()
    expected = np.concatenate([again.forward(TOKENS[start : start + 20], last=20) for start in range(0, 60, 20)])
    assert np.array_equal(np.concatenate(pieces), expected)
    assert np.abs(expected - alone).max() <= 0.05 * np.ptp(alone)


@pytest.mark.parametrize("length", [1, 20, BLOCK - 1, BLOCK, BLOCK + 1, 50])
def test_after_trimming_everything_is_bit_for_bit_as_if_the_rest_had_never_been(backend, length):
    engine, fresh = backend.create_engine(), backend.create_engine()
    engine.forward(TOKENS[:length])
    engine.forward([9] * (60 - length))
    engine.trim(length)
    fresh.forward(TOKENS[:length])
    for token_id in TOKENS[length : length + 3]:
        assert np.array_equal(engine.forward([token_id]), fresh.forward([token_id]))


def test_blocks_come_back_when_a_sequence_is_trimmed_closed_or_forgotten(backend):
    before = used_blocks(backend)  # the sequence that warmed up was closed
    assert before == 0
    engines = [backend.create_engine() for _ in range(3)]
    for engine in engines:
        engine.forward(TOKENS)
    assert used_blocks(backend) == 3 * 2
    engines[0].trim(BLOCK)
    assert used_blocks(backend) == 1 + 2 + 2
    engines[1].close()
    engines[1].close()
    del engines[2], engine
    gc.collect()
    assert used_blocks(backend) == 1
    engines[0].reset()
    assert used_blocks(backend) == 0


def test_a_session_of_the_stateful_attention_is_named_and_opens_with_it(tiny_fp16, tmp_path):
    stateful = {"attention": "stateful"}
    with normistral.load(tiny_fp16, settings=stateful) as model:
        chat = model.chat()
        chat.send("A", max_new_tokens=2)
        chat.save(tmp_path / "s")
    with (
        normistral.load(tiny_fp16) as model,
        pytest.raises(SessionError, match="attention stateful instead of paged") as caught,
    ):
        model.restore_chat(tmp_path / "s")
    assert "attention=stateful" in caught.value.hint
    with normistral.load(tiny_fp16, settings=stateful) as model:
        assert model.restore_chat(tmp_path / "s").messages


def test_a_token_that_must_not_depend_on_others_has_the_same_bits_beside_any(backend):
    engines = [backend.create_engine() for _ in range(6)]
    first = engines[0]
    first.batch_invariant = True
    for index, engine in enumerate(engines):
        engine.forward([*TOKENS[index:], 7, 8, 9])
    alone = first.forward([5])
    used = used_blocks(backend)
    for count in range(1, 6):
        for engine in engines:
            engine.trim(min(engine.length, 58))
        first.forward([*TOKENS[58:], 7, 8, 9])
        calls = [PagedCall(engine, [5 + index], 1) for index, engine in enumerate(engines[: count + 1])]
        assert np.array_equal(backend.forward_batch(calls)[0], alone)
    assert used_blocks(backend) == used  # the companion's came back
    assert backend.measure_batch_invariance()
    assert used_blocks(backend) == used
