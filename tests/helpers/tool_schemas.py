"""Twenty schemas of tools, and requests that have to call them."""

import json

import httpx
import jsonschema


def schema_of(number: int) -> dict:
    """One of twenty: different types, some nested."""
    kinds = [
        {"type": "integer", "minimum": 0, "maximum": 50},
        {"type": "boolean"},
        {"enum": ["rød", "grønn", "<|im_end|>", '"{']},
        {"type": "string", "maxLength": 6},
        {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 3},
        {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "required": ["a"]},
        {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    ]
    properties = {f"p{i}": kinds[(number + i) % len(kinds)] for i in range(number % 4 + 1)}
    return {"type": "object", "properties": properties, "required": sorted(properties)[: number % 3]}


def count_valid_calls(url: str, key: str, requests: int) -> int:
    """How many of these requests were answered with calls that fit their schemas; one in three names a tool."""
    schemas = {f"tool_{i}": schema_of(i) for i in range(20)}
    tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()]
    valid = 0
    for number in range(requests):
        name = f"tool_{number % 20}"
        named = {"type": "function", "function": {"name": name}}
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "Vær?"}],
            "tools": [tools[number % 20], tools[(number + 7) % 20]],
            "tool_choice": "required" if number % 3 else named,
            "parallel_tool_calls": number % 25 == 0,
            "temperature": 1.0,
            "seed": number,
            "max_tokens": 3000,
        }
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120).json()["choices"][0]
        calls = answer["message"]["tool_calls"]
        for call in calls:
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
        names = {call["function"]["name"] for call in calls}
        valid += answer["finish_reason"] == "tool_calls" and bool(calls) and (number % 3 > 0 or names == {name})
    return valid
