"""Chat templates as an attacker would write them: text or a TemplateError, in time, and never out of the sandbox."""

import os

import pytest
from fuzzing import Cost, examples, hostile_texts, require_readable
from hypothesis import event, given
from hypothesis import strategies as st
from text_models import byte_level, chat
from text_models import chat_template as make

from normistral.artifact import sandbox, taint
from normistral.artifact.taint import TEMPLATE
from normistral.errors import NormistralError

CANARY = "kanarifugl-8f3a"  # in every namespace that an escape would reach first
TIME_LIMIT_S = 0.2

_INTERNAL = (
    *("__class__", "__globals__", "__init__", "__dict__", "__mro__", "__subclasses__", "__builtins__", "__self__"),
    *("__func__", "__code__", "__getattribute__", "__reduce_ex__", "__module__", "__import__", "__doc__", "__call__"),
    *("gi_frame", "gi_code", "f_back", "f_globals", "f_builtins", "tb_frame", "cr_frame", "func_globals", "mro"),
    *("_environment", "_env", "environment", "sources", "following", "_parse", "_func", "blocks", "exported_vars"),
)
_FRAMES = ("gi_frame", "cr_frame", "tb_frame", "f_back", "f_globals", "f_builtins")
_METHODS = (
    *("append", "extend", "pop", "update", "clear", "setdefault", "items", "keys", "get", "copy", "index", "count"),
    *("format", "format_map", "join", "split", "replace", "encode", "decode", "translate", "maketrans", "zfill"),
    *("center", "ljust", "expandtabs", "partition", "strip", "upper", "title", "splitlines", "startswith", "casefold"),
    *("next", "current", "reset", "cycle", "index0", "previtem", "changed", "role", "content", "name", "caller"),
)
_FILTERS = (
    *(
        "abs",
        "attr",
        "batch",
        "capitalize",
        "center",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "filesizeformat",
    ),
    *("first", "float", "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list"),
    *("lower", "map", "max", "min", "pprint", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe"),
    *("select", "selectattr", "slice", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "truncate"),
    *("unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
)
_TESTS = ("defined", "string", "mapping", "iterable", "callable", "sameas", "in", "divisibleby", "filter", "escaped")
_OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "in")
_NAMES = (
    *(
        "messages",
        "messages[0]",
        "messages[0].content",
        "messages[1]['role']",
        "bos_token",
        "eos_token",
        "tools",
        "loop",
    ),
    *("range", "dict", "cycler", "joiner", "namespace", "raise_exception", "strftime_now", "lipsum", "self", "super"),
    *("caller", "varargs", "kwargs", "m", "ns", "ns.x", "i", "item", "documents", "add_generation_prompt", "undefined"),
    *(
        "cycler('a', 'b')",
        "joiner(',')",
        "namespace(x=1)",
        "dict(a=1)",
        "range(5)",
        "cycler",
        "self._TemplateReference__context",
    ),
)
_FORMATS = (
    "{0.__class__}",
    "{0.__init__.__globals__}",
    "{a}",
    "{:>99999}",
    "{0[role]}",
    "{!r:{}}",
    "%s",
    "%(a)s",
    "%9999d",
)

literals = (
    st.integers(-2, 20).map(str)
    | st.sampled_from(["10**9", "2**4096", "1e308", "1.5", "true", "none", "[]", "{}", "()", "[1, 'a']", "{'a': 1}"])
    | hostile_texts(2).map(repr)
    | st.sampled_from([repr(text) for text in (*_FORMATS, *_INTERNAL[:12], "content", "role", CANARY[:4])])
)
attributes = st.sampled_from(_INTERNAL) | st.sampled_from(_METHODS)


def _bigger(inner):
    arguments = st.lists(inner | attributes.map(repr), max_size=2).map(", ".join)
    return st.one_of(
        st.builds("{}.{}".format, inner, attributes),
        st.builds("{}[{!r}]".format, inner, attributes),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:{}]".format, inner, st.sampled_from(["", "1", "-1"]), st.sampled_from(["", "2", "::2"])),
        st.builds("{}({})".format, inner, arguments),
        st.builds("{}.{}({})".format, inner, attributes, arguments),
        st.builds("({} | {})".format, inner, st.sampled_from(_FILTERS)),
        st.builds("({} | {}({}))".format, inner, st.sampled_from(_FILTERS), arguments),
        st.builds("({} | map(attribute={!r}) | list)".format, inner, attributes),
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~", "==", "in"]), inner
        ),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} is {}({}))".format, inner, st.sampled_from(_TESTS), inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{{!r}: {}}}".format, attributes, inner),
        st.builds("namespace(x={})".format, inner),
    )


expressions = st.recursive(literals | st.sampled_from(_NAMES), _bigger, max_leaves=8)


_STATEMENTS = (
    "{{% for i in {0} %}}{1}{{% else %}}x{{% endfor %}}",
    "{{% for i in {0} recursive %}}{1}{{{{ loop({0}) }}}}{{% endfor %}}",
    "{{% for item in range(3000) %}}{1}{{% endfor %}}",
    "{{% if {0} %}}{1}{{% elif x %}}{{% else %}}{1}{{% endif %}}",
    "{{% set m = {0} %}}{1}",
    "{{% set m %}}{1}{{% endset %}}{{{{ m }}}}",
    "{{% set ns = namespace(x={0}) %}}{{% for i in range(30) %}}{{% set ns.x = [ns.x, {0}] %}}{{% endfor %}}{1}",
    "{{% macro f(a={0}, *varargs) %}}{1}{{% endmacro %}}{{{{ f({0}) }}}}",
    "{{% macro g() %}}{{{{ caller({0}) }}}}{{% endmacro %}}{{% call(m) g() %}}{1}{{% endcall %}}",
    "{{% filter {2} %}}{1}{{% endfilter %}}",
    "{{% with m = {0} %}}{1}{{% endwith %}}",
    "{{% generation %}}{1}{{% endgeneration %}}",
    "{{% block b %}}{1}{{% endblock %}}{{{{ self.b() }}}}",
    "{{% include {0} %}}{1}",
    "{{% import {0} as m %}}{1}",
    "{{% extends {0} %}}{1}",
    "{1}{{% break %}}",
    "{1}{{% continue %}}",
    "{1}{{% raw %}}",
    "{{% autoescape true %}}{1}{{% endautoescape %}}",
)


def _statement(body):
    single = st.builds(str.format, st.sampled_from(_STATEMENTS), expressions, body, st.sampled_from(_FILTERS))
    return single | st.builds("{}{}".format, body, body)


outputs = expressions.map("{{{{ {} }}}}".format) | hostile_texts(2)
templates = st.recursive(outputs, _statement, max_leaves=5)


@pytest.fixture(autouse=True)
def canaries(monkeypatch):
    """Where attributes that must not be reached would lead, and a shorter patience."""
    monkeypatch.setattr(taint, "TIME_LIMIT_S", TIME_LIMIT_S)
    monkeypatch.setattr(sandbox, "CANARY", CANARY, raising=False)
    monkeypatch.setattr(sandbox.ChatEnvironment, "canary", CANARY, raising=False)
    monkeypatch.setitem(os.environ, "NORMISTRAL_CANARY", CANARY)
    getattr_, getitem = sandbox.ChatEnvironment.getattr, sandbox.ChatEnvironment.getitem

    def watched(method):
        def look(self, obj, name):
            found = method(self, obj, name)
            internal = isinstance(name, str) and (
                name.startswith("__") or name in ("gi_frame", "f_globals", "tb_frame")
            )
            if internal and not isinstance(obj, dict) and not isinstance(found, sandbox.jinja2.Undefined):
                raise Escaped(f"{type(obj).__name__}.{name}")
            return found

        return look

    monkeypatch.setattr(sandbox.ChatEnvironment, "getattr", watched(getattr_))
    monkeypatch.setattr(sandbox.ChatEnvironment, "getitem", watched(getitem))


class Escaped(BaseException):
    """An internal attribute was given to a template."""


def render(source):
    """The text, or None after an error that a user can read."""
    with Cost() as cost:
        try:
            text = said = make(byte_level(), source).render(MESSAGES)
        except NormistralError as error:
            require_readable(error)
            text, said = None, error.message
    assert cost.seconds < PATIENCE_S
    assert cost.bytes < PATIENCE_BYTES
    assert CANARY not in said
    assert text is not None or "\n" not in said
    return text


MESSAGES = [*chat("Hei {0.__class__} %s", "Ja <|im_end|>", system="Svar\nkort")]
PATIENCE_BYTES = 300 * 2**20
PATIENCE_S = 5.0  # of the processor: one step over the limit


@examples(150)
@given(templates)
def test_a_template_gives_text_or_an_error(source):
    text = render(source)
    event("error" if text is None else "text")


_TOKENS = ("{{", "}}", "{%", "%}", "{#", "#}", "-", "for", "in", "if", "endfor", "endif", "set", "=")
crumbs = st.lists(st.sampled_from(_TOKENS) | expressions | hostile_texts(1), max_size=12).map(" ".join)


@examples(80)
@given(crumbs)
def test_what_is_hardly_a_template_is_an_error_or_text(source):
    render(source)


@examples(60)
@given(templates, hostile_texts())
def test_a_message_never_writes_a_control_token_through_any_template(source, content):
    """Each takes at least a character of the template's own text, if the message could write one at all."""
    conversation = [{"role": "user", "content": content}]
    try:
        template = make(byte_level(), source)
        text, sources = template._render(conversation, True)
        ids = template.encode(conversation)
    except NormistralError as error:
        require_readable(error)
        return
    assert len(text) == len(sources)
    control = {token.id for token in template._encoder.control_tokens}
    written = sum(token_id in control for token_id in ids)
    event("control tokens" if written else "none")
    if template._encoder.could_write_control_text(content):
        assert written <= sources.count(TEMPLATE)
