"""Answers of a form that a request asks for, through all ways to ask."""

import json
import re

import httpx
import pytest
from served_models import make_served, serving

SCHEMA = {
    "type": "object",
    "properties": {"by": {"type": "string", "maxLength": 8}, "tall": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["by", "tall"],
    "additionalProperties": False,
}
http = httpx.Client(timeout=30)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m")) as url:
        yield url


def ask(url: str, **fields) -> dict:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hei"}],
        "temperature": 1,
        "max_tokens": 120,
        **fields,
    }
    answer = http.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema(url, seed) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "by", "schema": SCHEMA, "strict": True}}
    choices = [
        ask(url, seed=seed, response_format=form),
        ask(url, seed=seed, structured_outputs={"json": SCHEMA}),
        ask(url, seed=seed, structured_outputs={"json": json.dumps(SCHEMA)}),
    ]
    texts = {choice["message"]["content"] for choice in choices}
    assert len(texts) == 1
    document = json.loads(texts.pop())
    assert set(document) == {"by", "tall"}
    assert 0 <= document["tall"] <= 99
    assert choices[0]["finish_reason"] == "stop"


def test_an_expression_a_choice_and_a_grammar(url) -> None:
    assert re.fullmatch(r"[a-c]{5}", ask(url, structured_outputs={"regex": "[a-c]{5}"})["message"]["content"])
    assert ask(url, structured_outputs={"choice": ["ja", "nei"]})["message"]["content"] in ("ja", "nei")
    grammar = 'start: "(" start ")" | "x"'
    assert re.fullmatch(r"\(*x\)*", ask(url, structured_outputs={"grammar": grammar}, seed=1)["message"]["content"])


def test_an_answer_that_is_cut_off_says_so(url) -> None:
    assert ask(url, structured_outputs={"regex": "a{50}"}, max_tokens=5)["finish_reason"] == "length"


def test_a_stream_and_a_text_completion_keep_to_it_too(url) -> None:
    body = {"model": "m", "prompt": "x", "structured_outputs": {"regex": "[0-9]{4}"}, "stream": True, "temperature": 1}
    lines = [line for line in http.post(f"{url}/v1/completions", json=body).text.split("\n\n") if line][:-1]
    text = "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)
    assert re.fullmatch(r"[0-9]{4}", text)
