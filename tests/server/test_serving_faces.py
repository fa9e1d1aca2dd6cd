"""Other APIs over the same core: /v1/responses, /v1/messages and Ollama's routes, whole and in streams."""

import json

import httpx
import pytest
from served_models import make_served, open_served, serving

from normistral.errors import UsageError
from normistral.server import anthropic, ollama, responses_api
from normistral.server.app import create_app
from normistral.server.auth import Keys
from normistral.server.generation import OPENAI_CHAT
from normistral.server.limits import ServerLimits
from normistral.server.server import background_server

http = httpx.Client()
ANSWER = "Den heter Oslo."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Servers that answer with text and with a call."""
    folder = tmp_path_factory.mktemp("faces")
    with (
        serving(make_served(folder / "text" / "m", answers=[ANSWER, "To."], context_length=3000)) as text,
        serving(make_served(folder / "call" / "m", answers=[CALL, ANSWER], context_length=3000)) as call,
    ):
        yield text, call


def post(url: str, path: str, **fields) -> httpx.Response:
    return http.post(url + path, json={"model": "m", **fields}, timeout=30)


def events(answer: httpx.Response) -> list[dict]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in filter(None, answer.text.split("\n\n")):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def lines(answer: httpx.Response) -> list[dict]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


# --- /v1/responses

FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA}
CALLED = {"type": "function_call", "call_id": "x", "name": "weather", "arguments": "{}"}


def test_a_response_is_the_chat_s_answer(urls) -> None:
    chat = post(urls[0], "/v1/chat/completions", messages=[
        {"role": "system", "content": "Kort."}, {"role": "user", "content": "Hei"}]).json()  # fmt: skip
    document = post(urls[0], "/v1/responses", input="Hei", instructions="Kort.", metadata={"a": "b"}).json()
    (item,) = document["output"]
    assert item["content"] == [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]
    assert (document["object"], document["status"], document["store"]) == ("response", "completed", False)
    assert document["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert document["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    assert document["usage"]["input_tokens_details"]["cache_write_tokens"] == 0
    assert document["metadata"] == {"a": "b"}


def test_events_of_a_response(urls) -> None:
    found = events(post(urls[0], "/v1/responses", input="Hei", stream=True))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta") == ANSWER
    whole = post(urls[0], "/v1/responses", input="Hei").json()
    last = found[-1]["response"]
    assert [item["content"] for item in last["output"]] == [item["content"] for item in whole["output"]]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_an_error_in_a_response_is_its_last_event(urls, monkeypatch) -> None:
    def fail(writer, part):
        raise UsageError("it is full")

    monkeypatch.setattr(responses_api._Writer, "_part", fail)
    *_, before, last = events(post(urls[0], "/v1/responses", input="Hei", stream=True))
    number = before["sequence_number"] + 1
    error = {"code": "invalid_request_error", "message": "it is full", "param": None}
    assert last == {"type": "error", "sequence_number": number, **error}


def test_a_response_calls_and_goes_on(urls) -> None:
    document = post(urls[1], "/v1/responses", input="Vær?", tools=[FUNCTION]).json()
    (call,) = document["output"]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", '{"city": "Oslo"}')
    found = events(post(urls[1], "/v1/responses", input="Vær?", tools=[FUNCTION], stream=True))
    deltas = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"]
    assert found[-1]["response"]["output"][0]["arguments"] == call["arguments"]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Vær?"}]},
        {"type": "reasoning", "id": "x", "summary": []},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "regn"},
    ]
    again = post(urls[1], "/v1/responses", input=items, tools=[FUNCTION]).json()
    assert again["output"][0]["content"][0]["text"] == ANSWER


def test_a_cut_response_is_incomplete(urls) -> None:
    document = post(urls[0], "/v1/responses", input="Hei", max_output_tokens=3).json()
    assert (document["status"], document["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert document["output"][0]["status"] == "incomplete"


def test_a_response_of_a_schema(tmp_path) -> None:
    with serving(make_served(tmp_path / "m", answers=['{"city": "Oslo"}'])) as url:
        form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
        document = post(url, "/v1/responses", input="Hei", text=form).json()
        assert document["output"][0]["content"][0]["text"] == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"store": True}, "start it with --store"),
        ({"previous_response_id": "resp_x"}, "start it with --store"),
        ({"tools": [{"type": "web_search"}]}, "'function'"),
        ({"include": ["web_search_call.results"]}, "'reasoning.encrypted_content'"),
        ({"background": True}, "in the background"),
        ({"truncation": "all"}, "'auto' or 'disabled'"),
        ({"reasoning": {"summary": "detailed"}}, "not summarised"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "reads text only"),
        ({"input": [{"type": []}]}, "items are of type"),
        ({"input": [CALLED | {"arguments": {}}]}, "input.0.arguments: Input should be a valid string"),
        ({"tool_choice": {"type": "web_search"}}, "an object of type function or allowed_tools"),
        ({"reasoning": {"context": "all_turns"}}, "'auto' or 'current_turn'"),
        ({"input": [CALLED | {"call_id": ""}]}, "input.0.call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "store: false"),
        ({"max_output_tokens": 0.5}, "valid integer"),
        ({"colour": 1}, "unknown field colour"),
    ],
)
def test_what_a_response_cannot_be_is_named(urls, fields, words) -> None:
    answer = post(urls[0], "/v1/responses", **{"input": "Hei", **fields})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_kept_answers_are_a_key_s_own(tmp_path) -> None:
    keys = Keys({"a-key-that-is-long": "ola", "another-long-key-here": "kari"})
    ola, kari = ({"authorization": f"Bearer {key}"} for key in ("a-key-that-is-long", "another-long-key-here"))

    limits = ServerLimits(grace_s=0.2)
    handler = open_served(make_served(tmp_path / "m", answers=[ANSWER, "To."]), limits)
    app = create_app([handler], limits, keys, worker_module="served_models", store=True)
    with background_server(app) as url:

        def ask(headers: dict, **fields) -> httpx.Response:
            return http.post(f"{url}/v1/responses", json={"model": "m", "input": "Hei", **fields}, headers=headers)

        first = ask(ola, store=True).json()
        second = ask(ola, previous_response_id=first["id"])
        assert second.json()["output"][0]["content"][0]["text"] == "To."
        assert ask(kari, previous_response_id=first["id"]).status_code == 404
        assert ask(ola, previous_response_id=second.json()["id"]).status_code == 404  # it was not to be kept
        for _ in range(256):
            app.state.response_store.add("ola", f"resp_{_}", [])
        assert ask(ola, previous_response_id=first["id"]).status_code == 404
        assert http.post(f"{url}/api/chat", json={"model": "m"}).status_code == 401
        assert http.post(f"{url}/api/chat", json={"model": "m"}, headers=ola).status_code == 200
        anthropic = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "Hei"}]}
        assert http.post(f"{url}/v1/messages", json=anthropic).json()["error"]["type"] == "authentication_error"
        answer = http.post(f"{url}/v1/messages", json=anthropic, headers={"x-api-key": "a-key-that-is-long"})
        assert answer.status_code == 200


# --- /v1/messages

MESSAGES = [{"role": "user", "content": "Hei"}]
ANTHROPIC_TOOL = {"name": "weather", "input_schema": SCHEMA}
RESULT = {"type": "tool_result", "tool_use_id": "x"}


def user(block: dict) -> list[dict]:
    return [{"role": "user", "content": [block]}]


def test_messages_answer_text(urls) -> None:
    document = post(urls[0], "/v1/messages", messages=MESSAGES, max_tokens=100, system="Kort.").json()
    assert document["content"] == [{"type": "text", "text": ANSWER}]
    assert (document["type"], document["role"], document["stop_reason"]) == ("message", "assistant", "end_turn")
    found = events(post(urls[0], "/v1/messages", messages=MESSAGES, max_tokens=100, system="Kort.", stream=True))
    assert [event["type"] for event in found[:2]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in found[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert (
        "".join(event["delta"].get("text", "") for event in found if event["type"] == "content_block_delta") == ANSWER
    )
    assert found[-2]["delta"]["stop_reason"] == "end_turn"
    usage = found[-2]["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == found[0]["message"]["usage"]["input_tokens"]


def test_messages_call_tools(urls) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 200, "tools": [ANTHROPIC_TOOL]}
    document = post(urls[1], "/v1/messages", **fields, tool_choice={"type": "any"}).json()
    (call,) = document["content"]
    assert (call["type"], call["name"], call["input"], document["stop_reason"]) == (
        "tool_use", "weather", {"city": "Oslo"}, "tool_use",
    )  # fmt: skip
    found = events(post(urls[1], "/v1/messages", **fields, stream=True))
    pieces = [event["delta"]["partial_json"] for event in found if event["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Oslo"}
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "regn"}]}
    turns = [*MESSAGES, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert post(urls[1], "/v1/messages", **fields | {"messages": turns}).json()["content"][0]["text"] == ANSWER


def test_messages_end_at_a_stop_text_and_a_limit(urls) -> None:
    stopped = post(urls[0], "/v1/messages", messages=MESSAGES, max_tokens=100, stop_sequences=["Bergen", "Oslo"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "Oslo")
    assert post(urls[0], "/v1/messages", messages=MESSAGES, max_tokens=2).json()["stop_reason"] == "max_tokens"


def test_messages_of_a_schema_and_their_count(urls, tmp_path) -> None:
    with serving(make_served(tmp_path / "m", answers=['{"city": "Oslo"}'], context_length=3000)) as url:
        form = {"type": "json_schema", "schema": SCHEMA}
        for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
            document = post(url, "/v1/messages", messages=MESSAGES, max_tokens=50, **fields).json()
            assert document["content"][0]["text"] == '{"city": "Oslo"}'
    asked = {"messages": [{"role": "system", "content": "Kort."}, *MESSAGES], "tools": [ANTHROPIC_TOOL]}
    counted = post(urls[0], "/v1/messages/count_tokens", **asked).json()
    usage = post(urls[0], "/v1/messages", **asked, max_tokens=5).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_an_answer_may_come_back_with_fields_that_are_null(urls) -> None:
    """As pydantic's `model_dump` of a package's own classes has them."""
    call = post(urls[1], "/v1/responses", input="Vær?", tools=[FUNCTION]).json()["output"][0]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "regn", "caller": None}
    items = [{"role": "user", "content": "Vær?"}, call | {"async_": None, "caller": None}, result]
    for output in ("regn", []):
        items[-1] = result | {"output": output}
        assert post(urls[1], "/v1/responses", input=items, tools=[FUNCTION]).status_code == 200
    answer = post(urls[1], "/v1/responses", input=[*items, {"role": "user", "content": "x", "colour": "y"}])
    assert "unknown field" in answer.json()["error"]["message"]
    chat = [*MESSAGES, {"role": "assistant", "content": "Ja", "reasoning_details": None}, *MESSAGES]
    assert post(urls[0], "/v1/chat/completions", messages=chat).status_code == 200


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/completions/", "/v1/completions"),
        ("/v1/api/chat", "/api/chat"),
        ("/v1/embeddings", None),
    ],
)
def test_a_base_url_that_is_off_is_told(urls, path, meant) -> None:
    answer = post(urls[0], path, messages=MESSAGES)
    assert answer.status_code == 404
    assert (f"it is {meant}: " if meant else "see /openapi.json") in answer.text


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"colour": 1}, 400, "invalid_request_error", "unknown field colour"),
        ({"model": "gpt-4"}, 404, "not_found_error", "no model"),
        ({"tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "has a name"),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "budget_tokens"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": user({"type": "image", "source": {}})}, 400, "invalid_request_error", "reads text only"),
        (
            {"messages": user(RESULT | {"content": [{"type": "image"}]})},
            400,
            "invalid_request_error",
            "reads text only",
        ),
        ({"messages": user(RESULT | {"a": 1})}, 400, "invalid_request_error", "field messages.0.content.0.a "),
    ],
)
def test_errors_of_messages_are_anthropic_s(urls, fields, status, kind, words) -> None:
    answer = post(urls[0], "/v1/messages", **{"messages": MESSAGES, "max_tokens": 9, **fields})
    document = answer.json()
    assert (answer.status_code, document["type"], document["error"]["type"]) == (status, "error", kind)
    assert words in document["error"]["message"]


# --- Ollama


def test_ollama_chats_in_lines(urls) -> None:
    options = {"num_ctx": 8192, "num_gpu": 99, "num_predict": 100, "seed": 3, "stop": ["x"], "repeat_penalty": 1.0}
    fields = {"messages": MESSAGES, "options": options, "keep_alive": -1, "think": False, "format": ""}
    found = lines(post(urls[0], "/api/chat", **fields))
    assert "".join(line["message"]["content"] for line in found) == ANSWER
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    whole = post(urls[0], "/api/chat", **fields, stream=False).json()
    assert (whole["message"]["content"], whole["done"], whole["done_reason"]) == (ANSWER, True, "stop")
    assert whole["eval_count"] == found[-1]["eval_count"]
    assert post(urls[0], "/api/chat", **fields | {"model": "m:latest"}, stream=False).json()["model"] == "m"


@pytest.mark.parametrize("framing", [ollama.FRAMING, anthropic.FRAMING, OPENAI_CHAT])
def test_no_character_of_an_answer_ends_a_line_of_a_stream(framing) -> None:
    event = {"type": "x", "text": "".join(map(chr, range(0x3000)))}
    lines = framing.encode(event).decode().splitlines()
    assert json.loads(next(line for line in lines if "{" in line).removeprefix("data: ")) == event


def test_ollama_generates(urls) -> None:
    found = lines(post(urls[0], "/api/generate", prompt="Hei", system="Kort."))
    assert "".join(line["response"] for line in found) == ANSWER
    cut = post(urls[0], "/api/generate", prompt="Hei", options={"num_predict": 3}, stream=False).json()
    assert (cut["done_reason"], cut["eval_count"]) == ("length", 3)
    assert post(urls[0], "/api/generate", keep_alive=0).json()["done_reason"] == "load"


def test_ollama_calls_tools(urls) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    found = lines(post(urls[1], "/api/chat", messages=MESSAGES, tools=[tool]))
    calls = [call for line in found for call in line["message"].get("tool_calls", ())]
    assert [call["function"] for call in calls] == [{"name": "weather", "arguments": {"city": "Oslo"}}]
    whole = post(urls[1], "/api/chat", messages=MESSAGES, tools=[tool], stream=False).json()
    assert whole["message"]["tool_calls"][0]["function"] == calls[0]["function"]
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "regn"},
    ]
    assert post(urls[1], "/api/chat", messages=turns, stream=False).json()["message"]["content"] == ANSWER


def test_ollama_lists_and_shows(urls) -> None:
    (listed,) = http.get(f"{urls[0]}/api/tags").json()["models"]
    assert listed["name"] == "m:latest"
    assert http.get(f"{urls[0]}/api/ps").json()["models"][0]["name"] == "m:latest"
    shown = post(urls[0], "/api/show").json()
    assert "tools" in shown["capabilities"]
    assert 3000 in shown["model_info"].values()
    assert http.get(f"{urls[0]}/api/version").json()["version"].count(".") == 2


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "llama3"}, 404, "no model"),
        ({"options": {"mirostat": 2}}, 400, "no mirostat"),
        ({"options": {"colour": 1}}, 400, "unknown field options.colour"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGVp"]}]}, 400, "text only"),
        ({"format": "xml"}, 400, "JSON schema"),
        ({"options": {"num_predict": 0}}, 400, "options.num_predict"),
        ({"options": {"top_p": 2.0}}, 400, "options.top_p"),
        ({"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}}, 400, "options.repeat_last_n: penalties look at"),
        ({"shift": True}, 400, "ends where the context does"),
        ({"logprobs": True}, 400, "/v1/chat/completions"),
    ],
)
def test_errors_of_ollama_are_texts(urls, fields, status, words) -> None:
    answer = post(urls[0], "/api/chat", **{"messages": MESSAGES, **fields})
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_ollama_takes_what_its_own_clients_write(urls) -> None:
    """Go's client writes every field, empty ones too; Home Assistant writes whole numbers with a point."""
    empty = {"system": "", "template": "", "options": None, "name": ""}
    assert post(urls[0], "/api/show", **empty).status_code == 200
    fields = empty | {"prompt": "Hei", "suffix": "", "context": None, "raw": False, "format": None, "images": None}
    del fields["name"]
    assert post(urls[0], "/api/generate", **fields, stream=False).json()["response"] == ANSWER
    options = {"num_ctx": 8192.0, "num_predict": 3.0, "top_k": 40.0, "repeat_last_n": 64, "penalize_newline": True}
    whole = post(urls[0], "/api/chat", messages=MESSAGES, options=options, stream=False).json()
    assert whole["eval_count"] == 3


def test_ollama_takes_what_the_vercel_sdk_writes_beside_the_options(urls) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    fields = {"messages": MESSAGES, "temperature": 0, "top_p": 1, "max_output_tokens": 3.0, "stream": False}
    assert post(urls[0], "/api/chat", **fields).json()["eval_count"] == 3
    assert post(urls[0], "/api/chat", **fields, options={"num_predict": 2}).json()["eval_count"] == 2
    asked = {"messages": MESSAGES, "tools": [tool], "stream": False}
    called = post(
        urls[1], "/api/chat", **asked, tool_choice={"type": "function", "function": {"name": "weather"}}
    ).json()
    assert called["message"]["tool_calls"]
    assert "tool_calls" not in post(urls[1], "/api/chat", **asked, tool_choice="none").json()["message"]


def test_the_description_has_all_routes(urls) -> None:
    paths = http.get(f"{urls[0]}/openapi.json").json()["paths"]
    assert {"/v1/responses", "/v1/messages", "/api/chat", "/api/generate", "/api/tags", "/api/show"} <= set(paths)


# --- Pages of other origins


@pytest.mark.parametrize("keyed", [False, True])
def test_pages_of_allowed_origins_may_ask(tmp_path, keyed) -> None:

    limits = ServerLimits(grace_s=0.2)
    keys = Keys({"a-key-that-is-long": "ola"} if keyed else {})
    handler = open_served(make_served(tmp_path / "m", answers=[ANSWER]), limits)
    app = create_app([handler], limits, keys, worker_module="served_models", origins={"https://example.org"})
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with background_server(app) as url:
        path = f"{url}/v1/chat/completions"
        preflight = http.options(path, headers={"origin": "https://example.org", **asked})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "https://example.org")
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        other = http.options(path, headers={"origin": "https://evil.example", **asked})
        assert other.status_code in (401, 405)
        assert "access-control-allow-origin" not in other.headers
        body = {"model": "m", "messages": MESSAGES}
        headers = {"origin": "https://example.org", "authorization": "Bearer a-key-that-is-long"}
        answer = http.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://example.org")
        refused = http.post(path, json={}, headers={"origin": "https://example.org"})
        assert refused.status_code == (401 if keyed else 400)
        assert refused.headers["access-control-allow-origin"] == "https://example.org"
        plain = http.post(path, json=body, headers=headers | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in plain.headers
        assert http.get(f"{url}/health", headers={"origin": "https://example.org"}).headers["vary"] == "Origin"


def test_no_page_may_ask_by_default(urls) -> None:
    answer = http.post(f"{urls[0]}/v1/responses", json={"model": "m", "input": "x"}, headers={"origin": "https://a.no"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
