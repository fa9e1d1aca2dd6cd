"""/v1/chat/completions: what it answers, whole and in a stream."""

import json

import httpx
import pytest
from scripted_models import TAG_TOKENS
from served_models import load, make_served, serving

http = httpx.Client()  # one: each would read the system's certificates
MESSAGES = [{"role": "user", "content": "Hva heter hovedstaden?"}]
ANSWER = "Den heter Oslo, sa kråka på brua."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served") / "kråke", answers=[ANSWER, "To."])


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as url:
        yield url


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served") / "random")


@pytest.fixture(scope="module")
def random_url(random_folder):
    with serving(random_folder) as url:
        yield url


def ask(url: str, model: str = "kråke", **fields) -> httpx.Response:
    body = {"model": model, "messages": MESSAGES, **fields}
    return http.post(f"{url}/v1/chat/completions", json=body, timeout=30)


def events(url: str, **fields) -> list[dict]:
    lines = [line for line in ask(url, stream=True, **fields).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_answer_has_openai_s_shape(url) -> None:
    answer = ask(url)
    document = answer.json()
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] in document["id"]
    assert document["object"] == "chat.completion"
    assert document["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = document["usage"]
    assert usage["completion_tokens"] == len(ANSWER.encode()) + 1  # the tokenizer's tokens are bytes; and the stop
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_stream_says_the_same_in_pieces(url) -> None:
    got = events(url, stream_options={"include_usage": True})
    choices = [event["choices"][0] for event in got[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all(event["usage"] is None for event in got[:-1])
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == len(ANSWER.encode()) + 1


def test_a_stream_without_usage_has_none(url) -> None:
    assert all("usage" not in event for event in events(url))


@pytest.mark.parametrize("stop", ["sa kråka", ["på taket", "sa kråka"]])
def test_a_stop_text_ends_the_answer_across_chunks(url, stop) -> None:
    whole = ask(url, stop=stop).json()["choices"][0]
    streamed = [event["choices"][0] for event in events(url, stop=stop)]
    assert whole["message"]["content"] == "Den heter Oslo, "
    assert "".join(choice["delta"].get("content", "") for choice in streamed) == "Den heter Oslo, "
    assert whole["finish_reason"] == streamed[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_says_length(url, field) -> None:
    choice = ask(url, **{field: 3}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Den", "length")


def test_a_conversation_goes_on_and_is_not_computed_again(url) -> None:
    first = ask(url, user="samtale").json()
    said = first["choices"][0]["message"]
    document = ask(url, messages=[*MESSAGES, said, {"role": "user", "content": "Og så?"}]).json()
    assert document["choices"][0]["message"]["content"] == "To."
    assert document["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"]


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_answers_are_the_library_s(random_folder, random_url, temperature) -> None:
    with load(random_folder) as model:
        own = model.chat().send(MESSAGES[0]["content"], temperature=temperature, seed=7, max_new_tokens=40, logprobs=2)
    got = ask(
        random_url, "random", temperature=temperature, seed=7, max_tokens=40, logprobs=True, top_logprobs=2
    ).json()["choices"][0]
    assert got["message"]["content"] == own.text
    assert [token["logprob"] for token in got["logprobs"]["content"]] == pytest.approx(own.logprobs)
    assert all(len(token["top_logprobs"]) == 2 for token in got["logprobs"]["content"])


def test_choices_have_seeds_of_their_own_and_come_again(random_url) -> None:
    options = {"temperature": 1, "seed": 5, "max_tokens": 12}
    three = [choice["message"]["content"] for choice in ask(random_url, "random", n=3, **options).json()["choices"]]
    assert len(set(three)) == 3
    alone = [ask(random_url, "random", **options | {"seed": 5 + i}).json() for i in range(3)]
    assert three == [one["choices"][0]["message"]["content"] for one in alone]
    streamed = ["", "", ""]
    for event in events(random_url, model="random", n=3, **options):
        choice = event["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == three


def test_the_prompt_of_several_choices_counts_once(random_url) -> None:
    one, three = (ask(random_url, "random", n=n, max_tokens=4).json()["usage"] for n in (1, 3))
    assert one["prompt_tokens"] == three["prompt_tokens"]
    assert three["completion_tokens"] == 12


def test_logprobs_in_a_stream_are_those_of_the_whole(random_url) -> None:
    options = {"model": "random", "logprobs": True, "max_tokens": 10}
    whole = ask(random_url, **options).json()["choices"][0]["logprobs"]["content"]
    choices = [event["choices"][0] for event in events(random_url, **options)]
    assert [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]] == whole


def test_reasoning_has_a_field_of_its_own(tmp_path) -> None:
    folder = make_served(tmp_path / "thinks", answers=["<think>La meg se.</think>Oslo."], reasoning=TAG_TOKENS)
    with serving(folder) as url:
        document = ask(url, "thinks").json()
        pieces = [event["choices"][0]["delta"] for event in events(url, model="thinks")]
    message = document["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Oslo.", "La meg se.")
    assert document["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("La meg se.") + 1  # and the tag
    assert "".join(piece.get("reasoning_content", "") for piece in pieces) == "La meg se."
    assert "".join(piece.get("content", "") for piece in pieces) == "Oslo."


def test_parts_of_text_and_the_role_developer_are_understood(random_url) -> None:
    parts = [{"type": "text", "text": "Hei"}, {"type": "text", "text": "der"}]
    given = [{"role": "developer", "content": "Kort."}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Kort."}, {"role": "user", "content": "Hei\nder"}]
    got = [ask(random_url, "random", messages=messages, max_tokens=8).json() for messages in (given, plain)]
    assert got[0]["choices"] == got[1]["choices"]
