"""What a server refuses, and in which words; nothing of it reaches the worker."""

import gzip

import pytest
from served_models import CONTEXT, make_served, open_served, serving
from serving_clients import error_of, http

from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.limits import ServerLimits
from normistral.server.schemas import Message
from normistral.server.server import background_server

LIMITS = ServerLimits(body_bytes=64 * 1024, choices=4, new_tokens=100, grace_s=0.2, body_s=0.5, header_s=0.5)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hei"}]}
TEXT = {"model": "m", "prompt": "Hei"}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_served(tmp_path_factory.mktemp("served") / "m"), LIMITS) as url:
        yield url


CHAT_REFUSALS = [
    ({"foo": 1}, "foo", "unknown field foo"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "unknown field"),
    (
        {"messages": [{"role": "narrator", "content": "x"}]},
        "messages.0.role",
        "'system', 'developer', 'user', 'assistant' or 'tool'",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0", "valid string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        None,
        "text only",
    ),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0", "valid string"),
    ({"messages": CHAT["messages"] * 1025}, "messages", "at most 1024 items"),
    ({"functions": [{}]}, "functions", "functions became tools"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
    ({"presence_penalty": -3}, "presence_penalty", "greater than or equal to -2"),
    ({"logit_bias": {"5": 101}}, None, "less than or equal to 100"),
    ({"logit_bias": {"five": 1}}, None, "pattern"),
    ({"logit_bias": {"999999": 1}}, None, "no token id of m"),
    ({"typical_p": 0}, "typical_p", "greater than 0"),
    ({"xtc_threshold": 0.6}, "xtc_threshold", "less than or equal to 0.5"),
    ({"dry_sequence_breakers": [""]}, None, "at least 1 character"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort", "'none', 'minimal'"),
    ({"reasoning_effort": "low", "max_reasoning_tokens": 5}, None, "different limits"),
    ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs.documents", "unknown field"),
    ({"continue_final_message": True}, "continue_final_message", "last message of the assistant"),
    ({"max_tokens": 0}, "max_tokens", "-1 is as many as fit"),
    ({"verbosity": "low"}, "verbosity", "cannot be set"),
    ({"n": 10**9}, "n", "more than this server writes"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 5}, "n", "more than this server writes for a request (4)"),
    ({"n": True}, "n", "valid integer"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty", "are the same, and differ"),
    ({"mirostat": 2}, "mirostat", "no mirostat"),
    ({"use_beam_search": True}, "use_beam_search", "no beam search"),
    ({"length_penalty": 2}, "length_penalty", "no beam search"),
    ({"id_slot": 3}, "id_slot", "chooses the slot"),
    ({"guided_json": {}}, "guided_json", "became structured_outputs"),
    ({"function_call": "auto"}, "function_call", "functions became tools"),
    ({"top_k": 1.5}, "top_k", "valid integer"),
    ({"stop": ["a"] * 17}, None, "at most 16 items"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "the same limit"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
    ({"max_reasoning_tokens": 5}, None, "no model that marks its reasoning"),
    ({"response_format": {"type": "xml"}}, "response_format", "'text', 'json_object', 'json_schema'"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
        None,
        "json schema",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name", "required"),
    ({"structured_outputs": {"regex": "("}}, None, "regex"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None, "only one form"),
    ({"store": True}, "store", "cannot be switched on"),
    ({"store": 0}, "store", "cannot be switched on"),
    ({"seed": -2}, "seed", "greater than or equal to -1"),
]


def test_a_limit_beyond_the_servers_is_the_servers(url) -> None:
    """As elsewhere; the finish reason says that there was more to write."""
    for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
        document = http.post(f"{url}/v1/{path}", json=body | {"max_tokens": 2**53, "ignore_eos": True}).json()
        assert document["usage"]["completion_tokens"] == 100
        assert document["choices"][0]["finish_reason"] == "length"


def test_values_that_other_servers_take(url) -> None:
    fields = {"max_tokens": 3.0, "seed": 7.0, "top_k": 40.0, "temperature": 1, "ignore_eos": True}
    neutral = {
        "mirostat": 0,
        "tfs_z": 1.0,
        "top_a": 0,
        "min_tokens": 0,
        "skip_special_tokens": True,
        "cache_prompt": 1 > 0,
    }
    first = http.post(f"{url}/v1/chat/completions", json=CHAT | fields | neutral).json()
    again = http.post(
        f"{url}/v1/chat/completions", json=CHAT | {k: int(v) for k, v in fields.items()} | {"ignore_eos": True}
    )
    assert first["usage"]["completion_tokens"] == 3
    assert again.json()["choices"] == first["choices"]


def test_top_p_0_is_the_likeliest_token(url) -> None:
    fields = {"max_tokens": 20, "ignore_eos": True}
    greedy = http.post(f"{url}/v1/completions", json=TEXT | fields | {"temperature": 0}).json()
    narrow = http.post(f"{url}/v1/completions", json=TEXT | fields | {"temperature": 1.5, "top_p": 0}).json()
    assert narrow["choices"][0]["text"] == greedy["choices"][0]["text"]


def test_repeat_penalty_is_the_repetition_penalty(url) -> None:
    def complete(**fields):
        asked = TEXT | {"max_tokens": 20, "ignore_eos": True, "temperature": 0} | fields
        return http.post(f"{url}/v1/completions", json=asked).json()["choices"][0]["text"]

    assert complete(repeat_penalty=0.1) == complete(repetition_penalty=0.1) != complete()


@pytest.mark.parametrize(("fields", "param", "words"), CHAT_REFUSALS)
def test_a_wrong_field_is_named(url, fields, param, words) -> None:
    answer = http.post(f"{url}/v1/chat/completions", json=CHAT | fields)
    error = error_of(answer)
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": []}, "at least 1 item"),
        ({"prompt": [-1]}, "greater than or equal to 0"),
        ({"prompt": [10**6]}, "outside the vocabulary"),
        ({"prompt": ["a"] * 3, "n": 2}, "6 answers are more"),
        ({"suffix": "x"}, "before a suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 6}, "less than or equal to 5"),
    ],
)
def test_a_wrong_field_of_a_text_completion_is_named(url, fields, words) -> None:
    answer = http.post(f"{url}/v1/completions", json=TEXT | fields)
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


def test_what_clients_always_send_is_let_through(url) -> None:
    harmless = {
        "seed": -1, "top_k": -1, "stop": "", "keep_alive": "5m", "reasoning_effort": "medium", "verbosity": "medium",
        "chat_template_kwargs": {"enable_thinking": True},
        "user": "x", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "tools": [], "tool_choice": "none", "functions": None, "logit_bias": {}, "presence_penalty": 0,
        "frequency_penalty": 0.0, "modalities": ["text"], "n": 1, "max_tokens": 2,
        "response_format": {"type": "text"}, "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    assert http.post(f"{url}/v1/chat/completions", json=CHAT | harmless).status_code == 200


def test_switches_of_other_servers_that_are_off_are_let_through(url) -> None:
    off = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "id_slot": -1, "max_tokens": 2}
    assert http.post(f"{url}/v1/completions", json=TEXT | off).status_code == 200
    off |= {"functions": [], "function_call": "none"}
    assert http.post(f"{url}/v1/chat/completions", json=CHAT | off).status_code == 200


def test_what_packages_keep_with_a_message_is_let_through(url) -> None:
    """openai's `parse` and LiteLLM with an answer; LangChain with a piece of text, and where a tool gave nothing."""
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}
    called = {"content": [], "tool_calls": [{"id": "x", "type": "function", "function": function}], "parsed": {"a": 1}}
    piece = {"type": "text", "text": "Hei", "id": "lc_1", "index": 0, "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [piece]},
        {"role": "assistant", **called, "provider_specific_fields": {"refusal": None}},
        {"role": "tool", "tool_call_id": "x", "content": []},
    ]
    answer = http.post(f"{url}/v1/chat/completions", json=CHAT | {"messages": messages, "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    (call,) = Message.model_validate(messages[1]).for_template()["tool_calls"]
    assert call == {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_every_field_that_may_be_null_is_as_if_left_out(url, route) -> None:
    """Clients that write all of their fields do so; a constraint that met a null once was an error of ours."""
    name = "ChatCompletionRequest" if "chat" in route else "CompletionRequest"
    schema = http.get(f"{url}/openapi.json").json()["components"]["schemas"][name]
    optional = {field: None for field in schema["properties"] if field not in schema["required"]}
    answer = http.post(url + route, json=optional | (CHAT if "chat" in route else TEXT) | {"max_tokens": 1})
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 1)


def test_a_compressed_body_is_told_so(url) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post(f"{url}/v1/completions", content=gzip.compress(b"{}"), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "compressed")


@pytest.mark.parametrize("length", [CONTEXT, 25_000])
def test_what_does_not_fit_the_context_is_told_so(url, length) -> None:
    messages = [{"role": "user", "content": "å" * length}]
    chat = http.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": messages[:1]})
    text = http.post(f"{url}/v1/completions", json={"model": "m", "prompt": "å" * length})
    assert (chat.status_code, text.status_code) == (400, 400)
    assert error_of(chat)["code"] == error_of(text)["code"] == "context_length_exceeded"
    assert (error_of(chat)["param"], error_of(text)["param"]) == ("messages", "prompt")


def test_an_unknown_model_is_404_and_names_those_there_are(url) -> None:
    answer = http.post(f"{url}/v1/chat/completions", json=CHAT | {"model": "gpt-4"})
    assert answer.status_code == 404
    assert error_of(answer) | {"message": ""} == {
        "message": "", "type": "invalid_request_error", "param": "model", "code": "model_not_found",
    }  # fmt: skip
    assert http.get(f"{url}/v1/models/gpt-4").status_code == 404


def test_models_are_listed(url) -> None:
    document = http.get(f"{url}/v1/models").json()
    assert [card["id"] for card in document["data"]] == ["m"]
    assert document["data"][0] == http.get(f"{url}/v1/models/m").json()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
        ("GET", "/docs", 404),
    ],
)
def test_other_routes_and_methods(url, method, path, status) -> None:
    answer = http.request(method, url + path)
    assert answer.status_code == status
    error_of(answer)


def test_another_host_name_is_refused_without_keys(tmp_path) -> None:
    app = create_app(
        [open_served(make_served(tmp_path / "m"), LIMITS)], LIMITS, hosts={"127.0.0.1"}, worker_module="served_models"
    )
    with background_server(app, wait_s=0) as url:
        assert http.get(f"{url}/health").status_code == 200
        answer = http.get(f"{url}/health", headers={"host": "evil.example:80"})
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "host_not_allowed"


def test_keys_are_asked_for_but_not_for_health(tmp_path) -> None:
    keys = Keys({"a-key-that-is-long": "ola", "another-long-key-here": "kari"})
    with serving(make_served(tmp_path / "m"), LIMITS, keys) as url:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a-key-that-is-long"}):
            answer = http.post(f"{url}/v1/completions", json=TEXT, headers=headers)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert http.get(f"{url}/metrics").status_code == 401
        assert http.get(f"{url}/health").status_code == 200
        right = {"authorization": "Bearer another-long-key-here"}
        assert http.post(f"{url}/v1/completions", json=TEXT | {"max_tokens": 1}, headers=right).status_code == 200
        described = http.get(f"{url}/openapi.json").json()
        assert described["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]


def test_rejections_are_counted_by_reason(url) -> None:
    http.post(f"{url}/v1/completions", json=TEXT | {"foo": 1})
    text = http.get(f"{url}/metrics").text
    assert 'normistral_rejected_requests_total{reason="unknown_field"}' in text
    assert 'normistral_requests_total{route="/v1/completions",status="400"}' in text


def test_the_description_names_models_and_limits(url) -> None:
    document = http.get(f"{url}/openapi.json").json()
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert properties["model"]["enum"] == ["m"]
    assert {"type": "integer", "minimum": 1, "maximum": 4} in properties["n"]["anyOf"]
    assert "422" not in document["paths"]["/v1/completions"]["post"]["responses"]
