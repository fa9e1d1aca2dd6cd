"""The decode loop on scripted logits: what ends it, what it reports, what it computes."""

import threading

import numpy as np
import pytest
from scripted_models import END_OF_TURN, make_model
from tiny_models import VOCABULARY

from normistral.artifact.manifest import SamplingDefaults
from normistral.errors import ClosedError, ContextLengthError, EngineError, UsageError
from normistral.runtime.engines.scripted import random_logits


def always(token_id):
    logits = np.zeros(VOCABULARY, np.float32)
    logits[token_id] = 9.0
    return lambda token_ids: logits


@pytest.fixture
def spell(tmp_path):
    """Makes a model that writes a text byte by byte after a prompt of one token, then the stop token."""

    def make(text, **changes):
        model = make_model(tmp_path, always(0), **changes)
        ids = [*model.tokenizer.encode(text), END_OF_TURN]
        model._backend.next_logits = lambda token_ids: always(ids[min(len(token_ids), len(ids)) - 1])(token_ids)
        return model

    return make


def test_a_stop_token_ends_the_answer_and_is_no_text(spell):
    completion = spell("blåbær").generate([7])
    assert completion.text == "blåbær"
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == END_OF_TURN
    assert completion.timings.new_tokens == len("blåbær".encode()) + 1


def test_every_stop_token_of_the_manifest_counts(tmp_path):
    assert make_model(tmp_path, always(2), stop_token_ids=(2, 4)).generate([7]).finish_reason == "stop"
    assert (
        make_model(tmp_path, always(2), stop_token_ids=(4,)).generate([7], max_new_tokens=3).finish_reason == "length"
    )


def test_ignore_eos_goes_on(spell):
    completion = spell("a").generate([7], ignore_eos=True, max_new_tokens=5)
    assert completion.finish_reason == "length"
    assert completion.timings.new_tokens == 5


def test_max_new_tokens(spell):
    completion = spell("abcdef").generate([7], max_new_tokens=3)
    assert (completion.text, completion.finish_reason) == ("abc", "length")


def test_a_full_context_ends_the_answer_and_says_so(spell):
    completion = spell("abcdefghij", context_length=6).generate([7])
    assert (completion.text, completion.finish_reason) == ("abcde", "context")


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_runs(spell):
    model = spell("a", context_length=6)
    with pytest.raises(ContextLengthError, match=r"6 tokens.* 6"):
        model.generate([7] * 6)
    assert model._backend.forwarded == []
    assert model.generate([7] * 5, max_new_tokens=50).finish_reason in ("stop", "context")


def test_pieces_are_whole_characters(spell):
    pieces = [chunk.text for chunk in spell("æ😀å").stream([7])]
    assert "".join(pieces) == "æ😀å"
    assert set("".join(pieces)) == {"æ", "😀", "å"}
    assert all("�" not in piece for piece in pieces)


def test_stop_text_is_not_shown_and_its_parts_never(spell):
    chunks = list(spell("ja\nnei\n").stream([7], stop="\nnei"))
    assert "".join(chunk.text for chunk in chunks) == "ja"
    assert chunks[-1].finish_reason == "stop"
    assert "\n" not in "".join(chunk.text for chunk in chunks)


def test_the_stop_text_that_ended_an_answer_is_told(spell):
    stopped = spell("ja\nnei").generate([7], stop=["zz", "\nnei", "\n"])
    assert (stopped.text, stopped.stop_text) == ("ja", "\n")  # the first that is complete
    assert spell("ja").generate([7], stop=["zz"]).stop_text is None


def test_held_back_text_is_shown_when_the_answer_ends_without_the_stop_text(spell):
    assert spell("ja\nne").generate([7], stop=["\nnei"]).text == "ja\nne"


def test_same_seed_same_text_whatever_ran_before(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 20, "ignore_eos": True}
    first = model.generate("Hei", **options)
    model.generate("Noe annet", **options)
    assert model.generate("Hei", **options).token_ids == first.token_ids
    assert model.generate("Hei", **{**options, "seed": 4}).token_ids != first.token_ids


def test_logprobs_are_those_of_the_bare_logits(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    chunk = next(model.stream([7, 8], logprobs=3, temperature=0.5, top_k=2, seed=0))
    logits = random_logits(VOCABULARY)([7, 8]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert chunk.logprob == pytest.approx(expected[chunk.token_id], abs=1e-6)
    best = np.argsort(-expected)[:3]
    assert [i for i, _ in chunk.top_logprobs] == list(best)
    assert [p for _, p in chunk.top_logprobs] == pytest.approx(expected[best], abs=1e-6)
    assert next(model.stream([7, 8])).logprob is None


def test_a_common_beginning_is_computed_once(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    prompt = list(range(10, 50))
    first = model.generate(prompt, max_new_tokens=1)
    assert (first.timings.prompt_tokens, first.timings.cached_tokens) == (40, 0)
    assert [len(ids) for ids in model._backend.forwarded] == [16, 16, 8]  # the scripted engine's prefill chunk is 16
    model._backend.forwarded.clear()
    again = model.generate([*prompt[:30], 99, 98], max_new_tokens=1)
    assert again.timings.cached_tokens == 30
    assert model._backend.forwarded == [[99, 98]]
    fresh = make_model(tmp_path, random_logits(VOCABULARY)).generate([*prompt[:30], 99, 98], max_new_tokens=1)
    assert again.token_ids == fresh.token_ids


def test_the_same_prompt_again_computes_one_token(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    first = model.generate([7, 8, 9], max_new_tokens=4, ignore_eos=True)
    model._backend.forwarded.clear()
    assert model.generate([7, 8, 9], max_new_tokens=4, ignore_eos=True).token_ids == first.token_ids
    assert model._backend.forwarded[0] == [9]


def test_the_authors_defaults_are_used_and_can_be_overridden(tmp_path):
    sampling = SamplingDefaults(temperature=5.0, max_new_tokens=3)
    model = make_model(tmp_path, random_logits(VOCABULARY), sampling=sampling)
    assert model.generate([7], ignore_eos=True).timings.new_tokens == 3
    sampled = {model.generate([7], ignore_eos=True, seed=seed).token_ids for seed in range(4)}
    assert len(sampled) > 1
    greedy = {model.generate([7], ignore_eos=True, seed=seed, temperature=0).token_ids for seed in range(4)}
    assert len(greedy) == 1


def test_cancel_stops_within_one_token_and_the_model_stays_usable(spell):
    model = spell("abcdefghij")
    chunks = model.stream([7])
    assert next(chunks).text == "a"
    model.cancel()
    rest = list(chunks)
    assert [chunk.finish_reason for chunk in rest] == ["cancelled"]
    assert model.generate([7]).text == "abcdefghij"


def test_cancel_stops_a_long_prefill_between_two_chunks(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY), context_length=4000)
    inner = model._backend.next_logits

    def cancel_during_prefill(token_ids):
        if len(token_ids) == 32:
            model.cancel()
        return inner(token_ids)

    model._backend.next_logits = cancel_during_prefill
    completion = model.generate(list(range(5, 205)))
    assert completion.finish_reason == "cancelled"
    assert len(model._backend.forwarded) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("broken")])
def test_an_interrupted_forward_leaves_the_model_usable(spell, error):
    model = spell("abcdef")
    inner = model._backend.next_logits

    def fail_once(token_ids):
        if len(token_ids) == 3:
            model._backend.next_logits = inner
            raise error
        return inner(token_ids)

    model._backend.next_logits = fail_once
    with pytest.raises(BaseException, match="broken" if isinstance(error, EngineError) else None):
        model.generate([7])
    assert model.generate([7]).text == "abcdef"


def test_leaving_a_stream_early_leaves_the_model_usable(spell):
    model = spell("abcdef")
    for chunk in model.stream([7]):
        assert chunk.text == "a"
        break
    assert model.generate([7]).text == "abcdef"


def test_streams_may_run_in_turn_each_with_its_own_cache(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    options = {"max_new_tokens": 8, "ignore_eos": True}
    alone = [model.generate(prompt, **options).token_ids for prompt in ([7, 8], [9])]
    streams = [model.stream(prompt, **options) for prompt in ([7, 8], [9])]
    mixed = list(zip(*streams, strict=True))
    assert [tuple(pair[i].token_id for pair in mixed) for i in range(2)] == alone


def test_threads_are_serialised(tmp_path):
    model = make_model(tmp_path, random_logits(VOCABULARY))
    inner, running, overlaps = model._backend.next_logits, [], []

    def watch(token_ids):
        running.append(1)
        overlaps.append(len(running))
        result = inner(token_ids)
        running.pop()
        return result

    model._backend.next_logits = watch
    expected = {i: model.generate([i], max_new_tokens=10, ignore_eos=True).token_ids for i in range(5, 9)}
    found = {}

    def generate(i):
        found[i] = model.generate([i], max_new_tokens=10, ignore_eos=True).token_ids

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert max(overlaps) == 1


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(spell, prompt):
    with pytest.raises(UsageError, match="empty"):
        spell("a").generate(prompt)


@pytest.mark.parametrize("prompt", [[VOCABULARY], [-1], [1.5], ["a"], [True]])
def test_token_ids_outside_the_vocabulary_are_refused(spell, prompt):
    with pytest.raises(UsageError, match="not a token id"):
        spell("a").generate(prompt)


def test_an_unknown_option_is_refused(spell):
    with pytest.raises(UsageError, match="max_tokens"):
        spell("a").generate([7], max_tokens=3)


def test_a_closed_model_says_so(spell):
    model = spell("abc")
    stream = model.stream([7])
    next(stream)
    model.close()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    model.close()
    with pytest.raises(ClosedError, match="closed"):
        model.generate([7])
    with pytest.raises(ClosedError):
        model.chat()
