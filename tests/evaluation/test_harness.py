"""The adapter for lm-evaluation-harness, without the harness: how it tokenises, cuts, orders and generates.

That the scores are those of the harness's own `hf` model is shown by lm_eval_tasks/compare_with_hf.py.
"""

import logging
import subprocess
import sys

import numpy as np
import pytest
import text_models
from scripted_models import TAG_TOKENS, make_base_model, make_model
from test_imports import modules_after
from tiny_models import VOCABULARY

from normistral.errors import UsageError
from normistral.evaluation.harness import Harness, generation_options, rolling_windows
from normistral.runtime.engines.scripted import random_logits
from normistral.runtime.model import Model

PAIRS = [
    ("Hva heter hovedstaden i Norge?", " Oslo"),
    ("Hva heter hovedstaden i Norge? ", "Oslo"),
    ("Svar:  \n", "Blåbærsyltetøy"),
    ("Svar:", "\n\nsystem"),
    ("landet", " og Oslo"),
    ("", "Oslo"),
    ("", " Oslo er en by"),
    ("<s>Oslo", " er"),
    ("  ", "Oslo"),
]


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path, random_logits(VOCABULARY))


def with_tokenizer(model, backend):
    return Harness(Model(model._backend, model.manifest, text_models.wrap(backend), name="scripted"))


def encode_pair_as_lm_eval(tokenizer, context, continuation):
    """TemplateLM.loglikelihood, TemplateLM._encode_pair and HFLM.tok_encode of lm_eval 0.4.13, for causal models."""

    def tok_encode(text, add_special_tokens=None):
        if add_special_tokens is None and text.startswith(tokenizer.decode(tokenizer.bos_token_id)):
            add_special_tokens = False
        return tokenizer.encode(text, **({} if add_special_tokens is None else {"add_special_tokens": False}))

    if context == "":
        continuation_enc = tok_encode(continuation, add_special_tokens=False)
        if tokenizer.bos_token_id != continuation_enc[0]:
            return [tokenizer.bos_token_id], continuation_enc
        return continuation_enc[:1], continuation_enc[1:]
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = tok_encode(context + continuation)
    context_enc = tok_encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@pytest.mark.parametrize("name", text_models.BACKENDS)
@pytest.mark.parametrize(("context", "continuation"), PAIRS)
def test_pairs_are_encoded_as_the_harness_does(model, name, context, continuation):
    backend = text_models.BACKENDS[name]()
    harness = with_tokenizer(model, backend)
    expected = encode_pair_as_lm_eval(text_models.reference(backend), context, continuation)
    assert all(expected)
    assert harness.encode_pair(context, continuation) == expected


def test_without_a_bos_an_empty_context_is_the_prefix(model):
    harness = Harness(model)  # its tokenizer adds none
    assert model.tokenizer.encode("") == []
    assert harness.encode_pair("", "ø") == ([harness.prefix_id], model.tokenizer.encode("ø"))
    assert harness.encode_pair(" \n", "ø") == ([harness.prefix_id], model.tokenizer.encode(" \nø"))
    assert harness.encode_pair("", "<s>ø") == ([harness.prefix_id], model.tokenizer.encode("ø"))


@pytest.mark.parametrize(("context", "continuation"), [("Oslo", ""), ("", ""), ("", "<s>")])
def test_a_continuation_without_tokens_is_refused(model, context, continuation):
    with pytest.raises(UsageError, match="gives no token of its own"):
        Harness(model).loglikelihood([(context, continuation)])


def test_an_answer_is_the_sum_of_its_tokens(model):
    harness = Harness(model)
    ((logprob, greedy),) = harness.loglikelihood([("Svar: ", "blåbær")])
    ids = model.tokenizer.encode("Svar: blåbær")
    assert logprob == pytest.approx(model.score(ids, last=len(" blåbær".encode())).logprobs.sum())
    assert greedy is False


def test_what_greedy_decoding_would_write_is_greedy(model):
    ids = list(model.generate(model.tokenizer.encode("Svar:"), max_new_tokens=3, ignore_eos=True).token_ids)
    harness = Harness(model)
    assert harness._score(model.tokenizer.encode("Svar:"), ids)[1] is True
    assert harness._score(model.tokenizer.encode("Svar:"), [*ids[:2], (ids[2] + 1) % VOCABULARY])[1] is False


def test_answers_come_in_the_order_of_the_requests_and_are_reported_one_by_one(model):
    pairs = [("b " * 9, "to"), ("a " * 9, "en"), ("b " * 9, "tre"), ("a " * 9, "fire")]
    reported = {}
    answers = Harness(model).loglikelihood(pairs, reported.__setitem__)
    assert [reported[i] for i in range(4)] == answers
    assert list(reported) == [1, 3, 0, 2]  # by their tokens
    assert answers == [Harness(model).loglikelihood([pair])[0] for pair in pairs]
    assert len(set(answers)) == 4


def test_the_choices_of_a_question_share_its_tokens(model):
    questions = ["Hva heter hovedstaden i Norge? Svar:", "Kva heiter det høgaste fjellet i Noreg? Svar:"]
    pairs = [(question, choice) for choice in (" en", " to", " tre") for question in questions]  # questions alternate
    Harness(model).loglikelihood(pairs)
    fed = sum(map(len, model._backend.forwarded))
    once = sum(len(model.tokenizer.encode(question)) for question in questions)
    assert once < fed <= once + sum(len(choice.encode()) for _, choice in pairs)


def test_what_is_too_long_is_cut_from_the_left_with_a_warning(model, caplog):
    harness = Harness(model, max_length=20)
    with caplog.at_level(logging.WARNING):
        cut, whole = harness.loglikelihood([("x" * 30, "ja"), ("x" * 19, "ja")])
    assert cut == whole
    assert [record.message for record in caplog.records] == ["a request of 32 tokens was cut from the left to 21"]
    with pytest.raises(UsageError, match="a continuation of 21 tokens does not fit into 20"):
        harness.loglikelihood([("x", "y" * 21)])


@pytest.mark.parametrize("max_length", [0, 401, True, "20", 20.0])
def test_a_length_that_the_model_does_not_have_is_refused(model, max_length):
    with pytest.raises(UsageError, match="max_length must be from 1 to the context of scripted, 400 tokens"):
        Harness(model, max_length)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 17, 23])
def test_rolling_windows_score_every_token_once_and_the_last_looks_far_back(count):
    windows = list(rolling_windows(list(range(count)), 99, 8))
    assert [token for _, tokens in windows for token in tokens] == list(range(count))
    for number, (context, tokens) in enumerate(windows):
        assert len(context) + len(tokens) == min(8, count) + 1
        assert context == ([99] if number == 0 else list(range(tokens[0] - len(context), tokens[0])))


def test_a_whole_text_is_scored_window_by_window(model):
    harness = Harness(model, max_length=8)
    ids = model.tokenizer.encode("blåbærsyltetøy")
    first = model.score([harness.prefix_id, *ids[:8]]).logprobs.sum()
    assert len(ids) == 17
    second, third = model.score(ids[7:16]).logprobs.sum(), model.score(ids[8:17], last=1).logprobs.sum()
    assert harness.loglikelihood_rolling(["blåbærsyltetøy", ""]) == [pytest.approx(first + second + third), 0]


def test_generation_ends_before_a_stop_text(tmp_path):
    model = make_base_model(tmp_path, [" Oslo\nBergen"], after="Hovedstad:")
    reported = {}
    answers = Harness(model).generate_until(
        [("Hovedstad:", {"until": ["\n"]}), ("Hovedstad:", {"until": "slo"}), ("Hovedstad:", {"max_gen_toks": 3})],
        reported.__setitem__,
    )
    assert answers == [" Oslo", " O", " Os"]
    assert [reported[i] for i in range(3)] == answers


def test_generation_goes_to_the_models_own_end_without_writing_it(tmp_path):
    model = make_base_model(tmp_path, [" Oslo"], after="Hovedstad:")
    assert Harness(model).generate_until([("Hovedstad:", {"until": None})]) == [" Oslo"]


def test_reasoning_is_no_part_of_the_text(tmp_path):
    model = make_model(tmp_path, [" <think> hm</think> Oslo"], reasoning=TAG_TOKENS)
    prompt = Harness(model).render_chat([{"role": "user", "content": "Hovedstad?"}])
    assert Harness(model).generate_until([(prompt, {"until": []})]) == ["Oslo"]


def test_a_prompt_makes_room_for_its_answer(model, caplog):
    harness = Harness(model, max_length=20)
    with caplog.at_level(logging.WARNING):
        harness.generate_until([("abc" * 10, {"max_gen_toks": 5})])
    assert model._backend.forwarded[0] == model.tokenizer.encode("abc" * 5)
    assert [record.message for record in caplog.records] == ["a request of 30 tokens was cut from the left to 15"]
    with pytest.raises(UsageError, match="20 tokens to generate leave no room for a prompt in 20"):
        harness.generate_until([("abc", {"max_gen_toks": 20})])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({}, {"max_new_tokens": 256, "temperature": 0.0, "stop": ()}),
        ({"until": "\n", "max_new_tokens": 5}, {"max_new_tokens": 5, "temperature": 0.0, "stop": ("\n",)}),
        ({"until": ["", "a"], "max_tokens": 7, "max_gen_toks": 6}, {"max_new_tokens": 6, "stop": ("a",)}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
    ],
)
def test_a_tasks_generation_options_are_ours(task, expected):
    options = generation_options(task)
    assert options | expected == options


def test_a_tasks_options_are_not_changed_in_place():
    task = {"until": ["\n"], "max_gen_toks": 3}
    generation_options(task)
    assert task == {"until": ["\n"], "max_gen_toks": 3}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"num_beams": 4}, "unknown option num_beams"),
        ({"do_sample": True}, "do_sample needs a temperature above 0"),
        ({"max_gen_toks": "9"}, "max_gen_toks must be a whole number, not '9'"),
        ({"top_p": 2.0}, "top_p must be a number from 0 to 1"),
    ],
)
def test_an_option_that_cannot_be_kept_is_refused(model, task, said):
    with pytest.raises(UsageError, match=said):
        Harness(model).generate_until([("abc", task)])


def test_conversations_are_rendered_by_the_artifacts_template(model):
    messages = [{"role": "user", "content": "Hei "}, {"role": "assistant", "content": "Svaret er \n"}]
    rendered = Harness(model).render_chat(messages[:1])
    assert rendered == "<|im_start|> user\nHei <|im_end|>\n<|im_start|> assistant\n"
    continued = Harness(model).render_chat(messages, add_generation_prompt=False)
    assert continued == rendered + "Svaret er"


def test_a_base_model_has_no_conversations(tmp_path):
    model = make_base_model(tmp_path, ["x"])
    with pytest.raises(UsageError, match="is a base model"):
        Harness(model).render_chat([{"role": "user", "content": "Hei"}])


def test_scores_do_not_depend_on_what_was_asked_before(model):
    pairs = [("Noreg er eit land i ", choice) for choice in ("Europa", "Asia", "Afrika")]
    alone = [Harness(model).loglikelihood([pair])[0][0] for pair in pairs]
    np.testing.assert_array_equal([logprob for logprob, _ in Harness(model).loglikelihood(pairs)], alone)


def test_the_adapter_imports_neither_the_harness_nor_torch():
    assert not modules_after("import normistral.evaluation.harness, normistral.evaluation.lm_eval") & {
        *("lm_eval", "torch", "transformers", "datasets", "openvino", "onnxruntime"),
    }


def test_without_the_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; from normistral.evaluation.lm_eval import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: lm-evaluation-harness is not installed",
        'hint: pip install "normistral[lm-eval]"',
    ]
