"""The requests of docs/recipes.md, sent to a real server: what programs that are not run here would send."""

import json
import re
from pathlib import Path

import httpx
import pytest
from served_models import make_served, serving

TEXT = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
REQUESTS = re.findall(r"`POST (/[\w/]+)`:\n\n```json\n(.*?)```", TEXT, re.S)
http = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = make_served(tmp_path_factory.mktemp("served") / "demo", context_length=2000)
    with serving(folder) as url:
        yield url


def test_all_requests_of_the_document_are_found():
    assert len(REQUESTS) == TEXT.count("```json") == 4


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_requests_are_answered(url, path, body):
    asked = json.loads(body)
    answer = http.post(f"{url}{path}", json=asked | ({"options": {"num_predict": 20}} if "options" in asked else {}))
    assert answer.status_code == 200, answer.text
    if not asked.get("stream"):
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] in ("stop", "length")
        assert ("logprobs" in asked) == (choice["logprobs"] is not None)
    elif path == "/api/chat":
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["done"] for line in lines[-2:]] == [False, True]
    else:
        assert answer.text.splitlines()[-2] == "data: [DONE]"
        assert '"usage":{"prompt_tokens"' in answer.text


def test_open_webui_and_home_assistant_find_the_model(url):
    assert [model["id"] for model in http.get(f"{url}/v1/models").json()["data"]] == ["demo"]
    assert [model["name"] for model in http.get(f"{url}/api/tags").json()["models"]] == ["demo:latest"]
    assert http.get(f"{url}/api/version").json()["version"]


def test_a_suffix_is_refused_by_name(url):
    """Of Continue's autocompletion; the document says so."""
    error = http.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "a", "suffix": "b"}).json()["error"]
    assert error["param"] == "suffix"
