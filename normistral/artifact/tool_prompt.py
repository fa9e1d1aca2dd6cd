"""How a model is told of tools, and how it writes calls: by its template where that knows tools, otherwise by a prompt.

The prompt is in the form of Hermes (NousResearch) and Qwen: functions in the system message, calls as

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

and results in a turn of the user's. Everything in it is text of messages, so control tokens in a description or a
result stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normistral.artifact.tokenizer import AddedToken

_PROMPT = """You can call these functions, each described by a line of JSON:

{functions}

To call functions, write nothing but this for each call:

<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>

Each result comes back between <tool_response> and </tool_response>. When no function is needed, answer with text."""
_KNOWS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How calls are written: `begin` before the first, `between` two, `end` behind the last; each a JSON object.

    Attributes:
        begin_id, end_id: tokens that `begin` and `end` are, or None for ordinary text.
        repeated: begin and end stand around each call, not around all.
        native: the template itself describes tools.
    """

    begin: str
    end: str
    before: str
    after: str
    between: str
    repeated: bool
    native: bool
    begin_id: int | None = None
    end_id: int | None = None


def find_format(template: str, control_tokens: Sequence[AddedToken]) -> ToolFormat:
    """The format of a template's own calls, or else of the prompt.

    Args:
        control_tokens: added tokens that the template writes as tokens.
    """
    ids = {token.text: token.id for token in control_tokens}
    if _KNOWS_TOOLS.search(template):
        if "<tool_call>" in template and "arguments" in template:
            begin_id, end_id = ids.get("<tool_call>"), ids.get("</tool_call>")
            return ToolFormat("<tool_call>", "</tool_call>", "\n", "\n", "\n", True, True, begin_id, end_id)
        if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
            begin_id = ids.get("[TOOL_CALLS]")
            return ToolFormat("[TOOL_CALLS]", "", "[", "]", ", ", False, True, begin_id)
    return ToolFormat("<tool_call>", "</tool_call>", "\n", "\n", "\n", True, False)


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a template that knows tools: arguments as objects, as transformers has them."""
    return [
        dict(message) | {"tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def as_plain_turns(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool = True
) -> list[dict[str, Any]]:
    """Messages for a template that knows no tools: the prompt, calls and results as text of ordinary turns.

    Args:
        tools: {"name", "description", "parameters"} of each.
        has_system: the prompt goes into the system message; otherwise into the first of the user's.
    """
    names: dict[str, str] = {}
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if calls := message.get("tool_calls"):
            names |= {call["id"]: call["function"]["name"] for call in calls}
            written = [write_call(call["function"]["name"], call["function"]["arguments"]) for call in calls]
            turn["content"] = "\n".join([*filter(None, [message["content"]]), *written])
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "")
            result = json.dumps({"name": name, "content": message["content"]}, ensure_ascii=False)
            turn = {"role": "user", "content": f"<tool_response>\n{result}\n</tool_response>"}
            if turns and turns[-1].get("results"):
                turns[-1]["content"] += "\n" + turn["content"]
                continue
            turn["results"] = True
        elif message["role"] == "user" and turns and turns[-1].get("results"):
            turns[-1]["content"] += "\n\n" + message["content"]
            continue
        turns.append(turn)
    turns = [{key: value for key, value in turn.items() if key != "results"} for turn in turns]
    return _with_prompt(turns, tools, has_system=has_system) if tools else turns


def write_call(name: str, arguments: str) -> str:
    """A call in the prompt's format."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>'


def _with_prompt(
    turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, has_system: bool
) -> list[dict[str, Any]]:
    prompt = _PROMPT.format(functions="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    role = "system" if has_system else "user"
    place = next((i for i, turn in enumerate(turns) if turn["role"] == role), None)
    if place is None or (has_system and place > 0):
        return [{"role": role, "content": prompt}, *turns]
    joined = [turns[place]["content"], prompt] if has_system else [prompt, turns[place]["content"]]
    return [*turns[:place], turns[place] | {"content": "\n\n".join(filter(None, joined))}, *turns[place + 1 :]]


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        function["arguments"] = json.loads(function["arguments"])
    return dict(call) | {"function": function}
