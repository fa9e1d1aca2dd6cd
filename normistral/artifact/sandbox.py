"""The jinja2 environment in which chat templates run: as transformers sets it up, with taint tracking and limits.

Three things are added to jinja2's immutable sandbox. Literals of the template and strings of the messages are
`TaintedStr`, so that the rendered text knows its authors. Loops, calls, filters and operators ask the render budget
before they work. What no limit can be kept in (`lipsum`, `urlize`, `wordwrap`, `xmlattr`, `striptags`, `pprint`,
`{% autoescape %}`, methods of numbers and bytes) is not there.

Source for the set-up: transformers 4.57.6, utils/chat_template_utils.py, `_compile_jinja_template`.
"""

# ruff: noqa: D102 - methods without a docstring are overridden ones of jinja2

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2  # noqa: TID253 - this file is imported lazily, by chat_template.py
from jinja2 import nodes  # noqa: TID253
from jinja2.ext import Extension, loopcontrols  # noqa: TID253
from jinja2.filters import make_attrgetter  # noqa: TID253
from jinja2.parser import Parser  # noqa: TID253
from jinja2.runtime import Context, Macro  # noqa: TID253
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: TID253
from jinja2.utils import Namespace, pass_context, pass_environment  # noqa: TID253
from jinja2.visitor import NodeTransformer  # noqa: TID253
from markupsafe import Markup

from normistral.artifact.taint import (
    HINT,
    MESSAGE,
    TEMPLATE,
    UNKNOWN,
    RenderBudget,
    TaintedStr,
    current_budget,
    require_width,
    reserve_formatting,
    sources_of,
    spending,
    strings_in,
    weigh,
)
from normistral.errors import TemplateError

MAX_SOURCE = 2**18  # characters; the largest published templates have about 2**15
_MAX_INTEGER_BITS = 4096
_MAX_JSON_INDENT = 16
_MAX_DATE_FORMAT = 256
_UNLIMITED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_WIDTH_FILTERS = ("batch", "center", "round", "slice", "truncate")
_METHODS: dict[type, frozenset[str]] = {
    Mapping: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_BUILT_INS = (Mapping, list, tuple, bytes, bytearray, int, float, complex, set, frozenset, range, type)


def compile_template(source: str) -> jinja2.Template:
    """Parse and compile a template.

    Raises:
        jinja2.TemplateSyntaxError, TemplateError, RecursionError and others: whatever the source provokes.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}", HINT)
    environment = ChatEnvironment()
    with spending(RenderBudget(len(source))):
        tree = environment.parse(source)
        if tree.find(nodes.ScopedEvalContextModifier):
            raise TemplateError("the chat template uses {% autoescape %}, which is not supported", HINT)
        code = environment.compile(_Instrument().visit(tree))
    module: dict[str, Any] = {"environment": environment, "__file__": "<chat template>"}
    exec(code, module)
    module["str_join"] = module["markup_join"] = _concatenate_values  # the `~` operator
    return jinja2.Template.from_module_dict(environment, module, environment.make_globals(None))


def own(value: str | None) -> TaintedStr | None:
    """A string that belongs to the template."""
    return None if value is None else TaintedStr(value, TEMPLATE * len(value))


class _Instrument(NodeTransformer):
    """Wraps literals, containers and what loops run over in calls of the environment's methods."""

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        return self._call("literal", node) if isinstance(node.value, str) else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return self._call("literal", nodes.Const(node.data, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._call("each", node.iter)
        return node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("measured", node)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._call("measured", node) if node.ctx == "load" else node

    @staticmethod
    def _call(method: str, argument: nodes.Node) -> nodes.Call:
        target = nodes.EnvironmentAttribute(method, lineno=argument.lineno)
        return nodes.Call(target, [cast(nodes.Expr, argument)], [], None, None, lineno=argument.lineno)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _SilentNamespace(Namespace):
    """A namespace can be made to hold itself many times over, so it is not printed."""

    def __repr__(self) -> str:
        raise TemplateError("the chat template prints a namespace, which is not supported", HINT)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with transformers' settings, filters and globals, under the current `RenderBudget`."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        for name in _UNLIMITED_FILTERS:
            del self.filters[name]
        self.filters |= {"indent": _indent, "join": _join, "sum": _sum, "tojson": _to_json}
        self.filters = {name: _metered(function, name) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _SilentNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the pieces of a rendering, a macro or a `{% set %}` block."""
        return TaintedStr().join(pieces)

    def literal(self, text: str) -> TaintedStr | None:
        """A string that stands in the template."""
        return own(text)

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """Items of a loop; each checks the time limit."""
        budget = current_budget()
        for item in items:
            budget.tick()
            yield item

    def measured(self, value: Any) -> Any:
        """A container that the template made."""
        budget = current_budget()
        budget.reserve(weigh(value, budget.largest))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        current_budget().tick()
        return __self.measured(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget()
        budget.tick()
        _refuse_markup(left, right)
        if type(left) is str:
            left = TaintedStr(left)
        if operator == "*":
            _reserve_repetition(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_small(left.bit_length() * abs(right))
        elif operator == "+" and isinstance(left, (list, tuple)):
            budget.reserve(weigh(left, budget.largest) + weigh(right, budget.largest))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int):
            _require_small(result.bit_length())
        return result

    def getattr(self, obj: Any, attribute: str) -> Any:
        return super().getattr(_tracked(obj), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, type):  # `dict['a']` is a generic alias, and shows dict's attributes as if they were its own
            return self.undefined(obj=obj, name=argument)
        return super().getitem(_tracked(obj), argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, Markup):
            return False
        if isinstance(obj, TaintedStr):
            return hasattr(str, attr)
        if not isinstance(obj, _BUILT_INS):
            return True
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            pattern = value.__self__
            _refuse_markup(pattern)
            reserve_formatting(pattern, pattern.count("{"), (args, kwargs))
            return TaintedStr.following(wrapped(*args, **kwargs), pattern, *args, *kwargs.values())

        return limited


def _concatenate_values(values: Iterable[Any]) -> str:
    return TaintedStr().join(map(str, values))


def _tracked(value: Any) -> Any:
    return TaintedStr(value) if type(value) is str else value


def _refuse_markup(*values: Any) -> None:
    """Markup escapes whatever it meets, by methods that know no limit; printing it is fine."""
    if any(isinstance(value, Markup) for value in values):
        raise TemplateError("the chat template computes with HTML-escaped text, which is not supported", HINT)


def _require_small(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise TemplateError(f"the chat template computes an integer of more than {_MAX_INTEGER_BITS} bits", HINT)


def _reserve_repetition(left: Any, right: Any) -> None:
    budget = current_budget()
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
            budget.reserve(weigh(sequence, budget.largest) * max(count, 0))


def _metered(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter under the budget. `functools.wraps` keeps jinja2's mark for filters that want the context."""

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.tick()
        _refuse_markup(*args, *kwargs.values())
        if name in _WIDTH_FILTERS:
            for value in (*args, *kwargs.values()):
                require_width(value)
        result = function(*map(_tracked, args), **{key: _tracked(value) for key, value in kwargs.items()})
        budget.reserve(weigh(result, budget.largest))
        return result

    return limited


@pass_environment
def _join(environment: ChatEnvironment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """jinja2's `join` without autoescape, keeping sources."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return TaintedStr(str(d)).join(map(str, items))


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja2's `indent`, keeping sources."""
    require_width(width)
    indention = TaintedStr(width) if isinstance(width, str) else own(" " * width)
    newline = own("\n")
    assert indention is not None
    assert newline is not None
    text = TaintedStr(s) + newline  # so that a last empty line stays one
    if blank:
        result = (newline + indention).join(text.splitlines())
    else:
        head, *lines = text.splitlines()
        result = newline.join([head, *(indention + line if line else line for line in lines)])
    return indention + result if first else result


@pass_context
def _sum(context: Context, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's `sum`, one watched addition after the other."""
    items = iterable if attribute is None else map(make_attrgetter(context.environment, attribute), iterable)
    add = context.environment.call_binop  # type: ignore[attr-defined]
    return functools.reduce(lambda total, item: add(context, "+", total, item), items, start)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' `tojson`: no HTML escapes."""
    if (indent if isinstance(indent, int) else len(indent or "")) > _MAX_JSON_INDENT:
        raise TemplateError(f"the chat template indents JSON by more than {_MAX_JSON_INDENT}", HINT)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    budget = current_budget()
    pieces, size = [], 0
    for piece in encoder.iterencode(x):
        pieces.append(piece)
        size += len(piece)
        if size > budget.largest:
            break
    budget.reserve(size)
    text = "".join(pieces)
    if isinstance(x, str):
        return TaintedStr.following(text, x)
    # Of a container only its strings decide: what is not the template's is as if a message wrote all of it.
    sources = {source for string in strings_in(x) for source in sources_of(string).replace(UNKNOWN, MESSAGE)}
    return TaintedStr(text, (sources.pop() if len(sources) == 1 else UNKNOWN) * len(text))


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_DATE_FORMAT:
        raise TemplateError(f"the chat template formats the date with more than {_MAX_DATE_FORMAT} characters", HINT)
    return datetime.now().strftime(format)
