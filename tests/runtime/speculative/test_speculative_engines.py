"""Rejected tokens leave no trace in a real engine: logits and greedy texts are those of a run that never had them.

Tiny random models of every kind of position and window, in exact mode, so that only the order of float32 sums differs.
Tolerance: 2e-5 of the logits' spread for OpenVINO, whose steps of n tokens differ by up to 4e-6 of it from single ones
with or without rejections; a wrong position, or a dead token that is seen, gives more than 1e-2.
"""

import numpy as np
import pytest
from drafting_models import draft_always
from tiny_bloom import make_bloom
from tiny_models import make_llama, make_mistral

import normistral
from normistral.artifact.artifact import Artifact
from normistral.runtime.engines.openvino_stateful import MaskedPositions
from normistral.runtime.engines.settings import EngineConfig
from normistral.runtime.loading import load_backend

TOLERANCE = 2e-5
TOKENS = np.random.default_rng(1).integers(5, 261, 56).tolist()
CHECKPOINTS = {
    "llama": lambda folder: make_llama(folder, positions=128),
    "window": lambda folder: make_mistral(folder, sliding_window=16, positions=128, head_dim=32),  # three windows long
    "wide window": lambda folder: make_mistral(folder, sliding_window=64, positions=128),
    "bloom": lambda folder: make_bloom(folder, seq_length=128),
}
FORMATS = {
    "openvino": {"format": "openvino", "weights": "fp16"},
    "fused": {"format": "onnx", "weights": "fp32", "graph": "fused"},
    "plain": {"format": "onnx", "weights": "fp32", "graph": "plain"},
    "stateful": {"format": "openvino", "weights": "fp16"},
}
CASES = [(name, kind) for name in CHECKPOINTS for kind in ("openvino", "stateful")]
CASES += [("window", "fused"), ("window", "plain")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def settings(case):
    return {"attention": "stateful"} if case[1] == "stateful" else {}


@pytest.fixture(scope="module")
def artifact(case, tmp_path_factory):
    name, kind = case
    folder = tmp_path_factory.mktemp("drafting")
    CHECKPOINTS[name](folder / "checkpoint")
    normistral.export_model(str(folder / "checkpoint"), folder / "artifact", verify=False, **FORMATS[kind])
    return folder / "artifact"


@pytest.fixture(scope="module")
def backend(artifact, settings):
    return load_backend(Artifact.open(artifact, verify=False), EngineConfig(exact=True, settings=settings))


@pytest.fixture(scope="module")
def clean(backend):
    return backend.create_engine().forward(TOKENS, last=len(TOKENS))


def advance_with_rejections(engine, rejected, step=3):
    """Feed TOKENS, some at once, and after each step as many wrong ones, which are then trimmed."""
    logits = []
    for start in range(0, len(TOKENS), step):
        right = TOKENS[start : start + step]
        logits.append(engine.forward([*right, *[7] * rejected], last=len(right) + rejected)[: len(right)])
        engine.trim(start + len(right))
        assert engine.length == start + len(right)
    return np.concatenate(logits)


@pytest.mark.parametrize("rejected", [0, 1, 3, 9])  # 9: more than the dead slots that are kept
def test_logits_after_rejections_are_those_of_a_clean_run(backend, clean, rejected):
    found = advance_with_rejections(backend.create_engine(), rejected)
    assert np.abs(found - clean).max() <= TOLERANCE * np.ptp(clean)


def test_a_saved_cache_holds_no_rejected_tokens(backend, clean):
    engine = backend.create_engine()
    engine.forward(TOKENS[:20])
    for _ in range(3):
        engine.forward([7, 8])
        engine.trim(20)
    saved = list(engine.save(20))
    engine.forward([9, 9])
    for other in (backend.create_engine(), engine):
        other.restore(20, saved)
        assert other.length == 20
        found = other.forward(TOKENS[20:], last=len(TOKENS) - 20)
        assert np.abs(found - clean[20:]).max() <= TOLERANCE * np.ptp(clean)


def test_the_saver_goes_on_to_the_last_bit_like_the_restored(backend):
    engine, other = backend.create_engine(), backend.create_engine()
    engine.forward(TOKENS[:20])
    for _ in range(3):
        engine.forward([7, 8])
        engine.trim(20)
    other.restore(20, engine.save(20))
    for token_id in TOKENS[20:]:
        assert np.array_equal(engine.forward([token_id]), other.forward([token_id]))


def test_trimming_trimmed_sequences_counts_living_tokens(backend, clean):
    engine = backend.create_engine()
    engine.forward([*TOKENS[:10], 7, 7])
    engine.trim(10)
    engine.forward([*TOKENS[10:14], 8])
    engine.trim(12)
    engine.trim(9)
    found = engine.forward(TOKENS[9:], last=len(TOKENS) - 9)
    assert np.abs(found - clean[9:]).max() <= TOLERANCE * np.ptp(clean)


def test_greedy_and_sampled_texts_are_those_of_plain_decoding(artifact, settings):
    with normistral.load(artifact, exact=True, settings=settings) as model:
        drafted = 0
        for options in ({"temperature": 0}, {"temperature": 0.3, "seed": 1}, {"temperature": 0.3, "seed": 2}):
            options |= {"max_new_tokens": 60, "ignore_eos": True}
            prompt = [*TOKENS[:12], *TOKENS[:12], *TOKENS[:4]]
            plain = model.generate(prompt, draft="off", **options)
            found = draft_always(model).generate(prompt, **options)
            assert found.token_ids == plain.token_ids
            drafted += found.timings.drafted_tokens
        assert drafted > 10


# The slots alone


def test_slots_know_what_lives():
    slots = MaskedPositions(100, keeps_dead=True)
    slots.append(5)
    slots.trim(3)
    assert slots.extended_mask(2).tolist() == [[1, 1, 1, 0, 0, 1, 1]]
    slots.append(2)
    assert (slots.length, slots.living().tolist()) == (5, [0, 1, 2, 5, 6])
    slots.trim(4)
    assert slots.living().tolist() == [0, 1, 2, 5]
    slots.compacted(4)
    assert slots.extended_mask(1).tolist() == [[1] * 5]


@pytest.mark.parametrize(
    ("limit", "keeps_dead", "dead", "must"),
    [
        (1000, True, 0, False),
        (1000, True, 32, False),
        (1000, True, 33, True),  # more than a few
        (1000, False, 1, True),  # positions would shift
        (110, True, 5, False),
        (109, True, 5, True),  # 100 tokens, 5 dead and 5 new are more than the window
    ],
)
def test_dead_slots_go_when_they_would_disturb(limit, keeps_dead, dead, must):
    slots = MaskedPositions(limit, keeps_dead=keeps_dead)
    slots.append(100 + dead)
    slots.trim(100)
    assert slots.must_compact(5) is must


def test_the_longer_a_sequence_the_more_dead_slots_it_may_have():
    slots = MaskedPositions(10_000, keeps_dead=True)
    slots.append(1000)
    slots.trim(880)
    assert slots.must_compact(1)  # 120 of 880
    slots = MaskedPositions(10_000, keeps_dead=True)
    slots.append(1000)
    slots.trim(900)
    assert not slots.must_compact(1)
