"""Parameters that clients of other servers send: the answer is the library's with the same options."""

import json

import httpx
import pytest
from scripted_models import TAG_TOKENS
from served_models import load, make_served, serving

http = httpx.Client()
MESSAGES = [{"role": "user", "content": "Hei"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served") / "m")


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as url:
        yield url


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def chat(url: str, **fields) -> dict:
    answer = http.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": MESSAGES, **fields}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def complete(url: str, **fields) -> dict:
    answer = http.post(f"{url}/v1/completions", json={"model": "m", **fields}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize(
    "options",
    [
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"logit_bias": {"70": 50.0, "71": -100}},
        {"typical_p": 0.2},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["e"]},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    ],
)
def test_samplers_are_the_library_s(url, model, options) -> None:
    common = {"temperature": 1.0, "seed": 5, "ignore_eos": True}
    said = chat(url, max_tokens=30, **common, **options)["choices"][0]["message"]["content"]
    here = {**options}
    if "logit_bias" in here:
        here["logit_bias"] = {int(token_id): value for token_id, value in here["logit_bias"].items()}
    expected = model.chat().send("Hei", max_new_tokens=30, **common, **here).text
    plain = model.chat().send("Hei", max_new_tokens=30, **common).text
    assert said == expected != plain


def test_minus_one_new_tokens_are_as_many_as_fit(url) -> None:
    document = chat(url, max_tokens=-1, ignore_eos=True)
    assert document["choices"][0]["finish_reason"] == "length"
    assert document["usage"]["total_tokens"] == 400


def test_empty_stop_texts_stop_nothing(url) -> None:
    plain = chat(url, max_tokens=8, ignore_eos=True)["choices"]
    assert chat(url, max_tokens=8, ignore_eos=True, stop="")["choices"] == plain
    assert chat(url, max_tokens=8, ignore_eos=True, stop=["", ""])["choices"] == plain


def test_reasoning_budget_by_other_names(tmp_path) -> None:
    folder = make_served(
        tmp_path / "m",
        answers=["<think>lenge " + "og vel " * 60 + "</think>Oslo"],
        reasoning=TAG_TOKENS,
        context_length=1000,
    )
    with serving(folder) as url:
        for fields in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
            counted = chat(url, max_tokens=20, **fields)["usage"]["completion_tokens_details"]
            assert (
                counted["reasoning_tokens"]
                == chat(url, max_tokens=20, max_reasoning_tokens=0)["usage"]["completion_tokens_details"][
                    "reasoning_tokens"
                ]
            )
        minimal = chat(url, max_tokens=600, reasoning_effort="minimal")["usage"]["completion_tokens_details"]
        free = chat(url, max_tokens=600, reasoning_effort="high")["usage"]["completion_tokens_details"]
        assert minimal["reasoning_tokens"] < 260 < free["reasoning_tokens"]


def test_an_echo_has_the_log_probabilities_of_the_prompt(url, model) -> None:
    prompt = "<s>Hei på deg"
    echoed = complete(url, prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0, ignore_eos=True)
    plain = complete(url, prompt=prompt, logprobs=2, max_tokens=3, temperature=0, ignore_eos=True)
    ids = model.tokenizer.encode(prompt)
    scored = model.score(ids)
    lists = echoed["logprobs"]
    assert echoed["text"].endswith(plain["text"])
    assert (lists["token_logprobs"][0], lists["top_logprobs"][0]) == (None, None)
    assert lists["token_logprobs"][1 : len(ids)] == pytest.approx(scored.logprobs.tolist(), abs=1e-5)
    assert lists["token_logprobs"][len(ids) :] == plain["logprobs"]["token_logprobs"]
    assert all(1 <= len(top) <= 2 for top in lists["top_logprobs"][1:])  # by text, which two broken bytes may share
    assert len({len(values) for values in lists.values()}) == 1
    # lm-evaluation-harness asks so, and takes a token for greedy that equals the most likely one
    pairs = list(zip(lists["top_logprobs"], lists["tokens"], strict=True))[1 : len(ids)]
    for (top, token), greedy in zip(pairs, scored.greedy.tolist(), strict=True):
        assert "\ufffd" in token or (max(top, key=top.get) == token) == greedy


def test_an_echo_comes_first_in_a_stream(url) -> None:
    body = {"model": "m", "prompt": ["Hei", "Ja"], "echo": True, "max_tokens": 2, "stream": True}
    lines = [line for line in http.post(f"{url}/v1/completions", json=body).text.split("\n\n") if line]
    texts = {0: "", 1: ""}
    for line in lines[:-1]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts[0].startswith("Hei")
    whole = http.post(f"{url}/v1/completions", json=body | {"stream": False}).json()["choices"]
    assert [choice["text"] for choice in whole] == [texts[0], texts[1]]


def test_a_final_message_is_continued(url, model) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "Den heter "}]
    said = chat(url, messages=begun, continue_final_message=True, max_tokens=5, temperature=0, ignore_eos=True)
    open_turn = model.chat_template.render(begun, add_generation_prompt=False)
    prompt = open_turn[: open_turn.rindex("Den heter") + len("Den heter")]
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    expected = model.generate(ids, max_new_tokens=5, temperature=0, ignore_eos=True).text
    assert said["choices"][0]["message"]["content"] == expected
    assert said["usage"]["prompt_tokens"] == len(ids)


def test_a_closed_conversation_is_completed_as_it_is(url, model) -> None:
    closed = chat(url, add_generation_prompt=False, max_tokens=1)["usage"]["prompt_tokens"]
    assert closed == len(model.chat_template.encode(MESSAGES, add_generation_prompt=False))


def test_control_text_of_a_continued_message_stays_text(url, model) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "a<|im_end|>b"}]
    ids = model.chat_template.encode(begun, continue_final_message=True)
    assert model.tokenizer.decode(ids, skip_special_tokens=False).endswith("a<|im_end|>b")
    assert ids.count(4) == 1  # the user's turn's own end
