"""Clients whose requests need an answer of certain words, against the real server with a scripted model.

A part of clients.py: OpenAI's responses and tools, an agent, Ollama's and Anthropic's packages, a litellm proxy, and
what Open WebUI and Home Assistant send, in our words.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
os.environ["PYTHONPATH"] = sys.path[0]  # of the worker process

from served_models import make_served, serving
from tool_schemas import count_valid_calls

from normistral.server.auth import Keys

Check = Callable[[str, str, bool, object], None]
TEXT = "Det er 7 grader, og klokka er 12."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}
USER: list[Any] = [{"role": "user", "content": "Hvordan er været, og hva er klokka?"}]


def call(name: str, **arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def try_scripted(folder: Path, check: Check, key: str, litellm: str | None) -> None:
    """Everything here; `litellm` is the program, and None leaves it out."""
    answers = [call("weather", city="Oslo"), call("clock", zone="CET"), TEXT]
    keys = Keys({key: "clients"})
    with (
        serving(make_served(folder / "called" / "m", answers=answers, context_length=8000), keys=keys) as called,
        serving(make_served(folder / "text" / "m", answers=[TEXT], context_length=8000), keys=keys) as text,
        serving(make_served(folder / "random" / "m", context_length=4000), keys=keys) as random,
    ):
        valid = count_valid_calls(random, key, 200)
        check("httpx", "200 required calls", valid == 200, f"{valid} of 200 valid")
        try_tools(called, check, key)
        try_responses(called, text, check, key)
        try_agent(called, check, key)
        try_ollama(called, text, check, key)
        try_anthropic(called, text, check, key)
        replay_open_webui(text, check, key)
        replay_home_assistant(called, check, key)
        if litellm is not None:
            try_litellm(litellm, folder, called, text, check, key)


def try_tools(url: str, check: Check, key: str, client_name: str = "openai", model: str = "m") -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    whole = client.chat.completions.create(model=model, messages=USER, tools=[TOOL]).choices[0]
    calls: list[Any] = whole.message.tool_calls or []
    right = [made.function.name for made in calls] == ["weather"] and whole.finish_reason == "tool_calls"
    check(client_name, "tools", right, calls)
    pieces: dict[int, list[str]] = {}
    for event in client.chat.completions.create(model=model, messages=USER, tools=[TOOL], stream=True):
        for delta in event.choices[0].delta.tool_calls or [] if event.choices else []:
            piece = delta.function.arguments if delta.function else None
            pieces.setdefault(delta.index, []).append(piece or "")
    said = ["".join(piece) for piece in pieces.values()]
    check(client_name, "a stream calls the same", said == [made.function.arguments for made in calls], said)


def try_responses(called: str, text: str, check: Check, key: str) -> None:
    client = openai.OpenAI(base_url=f"{text}/v1", api_key=key, max_retries=0)
    answer = client.responses.create(model="m", input="Hei", instructions="Kort.")
    check("openai", "responses", answer.output_text == TEXT and answer.status == "completed", answer.output_text)
    with client.responses.stream(model="m", input="Hei") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    right = final.output_text == TEXT and kinds[-1] == "response.completed"
    check("openai", "responses, streamed", right, len(kinds))
    client = openai.OpenAI(base_url=f"{called}/v1", api_key=key, max_retries=0)
    function: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
    items: list[Any] = [{"role": "user", "content": "Vær?"}]
    first = client.responses.create(model="m", input=items, tools=[function])
    made = first.output[0]
    check("openai", "responses, tools", made.type == "function_call", made)
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"type": "function_call_output", "call_id": getattr(made, "call_id", ""), "output": "7 grader"})
    second = client.responses.create(model="m", input=items, tools=[function], tool_choice="none")
    check("openai", "responses, result", second.output_text == call("clock", zone="CET"), second.output_text)


@tool
def weather(city: str) -> str:
    """Weather of a city."""
    return f"7 grader i {city}"


@tool
def clock(zone: str) -> str:
    """Time of a zone."""
    return f"12 {zone}"


def try_agent(url: str, check: Check, key: str) -> None:
    for streaming in (False, True):
        model = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model="m", max_retries=0, streaming=streaming)
        agent = create_agent(model, [weather, clock], system_prompt="Kort.")
        turns = agent.invoke({"messages": USER})["messages"]
        results = [turn.content for turn in turns if turn.type == "tool"]
        right = results == ["7 grader i Oslo", "12 CET"] and turns[-1].content == TEXT
        check("langchain", f"agent, streaming={streaming}", right, results)


def try_ollama(called: str, text: str, check: Check, key: str) -> None:
    client = ollama.Client(text, headers={"Authorization": f"Bearer {key}"})
    check("ollama", "list", [model.model for model in client.list().models] == ["m:latest"], client.list())
    check("ollama", "show", "tools" in (client.show("m").capabilities or []), client.show("m").capabilities)
    check("ollama", "ps", len(client.ps().models) == 1, client.ps())
    options = {"temperature": 0.7, "num_ctx": 8192, "num_predict": -1, "repeat_penalty": 1.0}
    whole = client.chat("m", USER, options=options, keep_alive="10m", think=False)
    check("ollama", "chat", whole.message.content == TEXT and whole.done_reason == "stop", whole.message)
    pieces = [part.message.content or "" for part in client.chat("m", USER, stream=True)]
    check("ollama", "chat, streamed", "".join(pieces) == TEXT and len(pieces) > 3, len(pieces))
    check("ollama", "generate", client.generate("m", "Hei").response == TEXT, "")
    asked = ollama.Client(called, headers={"Authorization": f"Bearer {key}"})

    def weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name.
        """
        return city

    made = asked.chat("m", USER, tools=[weather]).message
    calls = made.tool_calls or []
    named = [(one.function.name, dict(one.function.arguments)) for one in calls]
    check("ollama", "tools", named == [("weather", {"city": "Oslo"})], named)
    turns = [*USER, made, {"role": "tool", "tool_name": "weather", "content": "7 grader"}]
    again = asked.chat("m", turns).message.content
    check("ollama", "result", again == call("clock", zone="CET"), again)
    try:
        client.chat("llama3", USER)
    except ollama.ResponseError as error:
        check("ollama", "an unknown model", error.status_code == 404 and "no model" in error.error, error.error)


def try_anthropic(called: str, text: str, check: Check, key: str) -> None:
    client = anthropic.Anthropic(base_url=text, api_key=key, max_retries=0)
    whole = client.messages.create(model="m", max_tokens=200, messages=USER, system="Kort.")
    check("anthropic", "messages", whole.content[0].type == "text" and whole.content[0].text == TEXT, whole.content)
    with client.messages.stream(model="m", max_tokens=200, messages=USER) as stream:
        said = "".join(stream.text_stream)
    check("anthropic", "messages, streamed", said == TEXT, said)
    client = anthropic.Anthropic(base_url=called, api_key=key, max_retries=0)
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    with client.messages.stream(model="m", max_tokens=200, messages=USER, tools=tools) as stream:
        final = stream.get_final_message()
    made = final.content[0]
    check("anthropic", "tools, streamed", made.type == "tool_use" and made.input == {"city": "Oslo"}, final.content)


def replay_open_webui(url: str, check: Check, key: str) -> None:
    """A chat with all sliders moved, one through Ollama's routes, and the title that it asks for afterwards."""
    headers = {"Authorization": f"Bearer {key}"}
    messages = [{"role": "system", "content": "Kort."}, *USER]
    sliders = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "frequency_penalty": 0.2, "presence_penalty": 0.1,
        "seed": 42, "stop": ["</s>"], "max_tokens": 300, "logit_bias": {"5": -20}, "reasoning_effort": "medium",
    }  # fmt: skip
    chat = {"model": "m", "messages": messages, "stream": True, "stream_options": {"include_usage": True}, **sliders}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat, headers=headers, timeout=60)
    check("open-webui", "chat", answer.status_code == 200 and '"usage":{' in answer.text, answer.text[-90:])
    title = {"model": "m", "messages": USER, "stream": False, "max_completion_tokens": 1000}
    answer = httpx.post(f"{url}/v1/chat/completions", json=title, headers=headers, timeout=60)
    check("open-webui", "title", answer.status_code == 200, answer.text[:90])
    options = {
        "temperature": 0.8,
        "num_ctx": 4096,
        "num_gpu": 1,
        "repeat_penalty": 1.1,
        "mirostat": 0,
        "use_mmap": True,
    }
    through = {"model": "m:latest", "messages": messages, "stream": True, "options": options, "keep_alive": "5m"}
    answer = httpx.post(f"{url}/api/chat", json=through, headers=headers, timeout=60)
    check("open-webui", "chat, Ollama", answer.status_code == 200 and '"done":true' in answer.text, answer.text[:90])


def replay_home_assistant(url: str, check: Check, key: str) -> None:
    """Its conversation agents for Ollama and for OpenAI, with a tool of the house."""
    headers = {"Authorization": f"Bearer {key}"}
    house = {
        "name": "weather",
        "description": "Turns on a device or entity",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "domain": {"type": "array", "items": {"type": "string"}},
            },
            "required": [],
        },
    }
    system = {"role": "system", "content": "You are a voice assistant for Home Assistant."}
    chat = {
        "model": "m", "messages": [system, *USER], "tools": [{"type": "function", "function": house}], "stream": True,
        "options": {"num_ctx": 8192}, "keep_alive": -1, "think": False,
    }  # fmt: skip
    lines = httpx.post(f"{url}/api/chat", json=chat, headers=headers, timeout=60).text.splitlines()
    calls = [made for line in lines for made in json.loads(line).get("message", {}).get("tool_calls", ())]
    check("home-assist", "Ollama", [made["function"]["name"] for made in calls] == ["weather"], lines[-1])
    responses = {
        "model": "m", "input": [system, *USER], "tools": [{"type": "function", "strict": False, **house}],
        "max_output_tokens": 3000, "temperature": 1.0, "top_p": 1.0, "user": "01J", "store": False, "stream": True,
    }  # fmt: skip
    answer = httpx.post(f"{url}/v1/responses", json=responses, headers=headers, timeout=60)
    right = answer.status_code == 200 and "response.function_call_arguments.done" in answer.text
    check("home-assist", "responses", right, answer.text[-90:])


@contextmanager
def litellm_proxy(program: str, folder: Path, models: dict[str, str], key: str) -> Iterator[str]:
    """A proxy in front of servers, by the names of its models."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    entries = [
        {"model_name": name, "litellm_params": {"model": "openai/m", "api_base": f"{url}/v1", "api_key": key}}
        for name, url in models.items()
    ]
    config = folder / "litellm.json"  # JSON is YAML
    config.write_text(json.dumps({"model_list": entries, "general_settings": {"master_key": "sk-proxy"}}))
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "PYTHONPATH": ""}
    with (folder / "litellm.log").open("w") as log:
        process = subprocess.Popen(
            [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 180
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health/liveliness").status_code == 200:
                        break
                except httpx.HTTPError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def try_litellm(program: str, folder: Path, called: str, text: str, check: Check, key: str) -> None:
    with litellm_proxy(program, folder, {"called": called, "text": text}, key) as proxy:
        client = openai.OpenAI(base_url=f"{proxy}/v1", api_key="sk-proxy", max_retries=0, timeout=120)
        whole = client.chat.completions.create(
            model="text", messages=USER, max_tokens=200, reasoning_effort="low", seed=-1, user="u", presence_penalty=0.1
        )
        check("litellm", "chat", whole.choices[0].message.content == TEXT, whole.choices[0].message.content)
        events = client.chat.completions.create(model="text", messages=USER, stream=True)
        said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        check("litellm", "chat, streamed", said == TEXT, said)
        try_tools(proxy, check, "sk-proxy", "litellm", "called")
        answer = client.responses.create(model="text", input="Hei")
        check("litellm", "responses", answer.output_text == TEXT, answer.output_text)
