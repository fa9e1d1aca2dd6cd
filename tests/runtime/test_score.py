"""Scoring given tokens, on scripted logits and on a real engine."""

import numpy as np
import pytest
import torch
from scripted_models import make_model
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

import normistral
from normistral.errors import ClosedError, ContextLengthError, EngineError, UsageError
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.sampling import score_tokens

IDS = np.random.default_rng(3).integers(0, VOCABULARY, size=50).tolist()


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path, random_logits(VOCABULARY))  # prefill chunks of 16


def expected_logprobs(token_ids):
    next_logits = random_logits(VOCABULARY)
    rows = torch.tensor(np.stack([next_logits(token_ids[:end]) for end in range(1, len(token_ids))])).double()
    return torch.log_softmax(rows, dim=-1)


def fed(model):
    return sum(len(ids) for ids in model._backend.forwarded)


@pytest.mark.parametrize("last", [1, 2, 15, 16, 17, 33, 48, 49, None])
def test_each_token_is_scored_after_those_before_it(model, last):
    scores = model.score(IDS, last)
    rows = expected_logprobs(IDS)
    expected = rows[range(len(rows)), IDS[1:]].numpy()
    count = len(IDS) - 1 if last is None else last
    np.testing.assert_allclose(scores.logprobs, expected[-count:], atol=1e-6)
    assert fed(model) == len(IDS) - 1


def test_greedy_marks_the_most_likely_tokens(model):
    best = expected_logprobs(IDS).argmax(dim=-1).tolist()
    scores = model.score([*IDS[:20], best[19]], last=5)
    assert scores.greedy.tolist() == [IDS[i + 1] == best[i] for i in range(15, 19)] + [True]


def test_of_two_most_likely_tokens_the_first_is_greedy():
    logits = np.array([[1.0, 5.0, 5.0]], np.float32)
    assert score_tokens([logits], [1]).greedy.tolist() == [True]
    assert score_tokens([logits], [2]).greedy.tolist() == [False]


def test_a_common_beginning_is_computed_once(model):
    context, choices = IDS[:30], ([1, 2, 3], [1, 4], [9])
    first = [model.score([*context, *choice], last=len(choice)).logprobs for choice in choices]
    # 30 and two of the first choice; then the last token of the context, for its logits, and all but the last token.
    assert fed(model) == 32 + 2 + 1
    again = [model.score([*context, *choice], last=len(choice)).logprobs for choice in reversed(choices)]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_generating_in_between_changes_nothing(model):
    before = model.score(IDS, 10).logprobs
    model.generate(IDS[:20], max_new_tokens=5, ignore_eos=True)
    np.testing.assert_array_equal(model.score(IDS, 10).logprobs, before)


def test_a_score_beside_a_running_generation_has_a_cache_of_its_own(model):
    stream = model.stream(IDS[:20], max_new_tokens=5, ignore_eos=True)
    started = [next(stream).token_id]
    model.score(IDS, 10)
    rest = [chunk.token_id for chunk in stream]
    alone = model.generate(IDS[:20], max_new_tokens=5, ignore_eos=True)
    assert tuple(started + rest) == alone.token_ids


def test_text_as_long_as_the_context_and_one_more_can_be_scored(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY), context_length=49)
    assert len(model.score(IDS).logprobs) == 49
    with pytest.raises(ContextLengthError, match="51 tokens cannot be scored at once; scripted has room for 49"):
        model.score([*IDS, 1])


@pytest.mark.parametrize(("ids", "last"), [([], None), ([1], None), ([1, 2], 2), ([1, 2], 0), ([1, 2, 3], -1)])
def test_there_has_to_be_a_token_before_the_first_scored_one(model, ids, last):
    with pytest.raises(UsageError, match=f"of {len(ids)} tokens"):
        model.score(ids, last)


def test_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(UsageError, match=f"{VOCABULARY} is not a token id of this model"):
        model.score([1, VOCABULARY])


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    model = make_model(tmp_path, lambda token_ids: np.full(VOCABULARY, np.nan, np.float32))
    with pytest.raises(EngineError, match="not finite"):
        model.score([1, 2])


def test_a_closed_model_scores_nothing(model):
    model.close()
    with pytest.raises(ClosedError):
        model.score([1, 2])


def test_a_real_engine_scores_as_transformers_does(tiny_checkpoint, tiny_onnx):
    reference = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        rows = torch.log_softmax(reference(torch.tensor([IDS])).logits[0].double(), dim=-1)
    expected = rows[range(len(IDS) - 1), IDS[1:]].numpy()
    with normistral.load(tiny_onnx("onnx-fp32-fused"), exact=True) as model:
        np.testing.assert_allclose(model.score(IDS).logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(
            model.score(IDS[:40], last=7).logprobs, expected[32:39], atol=1e-4
        )  # out of the cache
