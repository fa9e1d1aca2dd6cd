"""What client packages write beside what was asked for, and what they send back of an earlier answer."""

import json
from datetime import datetime

import pytest
from served_models import make_served, serving
from serving_clients import http

TEXT = "Hei!"
MESSAGES = [{"role": "user", "content": "Hei"}]
ROUTES = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hei", "max_tokens": 2},
    "/v1/responses": {"input": "Hei"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 20},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/api/chat": {"messages": MESSAGES, "stream": False},
    "/api/generate": {"prompt": "Hei", "stream": False},
    "/api/show": {},
}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = make_served(tmp_path_factory.mktemp("served") / "m", answers=[TEXT, "To."], context_length=3000)
    with serving(folder) as url:
        yield url


def post(url: str, path: str, **fields):
    return http.post(url + path, json={"model": "m", **ROUTES[path], **fields}, timeout=30)


@pytest.mark.parametrize("path", ROUTES)
def test_a_field_of_a_later_version_may_be_null(url, path) -> None:
    """Null asks for nothing; whoever gives it a value is told that it is unknown."""
    assert post(url, path, of_a_later_version=None).status_code == 200
    refused = post(url, path, of_a_later_version=False)
    assert (refused.status_code, "unknown field of_a_later_version" in refused.text) == (400, True)


def test_nested_fields_of_a_later_version_may_be_null(url) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}, "later": None}
    tool = {"type": "function", "function": function, "later": None}
    for path, fields in {
        "/v1/chat/completions": {"tools": [tool], "response_format": {"type": "text", "later": None}},
        "/v1/responses": {"tools": [{"type": "function", **function}], "text": {"format": None, "later": None}},
        "/v1/messages": {"thinking": {"type": "disabled", "later": None}, "tools": []},
        "/api/chat": {"options": {"later": None}, "tools": [tool]},
    }.items():  # fmt: skip
        answer = post(url, path, **fields)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"context_management": {"edits": []}},
        {"diagnostics": {"previous_message_id": None}},
        {"speed": "fast"},
        {"inference_geo": "global"},
        {"mcp_servers": []},
        {"fallbacks": "default"},
        {"fallbacks": [{"model": "other"}]},
    ],
)
def test_fields_of_anthropic_s_betas_that_ask_for_nothing_here(url, fields) -> None:
    answer = post(url, "/v1/messages", **fields)
    assert (answer.status_code, answer.json().get("content")) == (200, [{"type": "text", "text": TEXT}])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "'clear_thinking_20251015'"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers: the client calls"),
        ({"inference_geo": "us"}, "inference_geo: it is computed where the server is"),
    ],
)
def test_fields_of_anthropic_s_betas_that_would_change_the_answer_are_refused(url, fields, words) -> None:
    answer = post(url, "/v1/messages", **fields)
    assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "text/plain;charset=UTF-8"])
def test_ollama_s_routes_take_json_of_any_type_but_not_of_a_page(url, kind) -> None:
    """LiteLLM writes no type, curl -d that of a form; so can a page of any origin, whose browser says where from."""
    types = {} if kind is None else {"content-type": kind}
    for path in ("/api/chat", "/api/generate", "/api/show"):
        content = json.dumps({"model": "m", **ROUTES[path]})
        assert http.post(url + path, content=content, headers=types).status_code == 200
        for page in ({"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            assert http.post(url + path, content=content, headers=types | page).status_code == 415
    content = json.dumps({"model": "m", **ROUTES["/v1/chat/completions"]})
    assert http.post(f"{url}/v1/chat/completions", content=content, headers=types).status_code == 415


def test_anthropic_s_tool_runner_is_told_to_do_without_a_thread(url) -> None:
    """It asks for one by itself, and sends the conversation whole where the error has this code."""
    answer = post(url, "/v1/messages", thread={"type": "create"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request"}


def test_keywords_of_a_schema_may_be_null(url) -> None:
    """Go's packages write a list of nothing so, and Anthropic's types allow it."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "enum": None, "maxLength": 3}}, "required": None}
    tool = {"function": {"name": "f", "parameters": schema}}  # and Ollama's leave its type out
    assert post(url, "/api/chat", tools=[tool]).status_code == 200
    choice = {"type": "function", "function": {"name": "f"}}
    for document in (schema, {"type": None, "properties": None, "required": None}):
        tool = {"type": "function", "function": {"name": "f", "parameters": document}}
        answer = post(url, "/v1/chat/completions", tools=[tool], tool_choice=choice, max_tokens=200).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert set(json.loads(call["function"]["arguments"])) <= {"a"}
    assert post(url, "/v1/messages", tools=[{"name": "f", "input_schema": schema}]).status_code == 200
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    answer = post(url, "/v1/chat/completions", response_format=form, max_tokens=200).json()["choices"][0]
    assert set(json.loads(answer["message"]["content"])) <= {"a"}


@pytest.mark.parametrize("empty", [[], "", [{"type": "thinking", "thinking": "Hm.", "signature": ""}]])
def test_an_empty_answer_may_come_back_to_messages(url, empty) -> None:
    """As `content` of a message whose model wrote nothing; as the last turn it is an answer without a beginning."""
    answer = {"role": "assistant", "content": empty}
    between = post(url, "/v1/messages", messages=[*MESSAGES, answer, *MESSAGES])
    assert between.json()["content"] == [{"type": "text", "text": "To."}]
    last = post(url, "/v1/messages", messages=[*MESSAGES, answer])
    assert last.json()["content"] == [{"type": "text", "text": TEXT}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "reasoning_details", "thinking_blocks"])
def test_reasoning_of_an_earlier_answer_is_not_read_again(url, name) -> None:
    """By the names that packages keep it under."""
    reasoning = (
        "Hm." if name.startswith("reasoning") and name != "reasoning_details" else [{"type": "x", "text": "Hm."}]
    )
    turns = [*MESSAGES, {"role": "assistant", "content": TEXT}, *MESSAGES]
    plain = post(url, "/v1/chat/completions", messages=turns).json()
    turns[1] = turns[1] | {name: reasoning}
    again = post(url, "/v1/chat/completions", messages=turns).json()
    assert again["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert again["choices"] == plain["choices"]


def test_a_refusal_of_another_model_is_what_it_said(url) -> None:
    def count(path: str, field: str, answer: dict) -> int:
        usage = post(url, path, **{field: [*MESSAGES, {"role": "assistant", **answer}, *MESSAGES]}).json()["usage"]
        return usage.get("prompt_tokens", usage.get("input_tokens"))

    part = {"type": "refusal", "refusal": "Nei takk."}
    for path, field in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        said = count(path, field, {"content": "Nei takk."})
        assert count(path, field, {"content": [part]}) == said > count(path, field, {"content": ""})
    assert count("/v1/chat/completions", "messages", {"content": None, "refusal": "Nei takk."}) == said
    for wrong in ({"content": [part | {"refusal": 5}]}, {"content": None, "refusal": None}):
        messages = [*MESSAGES, {"role": "assistant", **wrong}]
        assert post(url, "/v1/chat/completions", messages=messages).status_code == 400


def test_what_openai_s_package_parsed_may_come_back_to_responses(url) -> None:
    """`model_dump` of an answer of `responses.parse` has it."""
    text = {"type": "output_text", "text": "{}", "annotations": [], "logprobs": [], "parsed": {"city": "Oslo"}}
    call = {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}
    items = [
        *MESSAGES,
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [text]},
        *MESSAGES,
        call,
        {"type": "function_call_output", "call_id": "x", "output": "7"},
    ]
    answer = post(url, "/v1/responses", input=items, reasoning={"context": "current_turn", "mode": "standard"})
    assert answer.status_code == 200, answer.text


def test_models_are_a_page_of_anthropic_s_too(url) -> None:
    """Its package reads `display_name` and `created_at` of each, and asks for more where `has_more` says so."""
    page = http.get(f"{url}/v1/models?limit=1000").json()
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, "m", "m")
    (card,) = page["data"]
    assert (card["type"], card["display_name"]) == ("model", "m")
    assert datetime.fromisoformat(card["created_at"]).timestamp() == card["created"]
