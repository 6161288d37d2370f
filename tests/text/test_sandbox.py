"""Chat templates that would take all memory or the processor without end, and what they may still do."""

from __future__ import annotations

import json
import resource
import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen_mlx.errors import QwenMLXError
from qwen_mlx.text import chat_template, sandbox
from tests.helpers.cases import each

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<p>Grüße & 你好</p>\n"}]
DOUBLE = "{%% set ns = namespace(s='x', t=[1], u=[1]) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.s }}"
LONG = "{% set s = 'x'.ljust(9000000) %}"

MEMORY = {
    "concatenation": DOUBLE % "{% set ns.s = ns.s ~ ns.s %}",
    "sum": DOUBLE % "{% set ns.s = ns.s + ns.s %}",
    "lists": DOUBLE % "{% set ns.t = [ns.t, ns.t] %}" + "{{ ns.t }}",
    "equal lists": DOUBLE % "{% set ns.t = [ns.t, ns.t] %}{% set ns.u = [ns.u, ns.u] %}" + "{{ ns.t == ns.u }}",
    "dicts": DOUBLE % "{% set ns.t = dict(a=ns.t, b=ns.t) %}" + "{{ ns.t | tojson }}",
    "a set block": DOUBLE % "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
    "numbers": "{% set ns = namespace(n=1) %}{% for i in range(9999) %}{% set ns.n = ns.n + ns.n %}{% endfor %}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "a named width": "{{ 'x'.center(width=9999999999) }}",
    "a method by attr": "{{ 'x' | attr('zfill')(9999999999) }}",
    "a method in a variable": "{% set f = 'x'.center %}{{ f(9999999999) }}",
    "center": "{{ ['x'] | map('center', 9999999999) | list }}",
    "%d": "{{ '%9999999999d' % 1 }}",
    "%*d": "{{ '%*d' % (9999999999, 1) }}",
    "%s": LONG + "{{ '%s%s%s%s%s%s%s%s'.replace('%', '%s%s%s%s%s%s%s%s%') % ((s,) | list) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format's width": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "a filter block": "{% filter indent(999999999) %}a\nb\n{% endfilter %}",
    "tojson": "{{ [1] | tojson(indent=2000000000) }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
    "slice": "{{ [1] | slice(9999999999) | list }}",
    "lipsum": "{{ lipsum(999999999) }}",
    "replace": LONG + "{{ s.replace(' ', s) }}",
    "replace filter": LONG + "{{ s | replace(' ', s) }}",
    "replace filter within the memory": "{% set s = 'x'.ljust(30000) %}{{ s | replace(' ', s) }}",
    "join": LONG + "{{ range(100000) | join(s) }}",
    "joined characters": LONG + "{{ s.join(s) }}",
    "expandtabs": "{{ ''.ljust(1000, '\t').expandtabs(9999999) }}",
    "split": LONG + "{{ s.split(' ') | length }}",
    "characters": LONG + "{{ s | list | length }}",
    "arguments": LONG + "{{ cycler(*s) }}",
    "slices": LONG + "".join(f"{{% set a{i} = s[1:] %}}" for i in range(100)),
    "an output in a block": LONG + "{% set t %}{% for i in range(90000) %}{{ s }}{% endfor %}{% endset %}",
    "text in a block": "{% set t %}{% for i in range(90000) %}" + "y" * 9000 + "{% endfor %}{% endset %}",
    "text": "{% for i in range(90000) %}" + "y" * 9000 + "{% endfor %}",
    "comparisons": LONG + "{% set t = s.replace('y', 'z') %}" + "{{ s == t }}" * 3000,
    "sums of lists": "{% set l = range(999) | list %}{{ range(9) | map(attribute='x', default=l) | sum(start=[]) }}",
    "to_bytes": "{{ (1).to_bytes(2000000000, 'big') }}",
    "translate": "{{ 'x'.translate({120: 'y'}) }}",
    "a long template": "{{ 1 }}" * 100_000,
}
TIME = {
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "loops over lists": "{% set l = range(10000) | list %}" + "{% for a in l %}" * 3 + "{% endfor %}" * 3,
    "loops over text": "{% set s = 'x'.ljust(9000) %}" + "{% for a in s %}" * 3 + "{% endfor %}" * 3,
    "recursive loops": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{{ loop([x, x]) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "substrings": LONG + "{% for i in range(99999) %}{% if 'y' in s %}{% endif %}{% endfor %}",
    "tests": LONG + "{% for i in range(99999) %}{% if 'y' is in s %}{% endif %}{% endfor %}",
}


@each("template", [*MEMORY.values(), *TIME.values()], ids=[*MEMORY, *TIME])
def test_a_template_cannot_take_the_machine(template: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.4)
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QwenMLXError, match="chat template"):
        chat_template.render(template, MESSAGES)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 500e6


def test_all_renderings_of_a_slow_template_have_an_end(monkeypatch: pytest.MonkeyPatch):
    """A conversation is rendered in several ways, and each is tried."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    for seconds in ("0.1", "0.05", "0.025"):
        with pytest.raises(QwenMLXError, match=f"more than {seconds} seconds"):
            chat_template.render_normalized(TIME["macros"] + "{# a slow one #}", MESSAGES)


@each(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ m.role }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content | trim | tojson }}{% else %}none{% endfor %}",
        "{% for a, b in {'x': 1, 'y': [2, 3]}.items() %}{{ a ~ b }}{% endfor %}{{ [1, 2] + [3] }}{{ (1, 2)[::-1] }}",
        "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'eq', 'user') | list }}",
        "{{ '%s-%05d' % ('a', 3) }}{{ '{:>5}{x[a]}'.format('b', x={'a': 1}) }}{{ '%s' | format(1.5) }}",
        "{% macro m(a, b=2) %}<{{ a }}{{ b }}{{ varargs }}{{ caller() if caller }}>{% endmacro %}{{ m(1, 3, 4) }}"
        "{% call m(5) %}in{% endcall %}",
        "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = ns.i + 1 %}{{ ns.i * 2 }}{% endfor %}",
        "{% set x %}a\n  b{% endset %}{{ x | indent(3, true) }}{{ x | replace('a', 'bb') }}{{ x.split() }}",
        "{{ messages[1].content | e }}{{ '<b>' | safe }}{{ 'a' | center(7) }}{{ 'a,b'.split(',') | batch(1) | list }}",
        "{% for x in [[1, [2]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ cycler(i).next() }}{% endfor %}",
        "{{ -3 | abs }}{{ 7 // 2 }}{{ 2.5 | round(1) }}{{ '12' | int + 1 }}{{ [3, 1] | sort }}{{ [1, 2] | sum }}",
        "{{ messages is defined }}{{ x is none }}{{ 'a' in 'abc' }}{{ 1 < 2 < 3 }}{{ 'b' is in ['b'] }}",
    ],
)
def test_metering_changes_nothing_else(template: str):
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    expected = plain.from_string(template).render(messages=MESSAGES)
    assert expected
    assert chat_template.render(template, MESSAGES) == expected


def test_what_trainers_and_small_repeats_need():
    template = "{% generation %}{{ '-' * 3 }}{{ 2 * 'ab' }}{% endgeneration %}{{ [1] | tojson(separators=(',', ':')) }}"
    assert chat_template.render(template, MESSAGES) == "---abab[1]"
    for times in ("100001", "1e9 | int"):
        with pytest.raises(QwenMLXError, match="not allowed"):
            chat_template.render("{{ 'x' * (%s) }}" % times, MESSAGES)  # noqa: UP031 (braces)


@each("value", [[[] for _ in range(9)], {"a": [1, "text", {}], "b": ("c",)}, [["x"], [["y"]]]])
def test_a_value_may_weigh_what_is_left(value: object):
    meter = sandbox.Meter({}, 9)
    meter.bytes_left = weight = meter.weight(value)
    assert meter.weight(value) == weight
    meter.bytes_left -= 1
    with pytest.raises(sandbox.SecurityError, match="memory"):
        meter.weight(value)


def test_limits_grow_with_the_conversation():
    messages = [{"role": "user", "content": "word " * 500_000} for _ in range(40)]
    assert len(chat_template.render("{% for m in messages %}{{ m.content ~ '\n' }}{% endfor %}", messages)) > 100e6
