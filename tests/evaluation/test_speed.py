"""What a speed measurement asks of a model, on the scripted engine, and how a plan is cut."""

import dataclasses
import itertools
import time

import pytest
from scripted_models import make_model

from normistral.artifact.manifest import SamplingDefaults
from normistral.errors import ContextLengthError, UsageError
from normistral.evaluation.bench import speed
from normistral.evaluation.bench.machine import EnergyCounter
from normistral.evaluation.bench.speed import (
    QUICK,
    SpeedPlan,
    cut_to_context,
    fingerprint,
    measure_conversation,
    measure_first_token,
    measure_pass,
    tokens_per_word,
)
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.options import GenerationConfig


@pytest.fixture
def model(tmp_path):
    from tiny_models import VOCABULARY

    sampling = SamplingDefaults(temperature=1.0, repetition_penalty=1.3)  # what must not count
    return make_model(tmp_path / "tokenizer", random_logits(VOCABULARY), sampling=sampling)


def test_points_are_lengths_and_contexts_together():
    plan = SpeedPlan(prefill_lengths=(128, 512), decode_contexts=(16, 512), decode_tokens=8)
    assert plan.points == ((16, 8), (128, 0), (512, 8))
    assert plan.most_tokens == 512 + 8 + 1


def test_the_longest_sequence_may_be_the_conversation():
    plan = SpeedPlan(prefill_lengths=(16,), decode_contexts=(16,), decode_tokens=8)
    assert plan.most_tokens == 200 + 32 + 50 + 1


@pytest.mark.parametrize(
    "changes", [{"prefill_lengths": ()}, {"decode_contexts": (0,)}, {"prefill_lengths": (9, 4)}, {"repeats": 0}]
)
def test_a_plan_of_nothing_is_refused(changes):
    with pytest.raises(UsageError):
        dataclasses.replace(QUICK, **changes)


def test_a_long_context_takes_the_whole_plan():
    assert cut_to_context(SpeedPlan(), 4096) == SpeedPlan()


@pytest.mark.parametrize("context_length", [16, 64, 300, 2048])
def test_a_cut_plan_fits(context_length):
    plan = cut_to_context(SpeedPlan(), context_length)
    assert plan.most_tokens <= context_length
    assert max(plan.prefill_lengths) < context_length


def test_a_context_of_a_few_tokens_is_refused():
    with pytest.raises(ContextLengthError, match="too short"):
        cut_to_context(SpeedPlan(), 15)


def test_a_pass_computes_its_prompt_and_decodes_exactly(model):
    for seed in (1, 2):
        model._backend.forwarded.clear()
        measured = measure_pass(model, 40, 6, seed)
        assert (measured.prefill_tokens, measured.decode_tokens) == (40, 6)
        assert [len(ids) for ids in model._backend.forwarded] == [16, 16, 8] + [1] * 6
        assert measured.prefill_s > 0
        assert measured.decode_s > 0
        assert measured.prefill_joules is measured.decode_joules is None


def test_nothing_is_drafted():
    if "draft" in {field.name for field in dataclasses.fields(GenerationConfig)}:
        assert speed._PLAIN["draft"] == "off"


def test_a_pass_is_the_same_work_every_time(model):
    measure_pass(model, 20, 3, 1)
    first = list(model._backend.forwarded)
    measure_pass(model, 20, 3, 2)
    model._backend.forwarded.clear()
    measure_pass(model, 20, 3, 1)
    assert model._backend.forwarded == first


def test_joules_are_those_of_prefill_and_of_decode(model):
    class Counter(EnergyCounter):
        def __init__(self):
            self.reads = iter([(0,), (2_000_000,), (2_500_000,), (5_500_000,)])
            self._ranges = [10**12]

        def read(self):
            return next(self.reads)

    measured = measure_pass(model, 8, 2, 1, Counter())
    assert (measured.prefill_joules, measured.decode_joules) == (2.0, 3.0)


def test_a_decode_counts_between_equal_bandwidths_and_is_repeated_otherwise(model):
    found = iter([40.0, 60.0, 40.0, 41.0])

    def gb_per_s():
        time.sleep(0.3)
        return next(found)

    measured = measure_pass(model, 40, 6, 1, gb_per_s=gb_per_s)
    assert measured.bandwidth_gb_per_s == (40.0, 41.0)
    assert measured.dropped == 1
    assert measured.steady
    # The prompt is read once; the second time its last token gives the logits.
    assert [len(ids) for ids in model._backend.forwarded] == [16, 16, 8] + [1] * 6 + [1] + [1] * 6
    assert measured.prefill_tokens == 40
    assert 0 < measured.decode_s < 0.3  # without the time of the bandwidth


def test_a_decode_is_repeated_at_most_twice(model):
    measured = measure_pass(model, 8, 2, 1, gb_per_s=itertools.cycle([40.0, 60.0]).__next__)
    assert (measured.steady, measured.dropped) == (False, 2)


def test_a_first_token_needs_nothing_but_the_prompt(model):
    assert measure_first_token(model, 20, 7) > 0
    assert [len(ids) for ids in model._backend.forwarded] == [16, 4]


def test_the_second_turn_finds_the_first_in_the_cache(model):
    plan = SpeedPlan(question_tokens=30, answer_tokens=5, follow_up_tokens=10)
    measured = measure_conversation(model, plan, 3)
    assert measured.cached_tokens == 30 + 5 - 1  # the answer's last token was never fed
    assert [len(ids) for ids in model._backend.forwarded] == [16, 14, 1, 1, 1, 1, 11]


def test_the_fingerprint_tells_models_apart_and_is_the_same_again(model, tmp_path):
    from tiny_models import VOCABULARY

    other = make_model(tmp_path / "other", random_logits(VOCABULARY, seed=1))
    assert fingerprint(model) == fingerprint(model) != fingerprint(other)


def test_a_byte_tokenizer_takes_many_tokens_for_a_word(model):
    assert 4 < tokens_per_word(model.tokenizer) < 8
