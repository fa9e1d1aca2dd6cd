"""Tools that a model may call: their description, the structure of an answer that calls them, and calls in a stream.

Calls are known by the structure, never by searching text: an answer either begins with a call or holds none.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from normistral.artifact.chat_template import ToolFormat
from normistral.errors import UsageError
from normistral.runtime.chunks import ToolCall
from normistral.runtime.structured.structure import Structure, close_objects, without_documentation, without_nulls

ToolMode = Literal["auto", "required", "none"]

MOST_TOOLS = 128
MOST_CALLS = 16  # of one answer
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_ID_LENGTH = 9  # letters and digits: Mistral's templates take nothing else
_ID_ALPHABET = string.ascii_letters + string.digits
_HEADER = re.compile(r'\{"name": "([^"]*)", "arguments": (?=\{)')


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
        parameters: JSON schema of its arguments, an object; an empty one has no arguments.
        strict: refuse a schema with keywords that a grammar cannot keep to, instead of leaving those to the model.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for a name or a schema that cannot be one."""
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} is no name of a tool", "take up to 128 letters, digits, _, - and .")
        kind = self.parameters.get("type", "object")
        if kind != "object":
            raise UsageError(f"the parameters of {self.name} are of type {kind!r}", "they have to be an object")

    @classmethod
    def of(cls, tool: Callable[..., Any] | type | Mapping[str, Any] | Tool) -> Tool:
        """From a function with annotations, a pydantic model, or a mapping as OpenAI's API has it.

        Raises:
            UsageError: it is none of these, or a parameter has no annotation that pydantic can describe.
        """
        if isinstance(tool, Tool):
            return tool
        if isinstance(tool, Mapping):
            inner = tool.get("function", tool)
            if not isinstance(inner, Mapping) or set(inner) - {"name", "description", "parameters", "strict"}:
                raise UsageError("a tool has name, description and parameters", "see docs/tools.md")
            parameters = without_nulls(inner.get("parameters") or {})
            return cls(inner.get("name", ""), inner.get("description") or "", parameters, inner.get("strict") is True)
        if isinstance(tool, type) and hasattr(tool, "model_json_schema"):
            schema = {key: value for key, value in tool.model_json_schema().items() if key not in _DOCUMENTATION}
            return cls(tool.__name__, inspect.cleandoc(tool.__doc__ or ""), schema)
        if callable(tool) and hasattr(tool, "__name__"):  # a partial, or an object that can be called, has none
            return cls(tool.__name__, inspect.getdoc(tool) or "", _schema_of(tool))
        raise UsageError(f"a {type(tool).__name__} is no tool", "give a function, a pydantic model or a JSON schema")

    @property
    def described(self) -> dict[str, Any]:
        """As the model is told of it."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


_DOCUMENTATION = ("title", "description")


def _schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        from pydantic import TypeAdapter
        from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
    except ImportError as exc:
        raise UsageError("functions are described by pydantic, which is not installed", "pip install pydantic") from exc
    try:
        annotated: Any = function
        schema = TypeAdapter(annotated).json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as exc:
        message = str(exc).splitlines()[0]
        raise UsageError(f"{function.__name__} cannot be described: {message}", "annotate its parameters") from exc
    if schema.get("type") != "object":
        raise UsageError(f"{function.__name__} takes arguments by position only", "let it take them by name")
    return schema


def read_tools(tools: Sequence[Any]) -> list[Tool]:
    """The tools of a request; raises UsageError as `Tool.of`, or where two have one name, or there are too many."""
    if not isinstance(tools, Iterable):
        raise UsageError(f"tools are a list, not a {type(tools).__name__}", "write them in brackets: tools=[function]")
    read = [Tool.of(tool) for tool in tools]
    if len(read) > MOST_TOOLS:
        raise UsageError(f"{len(read)} tools are too many", f"give at most {MOST_TOOLS}")
    if twice := next((tool.name for i, tool in enumerate(read) if tool.name in {t.name for t in read[:i]}), None):
        raise UsageError(f"two tools are called {twice}", "give each a name of its own")
    return read


def tool_structure(
    tools: Sequence[Tool],
    format: ToolFormat,
    mode: ToolMode | str = "auto",
    *,
    parallel: bool = True,
    text: Structure | None = None,
    thinking: bool = False,
) -> Structure | None:
    """Structure of an answer that may call tools; `text` where it may not.

    Args:
        mode: "auto" is text or calls, "required" calls, another the name of the one tool to call once.
        parallel: several calls in one answer.
        text: structure of the answer where it is text.
        thinking: the answer follows reasoning, so text begins neither with a blank nor with what may be a tag.

    Raises:
        UsageError: there is no such tool, or `text` is neither a JSON schema nor any JSON object.
    """
    if mode == "none" or not tools:
        if mode not in ("none", "auto"):
            raise UsageError("a call is asked for, and there are no tools", "give tools")
        return text
    if text is not None and getattr(text, "kind", None) not in ("json_schema", "json_object"):
        raise UsageError("with tools the answer's own form can only be JSON", "leave out tools, or ask for JSON")
    if mode not in get_args(ToolMode):
        tools, parallel = [tool for tool in tools if tool.name == mode], False
        if not tools:
            raise UsageError(f"there is no tool {mode!r}", "name one of the tools")
    schema = None
    if text is not None:
        schema = json.loads(text.text) if text.text else {"type": "object"}
    none: Mapping[str, Any] = {"properties": {}}  # as in OpenAI's API, of a tool without a schema
    schemas = {tool.name: without_documentation(tool.parameters) or none for tool in tools}
    document = {
        "tools": {name: close_objects({"type": "object", **parameters}) for name, parameters in schemas.items()},
        "format": asdict(format),
        "strict": [tool.name for tool in tools if tool.strict],
        "most": MOST_CALLS if parallel else 1,
        "thinking": thinking,
        "text": None if mode != "auto" else schema if schema is not None else True,
    }
    try:
        written = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise UsageError(f"parameters of tools cannot be written as JSON: {exc}", "use texts, numbers, lists") from exc
    return Structure("tool_calls", written)


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call: where `name` is given, its beginning.

    Attributes:
        index: of the call in its answer.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class ToolCallParser:
    """Tells text from calls in one answer, as it comes.

    Args:
        format: None where calls cannot come: everything is text.
        certain: the answer has to be calls.
    """

    format: ToolFormat | None
    certain: bool = False
    calls: list[ToolCall] = field(default_factory=list)
    _held: str = ""
    _decided: bool | None = None  # whether it is calls
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False

    def push(self, token_id: int | None, text: str) -> tuple[str, list[CallDelta]]:
        """Read on; text to show, and pieces of calls."""
        if self._decided is None:
            self._decide(token_id, text)
        if self._decided is False:
            shown, self._held = self._held + text, ""
            return shown, []
        self._held += text
        return "", list(self._read_calls()) if self._decided else []

    def flush(self) -> str:
        """Text held back when the answer has ended."""
        held, self._held = self._held, ""
        return "" if self._decided else held

    @property
    def is_text(self) -> bool:
        """It is certain that no call comes."""
        return self._decided is False

    def _decide(self, token_id: int | None, text: str) -> None:
        if self.format is None:
            self._decided = False
        elif self.certain:
            self._decided = True
        elif self.format.begin_id is not None:
            if token_id == self.format.begin_id:
                self._decided = True
            elif text:
                self._decided = False
        else:
            so_far = self._held + text
            if so_far.startswith(self.format.begin):
                self._decided = True
            elif so_far and not self.format.begin.startswith(so_far):
                self._decided = False

    def _read_calls(self) -> list[CallDelta]:
        deltas: list[CallDelta] = []
        while self._held:
            if self._depth == 0:
                header = _HEADER.search(self._held)
                if header is None:
                    break
                call = ToolCall(new_call_id(), header[1], "")
                self.calls.append(call)
                deltas.append(CallDelta(len(self.calls) - 1, "", call.id, call.name))
                self._held = self._held[header.end() :]
            arguments = self._take_arguments()
            call = self.calls[-1]
            self.calls[-1] = ToolCall(call.id, call.name, call.arguments + arguments)
            deltas.append(CallDelta(len(self.calls) - 1, arguments))
        return deltas

    def _take_arguments(self) -> str:
        """Held text up to the end of the object, or all of it."""
        for place, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    taken, self._held = self._held[: place + 1], self._held[place + 1 :]
                    return taken
        taken, self._held = self._held, ""
        return taken


def new_call_id() -> str:
    """Name of a call, of letters and digits."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
