"""Messages to text and token ids, through the checkpoint's own chat template.

Rendering is byte for byte that of transformers 4.57.6. Token ids are those of its `apply_chat_template`, except where a
message holds the text of a control token: that stays text. The template is not trusted either: it runs in jinja2's
sandbox under the limits of a `RenderBudget`.

Where a template knows no tools, the model is told of them by a prompt, in the form of Hermes (NousResearch) and Qwen:
functions in the system message, calls as

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

and results in a turn of the user's. Everything in it is text of messages, so control tokens in a description or a
result stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normistral.artifact.conversation_encoder import ConversationEncoder
from normistral.artifact.manifest import ReasoningMarkers, Template
from normistral.artifact.taint import MESSAGE, TEMPLATE, UNKNOWN, RenderBudget, TaintedStr, spending, strings_in
from normistral.artifact.tokenizer import AddedToken, Tokenizer
from normistral.errors import NormistralError, TemplateError

if TYPE_CHECKING:
    import jinja2

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Plain ChatML: the fall-back for a chat model that ships no template."""

# Names with a fixed meaning, chosen by the application and not typed by a user: templates make tokens of them, as in
# `'<|' + message['role'] + '|>'`.
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))

_BAD_TEMPLATE = "export the model again with a template that works"
_BAD_MESSAGES = "change the messages to what this model's template takes"
_MAX_QUOTE = 300


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    Args:
        template: source and special tokens, from the manifest.
        tokenizer: the artifact's.
        reasoning: the model's tags, from the manifest; where they are tokens no message can write them.

    Raises:
        TemplateError: the template has a syntax error, or uses what the sandbox does not offer.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, reasoning: ReasoningMarkers | None = None) -> None:
        self._template = template
        tags = () if reasoning is None else (reasoning.open_id, reasoning.close_id)
        self._encoder = ConversationEncoder(tokenizer, template.text, tags)
        self._compiled = _compile(template.text)
        self.tool_format = find_format(template.text, self._encoder.control_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, as `apply_chat_template(messages, tokenize=False)`.

        Raises:
            TemplateError: the template refuses the messages, fails, breaks the sandbox or exceeds its limits.
        """
        return self._render_tools(messages, (), add_generation_prompt)[0]

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The conversation as token ids, as `apply_chat_template(messages)` where no message holds control text.

        Otherwise every control token that stands wholly in text of the template is one, and every other is tokenised
        as ordinary text: one typed into a content, a role or any other field, and one that would only come about where
        a message meets the template.

        Args:
            messages: with "role" and "content" each; of the assistant also "tool_calls", of the role tool also
                "tool_call_id", as OpenAI's API has them.
            tools: {"name", "description", "parameters"} of each, which the model may call.
            continue_final_message: end with the last message's content, so that the model goes on inside it, as in
                transformers.

        Raises:
            TemplateError: as `render`; or a message may hold control text and the template treats it in a way that
                cannot be followed.
            UsageError: the text is not valid Unicode.
        """
        opened = add_generation_prompt and not continue_final_message
        text, sources = self._render_tools(messages, tools, opened)
        if continue_final_message:
            end = _end_of_final(text, sources, messages[-1]["content"])
            text, sources = text[:end], sources[:end]
        typed = (*_typed_strings(messages), *strings_in(tools))
        if UNKNOWN in sources and not any(map(self._encoder.could_write_control_text, typed)):
            sources = sources.replace(UNKNOWN, TEMPLATE)
        return self._encoder.encode(text, sources)

    def _render_tools(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> tuple[str, str]:
        """As `_render`, with tools through the template or through the prompt."""
        if self.tool_format.native:
            described = [{"type": "function", "function": dict(tool)} for tool in tools]
            return self._render(for_template(messages), add_generation_prompt, described)
        if not tools:
            return self._render(as_plain_turns(messages, ()), add_generation_prompt)
        try:
            return self._render(as_plain_turns(messages, tools), add_generation_prompt)
        except TemplateError:  # some know no system message
            return self._render(as_plain_turns(messages, tools, has_system=False), add_generation_prompt)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, tools: Sequence[Any] = ()
    ) -> tuple[str, str]:
        """Text, and the source of each of its characters."""
        import jinja2
        from jinja2.exceptions import SecurityError

        size = sum(map(len, strings_in(messages))) + sum(map(len, strings_in(tools)))
        try:
            with spending(RenderBudget(size)) as budget:
                variables = self._special_tokens() | {
                    "messages": [_track_message(message) for message in messages],
                    "tools": [_track(tool) for tool in tools] or None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
                pieces, length = [], 0
                for piece in self._compiled.generate(**variables):
                    pieces.append(piece)
                    length += len(piece)
                    budget.reserve(0 if length <= budget.largest else length)
                rendered = TaintedStr().join(pieces)
                return str.__str__(rendered), rendered.sources
        except NormistralError:
            raise
        except SecurityError as exc:
            raise TemplateError(f"the chat template breaks the sandbox: {_quote(exc)}", _BAD_TEMPLATE) from exc
        except jinja2.UndefinedError as exc:
            raise TemplateError(f"the chat template uses what is not there: {_quote(exc)}", _BAD_MESSAGES) from exc
        except jinja2.TemplateError as exc:
            raise TemplateError(f"the chat template refuses the messages: {_quote(exc)}", _BAD_MESSAGES) from exc
        except Exception as exc:  # whatever Python raises on the template's behalf
            raise TemplateError(f"the chat template fails: {_quote(exc)}", _BAD_TEMPLATE) from exc

    def _special_tokens(self) -> dict[str, Any]:
        """bos_token and so on, where the checkpoint has them."""
        from normistral.artifact.sandbox import own

        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        values: dict[str, Any] = {name: own(getattr(self._template, name)) for name in names}
        for name, value in self._template.other_tokens.items():
            values[name] = own(value) if isinstance(value, str) else [own(token) for token in value]
        return {name: value for name, value in values.items() if value is not None}


def _compile(source: str) -> jinja2.Template:
    import jinja2

    from normistral.artifact.sandbox import compile_template

    try:
        return compile_template(source)
    except NormistralError:
        raise
    except jinja2.TemplateSyntaxError as exc:
        where = f"line {exc.lineno}: {_quote(exc, with_type=False)}"
        raise TemplateError(f"the chat template has an error in {where}", _BAD_TEMPLATE) from exc
    except Exception as exc:  # nested too deep for jinja2 or for Python's own compiler
        raise TemplateError(f"the chat template cannot be compiled: {_quote(exc)}", _BAD_TEMPLATE) from exc


def _end_of_final(text: str, sources: str, content: str) -> int:
    """Where the final message's content ends, blanks at its end aside; a template may strip those."""
    content = content.strip()
    at = text.rfind(content) if content else -1
    if at < 0 or TEMPLATE in sources[at : at + len(content)]:
        raise TemplateError("the final message does not stand in the conversation as it is", _BAD_MESSAGES)
    return at + len(content)


def _track_message(message: Mapping[str, Any]) -> dict[str, Any]:
    tracked: dict[str, Any] = _track(message)
    if isinstance(message.get("role"), str) and message["role"] in ROLES:
        tracked["role"] = TaintedStr(message["role"], TEMPLATE * len(message["role"]))
    return tracked


def _track(value: Any) -> Any:
    if isinstance(value, str):
        return TaintedStr(str.__str__(value), MESSAGE * len(value))
    if isinstance(value, Mapping):
        return {key: _track(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_track(inner) for inner in value]
    return value


def _typed_strings(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Every string of the messages except the usual keys and roles."""
    for message in messages:
        for key, value in message.items():
            if key not in ("role", "content"):
                yield from strings_in(key)
            if key != "role" or value not in ROLES:
                yield from strings_in(value)


def _quote(exc: Exception, *, with_type: bool = True) -> str:
    """An exception in one line, and not a long one: its text comes from the template."""
    import jinja2

    text = " ".join(str.__str__(str(exc)).split())[:_MAX_QUOTE]
    plain = isinstance(exc, jinja2.TemplateError) or not with_type
    return text if plain else f"{type(exc).__name__}: {text}" if text else type(exc).__name__


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
    """Arguments that are no JSON object, as of a call that was cut off, stay text."""
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(function["arguments"])
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return dict(call) | {"function": function}
