"""Drafts change how often the model runs, and nothing else: on scripted logits, token by token."""

from collections import Counter

import numpy as np
import pytest
from drafting_models import FixedLength, draft_always, repetitive_logits
from scripted_models import ANSWER_MARKER, END_OF_TURN, TAG_TOKENS, make_model
from tiny_models import THINKING_VOCABULARY, VOCABULARY

from normistral.commands.answer import describe_timings
from normistral.errors import EngineError
from normistral.runtime.options import GenerationConfig

PROMPT = [10, 11, 12, 13, 14, 15, 16, 10, 11, 12]
LOGITS = repetitive_logits(VOCABULARY)


@pytest.fixture
def model(tmp_path):
    return draft_always(make_model(tmp_path, LOGITS))


def generate(model, prompt=PROMPT, **options):
    """The completion without drafts, and with: (plain, drafted)."""
    return [model.generate(prompt, draft=draft, **options) for draft in ("off", "auto")]


def require_same(plain, drafted):
    assert (drafted.token_ids, drafted.text, drafted.finish_reason) == (
        plain.token_ids,
        plain.text,
        plain.finish_reason,
    )
    assert drafted.logprobs == plain.logprobs


OPTIONS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "all filters": {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "penalty": {"temperature": 0.7, "repetition_penalty": 1.3},
    "greedy with a penalty": {"repetition_penalty": 1.2},
    "log-probabilities": {"temperature": 0.5, "logprobs": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("length", [1, 4, 15])
def test_the_tokens_are_those_of_plain_decoding(tmp_path, options, length):
    model = draft_always(make_model(tmp_path, LOGITS), length)
    drafted_tokens = rejected = 0
    for seed in range(25):
        plain, drafted = generate(model, seed=seed, max_new_tokens=40, ignore_eos=True, **options)
        require_same(plain, drafted)
        assert plain.timings.drafted_tokens == 0
        drafted_tokens += drafted.timings.drafted_tokens
        rejected += drafted.timings.drafted_tokens - drafted.timings.accepted_tokens
        if options.get("temperature", 0) == 0:
            break  # every seed gives the same
    assert drafted_tokens > rejected > 0


def test_an_accepted_token_saves_a_step(model):
    model._backend.forwarded.clear()
    completion = model.generate(PROMPT, max_new_tokens=40, ignore_eos=True)
    forwards = len(model._backend.forwarded) - 1  # without the prompt's
    timings = completion.timings
    assert forwards == timings.new_tokens - 1 - timings.accepted_tokens
    assert sum(map(len, model._backend.forwarded[1:])) == forwards + timings.drafted_tokens
    assert 0 < timings.accepted_tokens < timings.drafted_tokens


def test_the_distribution_is_the_model_s(tmp_path):
    """The first three tokens, all of them drafted, of 3,000 seeds, against their exact probabilities.

    Chi-square over the 27 sequences of three likely tokens: by chance it exceeds 61 in one of 10,000 sets of seeds
    (26 degrees of freedom); the seeds are fixed. Keeping a draft always, or one time too seldom, gives hundreds.
    """
    likely, weights = [20, 21, 22], np.array([0.6, 0.3, 0.1])
    logits = np.full(VOCABULARY, -80.0, np.float32)
    logits[likely] = np.log(weights)
    model = draft_always(make_model(tmp_path, lambda token_ids: logits), 3)
    prompt = [20, 20, 20, 20, 21, 22, 20, 20]  # whatever comes first, something was seen after it
    counts, accepted = Counter(), 0
    for seed in range(3000):
        completion = model.generate(prompt, temperature=1.0, seed=seed, max_new_tokens=4, ignore_eos=True)
        counts[completion.token_ids[1:]] += 1
        accepted += completion.timings.accepted_tokens
    chances = {
        (likely[a], likely[b], likely[c]): weights[a] * weights[b] * weights[c]
        for a in range(3)
        for b in range(3)
        for c in range(3)
    }
    assert counts.keys() <= chances.keys()
    chi_square = sum((counts[key] - 3000 * chance) ** 2 / (3000 * chance) for key, chance in chances.items())
    assert chi_square < 61
    assert accepted > 1000


def test_a_stop_token_inside_an_accepted_draft_ends_the_answer(tmp_path):
    ids = [30, 31, 32, END_OF_TURN, 33]

    def next_logits(token_ids):
        logits = np.zeros(VOCABULARY, np.float32)
        logits[ids[(len(token_ids) - 7) % len(ids)]] = 9.0
        return logits

    model = draft_always(make_model(tmp_path, next_logits))
    plain, drafted = generate(model, [30, 31, 32, END_OF_TURN, 33, 30, 31])
    require_same(plain, drafted)
    assert (drafted.token_ids, drafted.finish_reason) == ((30, 31, 32, END_OF_TURN), "stop")
    plain, drafted = generate(model, [30, 31, 32, END_OF_TURN, 33, 30, 31], ignore_eos=True, max_new_tokens=23)
    require_same(plain, drafted)
    assert drafted.timings.accepted_tokens > 10


def test_a_stop_text_inside_an_accepted_draft_ends_the_answer(model):
    plain = model.generate(PROMPT, max_new_tokens=30, ignore_eos=True, draft="off")
    stop = plain.text[8:10]
    plain, drafted = generate(model, max_new_tokens=30, ignore_eos=True, stop=stop)
    require_same(plain, drafted)
    assert stop not in drafted.text
    again, fresh = (model.generate([*PROMPT, *plain.token_ids[:4], 9], draft=draft) for draft in ("auto", "off"))
    require_same(fresh, again)  # whatever the first answer left in the cache


@pytest.mark.parametrize("context", range(12, 30))
def test_nothing_is_drafted_beyond_the_context(tmp_path, context):
    model = draft_always(make_model(tmp_path, LOGITS, context_length=context), 15)
    longest = []
    inner = model._backend.next_logits
    model._backend.next_logits = lambda token_ids: (longest.append(len(token_ids)), inner(token_ids))[1]
    plain, drafted = generate(model, ignore_eos=True)
    require_same(plain, drafted)
    assert drafted.finish_reason == "context"
    assert len(PROMPT) + len(drafted.token_ids) == context
    assert max(longest) < context  # the last token is never fed


@pytest.mark.parametrize("most", range(1, 12))
def test_max_new_tokens_counts_tokens_and_not_steps(model, most):
    plain, drafted = generate(model, max_new_tokens=most, ignore_eos=True)
    require_same(plain, drafted)
    assert drafted.timings.new_tokens == most
    assert drafted.timings.drafted_tokens <= max(0, most - 2) * 4


@pytest.mark.parametrize("budget", [0, 1, 3, 6, 9])
def test_forced_tokens_overrule_a_draft(tmp_path, budget):
    """The close tag is written in the middle of a repetition, where the draft says otherwise."""
    logits = repetitive_logits(THINKING_VOCABULARY)
    model = draft_always(make_model(tmp_path, logits, reasoning=TAG_TOKENS, stop_token_ids=()))
    prompt = [TAG_TOKENS.open_id, *PROMPT]
    plain, drafted = generate(model, prompt, max_reasoning_tokens=budget, max_new_tokens=25)
    require_same(plain, drafted)
    assert drafted.reasoning == plain.reasoning
    assert drafted.token_ids[budget] == TAG_TOKENS.close_id


def test_cancel_stops_within_one_token_even_inside_a_draft(model):
    chunks = model.stream(PROMPT, max_new_tokens=100, ignore_eos=True)
    while next(chunks).timings.accepted_tokens == 0:
        pass
    model.cancel()
    assert [chunk.finish_reason for chunk in chunks] == ["cancelled"]


def test_the_cache_keeps_the_answer_without_its_last_token_and_no_rejected_draft(tmp_path):
    model = draft_always(make_model(tmp_path, LOGITS))
    for length in range(2, 20):
        answer = model.generate(PROMPT, max_new_tokens=length, ignore_eos=True, seed=length, temperature=0.7)
        with model.borrow_sequence() as sequence:
            assert sequence._token_ids == [*PROMPT, *answer.token_ids[:-1]]


def test_a_second_turn_reuses_as_much_as_after_plain_decoding(tmp_path):
    seen = {}
    for draft in ("off", "auto"):
        model = draft_always(make_model(tmp_path / draft, LOGITS))
        chat = model.chat()
        options = {"draft": draft, "max_new_tokens": 30, "temperature": 0.5, "seed": 1}
        answers = [chat.send(message, **options) for message in ("hei hei hei", "og hei", "ha det")]
        seen[draft] = [(answer.token_ids, answer.timings.cached_tokens) for answer in answers]
    assert seen["off"] == seen["auto"]
    assert seen["auto"][1][1] > 0


def test_leaving_a_stream_inside_a_draft_leaves_the_model_usable(model):
    expected = model.generate(PROMPT, max_new_tokens=20, ignore_eos=True, draft="off").token_ids
    stream = model.stream(PROMPT, max_new_tokens=100, ignore_eos=True)
    while next(stream).timings.accepted_tokens == 0:
        pass
    stream.close()
    assert model.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, EngineError("broken")])
def test_an_interrupted_check_leaves_the_model_usable(model, error):
    expected = model.generate(PROMPT, max_new_tokens=20, ignore_eos=True, draft="off").token_ids
    inner = model._backend.next_logits

    def fail_once(token_ids):
        if len(model._backend.forwarded[-1]) > 1 and len(token_ids) > 15:
            model._backend.next_logits = inner
            raise error
        return inner(token_ids)

    model._backend.next_logits = fail_once
    with pytest.raises(BaseException, match="broken" if isinstance(error, EngineError) else None):
        model.generate(PROMPT, max_new_tokens=20, ignore_eos=True)
    assert model._backend.next_logits is inner
    assert model.generate(PROMPT, max_new_tokens=20, ignore_eos=True).token_ids == expected


def test_drafting_is_on_unless_it_is_switched_off(model):
    assert GenerationConfig().draft == "auto"
    assert model.generate(PROMPT, max_new_tokens=20, ignore_eos=True, draft="off").timings.drafted_tokens == 0
    assert model.generate(PROMPT, max_new_tokens=20, ignore_eos=True).timings.drafted_tokens > 0


def test_a_seed_gives_the_same_text_every_time_so_nothing_is_drafted(tmp_path):
    model, options = make_model(tmp_path, LOGITS), {"max_new_tokens": 40, "ignore_eos": True}
    model._step_costs = FixedLength(4)
    assert model.generate(PROMPT, seed=1, **options).timings.drafted_tokens == 0
    assert model.generate(PROMPT, **options).timings.drafted_tokens > 0


def test_the_line_on_an_answer_counts_drafts_if_there_were_any(model):
    plain, drafted = generate(model, max_new_tokens=20, ignore_eos=True)
    counts = f"{drafted.timings.accepted_tokens} of {drafted.timings.drafted_tokens} guessed tokens were right"
    assert describe_timings(drafted.timings).endswith(counts)
    assert "draft" not in describe_timings(plain.timings)


def test_an_answer_that_copies_the_prompt_takes_a_fraction_of_the_steps(tmp_path):
    text = "Fjorden lå blank og stille, og på brygga satt to måker og så ut over vannet."
    model = draft_always(make_model(tmp_path, [text], after=ANSWER_MARKER), 7)
    plain, drafted = (model.chat().send(f"Gjenta: {text}", draft=draft) for draft in ("off", "auto"))
    require_same(plain, drafted)
    assert drafted.text == text
    steps = drafted.timings.new_tokens - drafted.timings.accepted_tokens
    assert steps < plain.timings.new_tokens / 4
