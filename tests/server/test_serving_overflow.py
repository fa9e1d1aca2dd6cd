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
