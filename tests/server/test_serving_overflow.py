"""The policy for conversations that are too long, as requests and the server give it, and as usage tells it."""

import json

import httpx
import pytest
from served_models import load, make_served, serving

from normistral.errors import UsageError
from normistral.export.texts import load_texts
from normistral.server.limits import ServerLimits

http = httpx.Client(timeout=60)
PROSE = " ".join(load_texts()["bokmaal"].split())[:1500]
LONG = [{"role": "system", "content": "Svar kort."}, {"role": "user", "content": f"{PROSE} Hva er dette?"}]
OLD = [{"role": role, "content": f"{PROSE[:150]} {number}"} for number in range(6) for role in ("user", "assistant")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served") / "m", answers=["Norge."], context_length=600)


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as url:
        yield url


def post(url, messages, **fields):
    body = {"model": "m", "messages": messages, "max_tokens": 20, **fields}
    return http.post(f"{url}/v1/chat/completions", json=body)


def test_a_conversation_that_is_too_long_is_refused(url):
    for fields in ({}, {"overflow": None}, {"overflow": "error"}):
        answer = post(url, LONG, **fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("overflow", "messages"), [("cut-middle", LONG), ("drop-oldest", [*OLD, {"role": "user", "content": "Hva?"}])]
)
def test_usage_tells_what_the_library_tells(folder, url, overflow, messages):
    answer = post(url, messages, overflow=overflow).json()
    assert answer["choices"][0]["message"]["content"] == "Norge."
    model = load(folder)
    chat = model.chat(overflow=overflow)
    chat.replace(messages[:-1])
    completion = chat.send(messages[-1]["content"], max_new_tokens=20)
    usage = answer["usage"]
    assert usage["left_out"] == chat.left_out.document()
    assert usage["prompt_tokens"] == completion.timings.prompt_tokens < 600 - 20 + 1
    assert usage["prompt_tokens"] + usage["left_out"]["tokens"] == len(model.chat_template.encode(messages))
    streamed = post(url, messages, overflow=overflow, stream=True, stream_options={"include_usage": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert events[-1]["usage"]["left_out"] == usage["left_out"]


def as_responses(messages, **fields):
    system, *turns = messages
    return "/v1/responses", {"instructions": system["content"], "input": turns, "max_output_tokens": 20, **fields}


def as_messages(messages, **fields):
    system, *turns = messages
    return "/v1/messages", {"system": system["content"], "messages": turns, "max_tokens": 20, **fields}


def as_ollama(messages, **fields):
    return "/api/chat", {"messages": messages, "options": {"num_predict": 20}, "stream": False, **fields}


def said_by(document):
    """What the last document of an answer says was left out."""
    response = document.get("response", document)
    return (document.get("usage") or response.get("usage") or document).get("left_out")


SYSTEM = LONG[0]
OLDER = [SYSTEM, *OLD, {"role": "user", "content": "Hva?"}]


@pytest.mark.parametrize("face", [as_responses, as_messages, as_ollama])
@pytest.mark.parametrize(("overflow", "messages"), [("cut-middle", LONG), ("drop-oldest", OLDER)])
def test_every_api_tells_it_in_its_own_numbers(url, face, overflow, messages):
    usage = post(url, messages, overflow=overflow).json()["usage"]
    shift = 0 if face is as_ollama else 1  # there the system message is apart
    expected = usage["left_out"] | {
        "messages": usage["left_out"]["messages"] and [number - shift for number in usage["left_out"]["messages"]],
        "cuts": [cut | {"message": cut["message"] - shift} for cut in usage["left_out"]["cuts"]],
    }
    path, body = face(messages, overflow=overflow)
    whole = http.post(url + path, json={"model": "m", **body}).json()
    assert said_by(whole) == expected
    streamed = http.post(url + path, json={"model": "m", **body, "stream": True})
    found = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if "{" in line]
    told = [said for document in found if (said := said_by(document)) is not None]
    assert told
    assert all(said == expected for said in told)
    assert "Norge." in json.dumps(whole)
    path, body = face(messages)
    refused = http.post(url + path, json={"model": "m", **body})
    assert refused.status_code == 400
    assert "tokens" in refused.text


def test_their_own_words_for_it_are_taken(url, tmp_path):
    for face, fields in ((as_responses, {"truncation": "auto"}), (as_ollama, {"truncate": True})):
        path, body = face(OLDER, **fields)
        assert said_by(http.post(url + path, json={"model": "m", **body}).json())["messages"]
    with serving(
        make_served(tmp_path / "m", context_length=600), ServerLimits(grace_s=0.2, overflow="cut-middle")
    ) as own:
        for face, fields in ((as_responses, {"truncation": "disabled"}), (as_ollama, {"truncate": False})):
            path, body = face(LONG, **fields)
            assert http.post(own + path, json={"model": "m", **body}).status_code == 400
            path, body = face(LONG)
            assert said_by(http.post(own + path, json={"model": "m", **body}).json())["cuts"]


def test_a_prompt_of_ollama_and_items_of_calls_are_numbered(url):
    body = {"model": "m", "system": "Kort.", "prompt": LONG[1]["content"], "overflow": "cut-middle", "stream": False}
    answer = http.post(f"{url}/api/generate", json=body | {"options": {"num_predict": 20}}).json()
    assert [cut["message"] for cut in answer["left_out"]["cuts"]] == [0]
    calls = [{"type": "function_call", "call_id": str(i), "name": "f", "arguments": "{}"} for i in range(2)]
    results = [{"type": "function_call_output", "call_id": str(i), "output": PROSE if i else "ja"} for i in range(2)]
    items = [{"role": "user", "content": "Hei"}, *calls, *results]
    body = {"model": "m", "input": items, "overflow": "cut-middle", "max_output_tokens": 20}
    document = http.post(f"{url}/v1/responses", json=body).json()
    assert [cut["message"] for cut in document["usage"]["left_out"]["cuts"]] == [4]


def test_usage_of_a_whole_conversation_says_nothing(url):
    short = [LONG[0], {"role": "user", "content": "Hei"}]
    assert "left_out" not in post(url, short, overflow="cut-middle").json()["usage"]


def test_a_wrong_policy_is_refused_by_name(url):
    error = post(url, LONG, overflow="forget").json()["error"]
    assert error["param"] == "overflow"
    answer = http.post(f"{url}/v1/completions", json={"model": "m", "prompt": "a", "overflow": "cut-middle"})
    assert answer.json()["error"]["code"] == "unknown_field"


def test_the_server_has_a_policy_of_its_own_for_who_says_nothing(folder):
    with serving(folder, ServerLimits(grace_s=0.2, overflow="cut-middle")) as url:
        assert post(url, LONG).json()["usage"]["left_out"]["tokens"] > 0
        assert post(url, LONG, overflow="error").status_code == 400
        much = [{"role": "system", "content": PROSE}, {"role": "user", "content": "Hei"}]
        assert post(url, much).json()["error"]["code"] == "context_length_exceeded"
    with pytest.raises(UsageError, match="no policy"):
        ServerLimits(overflow="forget")
