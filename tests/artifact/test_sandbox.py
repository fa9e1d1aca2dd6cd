"""Chat templates come from checkpoints: errors a user can read, and limits that hold."""

from __future__ import annotations

import sys
import threading
import time
import tracemalloc

import pytest
from text_models import byte_level, chat
from text_models import chat_template as make

from normistral.artifact.taint import RenderBudget
from normistral.errors import TemplateError


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "the chat template has an error in line 1: Expected an expression"),
        ("a\n{{ 'x' | finnes_ikke }}", "the chat template has an error in line 2: No filter named 'finnes_ikke'"),
        ("{{ raise_exception('Ingen systemrolle') }}", "the chat template refuses the messages: Ingen systemrolle"),
        ("{{ a.b.c }}", "the chat template uses what is not there: 'a' is undefined"),
        ("{{ messages.append(1) }}", "the chat template breaks the sandbox: access to attribute 'append'"),
        ("{{ messages.__class__.__mro__ }}", "the chat template breaks the sandbox: access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: division by zero"),
        ("{{ 1 + 'a' }}", "the chat template fails: TypeError"),
        ("{% include 'x' %}", "the chat template fails: TypeError: no loader"),
        ("{% autoescape true %}{% endautoescape %}", "the chat template uses {% autoescape %}"),
        ("{{ " + "(" * 3000 + " }}", "the chat template cannot be compiled: RecursionError"),
        ("x" * (2**18 + 1), "the chat template has 262145 characters, more than 262144"),
    ],
)
def test_errors_are_one_line_with_a_hint(template, message):
    with pytest.raises(TemplateError) as caught:
        make(byte_level(), template).render(chat("Hei"))
    assert caught.value.message.startswith(message)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("attribute", ["sources", "following", "__class__", "_cut_in_three", "maketrans('a', 'b')"])
def test_text_shows_templates_nothing_that_plain_text_has_not(attribute):
    expected = "{97: 98}" if "maketrans" in attribute else ""
    assert make(byte_level(), f"{{{{ messages[0].content.{attribute} }}}}").render(chat("Hei")) == expected


@pytest.mark.parametrize("expression", ["dict['a'].fromkeys('ab')", "dict['a'].mro()", "dict['__class__']('a')"])
def test_a_class_gives_nothing_by_subscript(expression):
    """Found by fuzzing: jinja2 makes a generic alias of it, whose attributes nobody watches."""
    with pytest.raises(TemplateError, match="uses what is not there"):
        make(byte_level(), f"{{{{ {expression} }}}}").render(chat("Hei"))


def test_what_a_template_says_is_cut_and_put_on_one_line():
    with pytest.raises(TemplateError) as caught:
        make(byte_level(), "{{ raise_exception('a\nb ' * 10000) }}").render([])
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


BIG = "{% set b = 'a' * 1000000 %}"
GROW = "{{% set ns = namespace(x={0}) %}}{{% for i in range(99) %}}{{% set ns.x = {1} %}}{{% endfor %}}{{{{ ns.x }}}}"
BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 10 ** (10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 5 | center(10**9) }}",
    "{{ 5 | string | attr('ljust')(10**9) }}",
    "{{ 'a\nb' | indent(10**9) }}",
    "{{ 'a'.zfill(10**9) }}",
    "{{ 'a\tb'.expandtabs(10**9) }}",
    "{{ ('a' | e).center(10**9) }}",
    "{{ ('a' | safe) * 10**9 }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ 'a'.encode().center(10**9) }}",
    "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "{{ range(10**9) | list }}",
    "{{ lipsum(n=10**6) }}",
    "{{ [[1]] | tojson(indent=10**9) }}",
    "{{ strftime_now('%c' * 10**5) }}",
    BIG + "{{ b.replace('a', b) }}",
    BIG + "{{ b | replace('', b) }}",
    BIG + "{{ range(100000) | join(b) }}",
    BIG + "{{ b.join(range(100000) | map('string')) }}",
    BIG + "{{ '%(b)s%(b)s%(b)s' % {'b': b} }}",
    BIG + "{% for i in range(100000) %}{{ b }}{% endfor %}",
    BIG + "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = ns.x + [b ~ i] %}{% endfor %}",
    GROW.format("'a'", "ns.x ~ ns.x"),
    GROW.format("'a'", "ns.x + ns.x"),
    GROW.format("[1]", "ns.x + ns.x"),
    GROW.format("[1]", "[ns.x, ns.x]"),
    GROW.format("(1,)", "(ns.x, ns.x)"),
    GROW.format("{}", "{1: ns.x, 2: ns.x}"),
    GROW.format("{}", "dict(a=ns.x, b=ns.x)"),
    GROW.format("7", "ns.x * ns.x"),
    "{% set ns = namespace(x=1) %}{% set ns.x = [ns, ns] %}{{ ns }}",
    "{{ range(100000) | map('center', 9999) | list | length }}",
    "{{ range(100000) | map('list') | sum(start=[]) }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if j > 100000 %}{% endfor %}{% endfor %}",
    "{% set r = range(30000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) recursive %}{{ loop(range(100000)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize("template", BOMBS)
def test_a_hostile_template_costs_neither_time_nor_memory(template, monkeypatch):
    monkeypatch.setattr("normistral.artifact.taint.TIME_LIMIT_S", 0.3)
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(TemplateError) as caught:
            make(byte_level(), template).render(chat("Hei"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.hint
    assert time.thread_time() - start < 10  # 0.3 s and one step, under tracemalloc
    assert peak < 300 * 2**20


def test_a_template_that_stands_still_on_a_busy_machine_loses_none_of_its_time(monkeypatch):
    monkeypatch.setattr("normistral.artifact.taint.TIME_LIMIT_S", 0.1)
    budget = RenderBudget(0)
    time.sleep(0.3)
    budget.tick()

    def work():
        while time.thread_time() < began + 1:
            budget.tick()

    began = time.thread_time()
    with pytest.raises(TemplateError, match=r"ran for more than 0\.1 s"):
        work()
    assert 0.05 < time.thread_time() - began < 0.5


def test_limits_hold_in_any_thread_and_leave_none_behind(monkeypatch):
    monkeypatch.setattr("normistral.artifact.taint.TIME_LIMIT_S", 0.2)
    template = make(byte_level(), BOMBS[-5])
    errors = []

    def render() -> None:
        try:
            template.render([])
        except TemplateError as exc:
            errors.append(exc.message)

    threads = [threading.Thread(target=render) for _ in range(3)]
    before = threading.active_count()
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + 3
    for thread in threads:
        thread.join()
    assert errors == ["the chat template ran for more than 0.2 s"] * 3
    assert sys.gettrace() is None or "coverage" in sys.modules
