"""Jinja for templates that nobody has read: what one computes is metered, so that neither its time nor its memory grows
without end.

A template's syntax tree is changed before it is compiled: what loops, outputs, joins or makes a value goes through a
filter that counts it. Filters and methods whose result can be much larger than what they are given are counted before
they run. Names that begin with "#" cannot be written in a template.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import math
import re
import sys
import time
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

from jinja2 import nodes, parser
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

LONGEST_SOURCE = 100_000  # characters; the longest templates of models have 30,000
SECONDS = 2.0  # of a thread's processor time; after a rendering that took longer half as much
BYTES = 256 << 20  # of all values that a rendering makes, and of one
VALUE_BYTES = 32 << 20
WRITTEN_TERMS = 4  # values that are added and written at once without being counted
LONGEST_REPEAT = 100_000  # characters of a text times a number
STEPS = 1_000_000  # of all ranges
CHARACTER = 80  # bytes of a character as a string of its own
NUMBERS = (int, float, type(None))
VIEWS = (type(dict[str, str]().keys()), type(dict[str, str]().values()), type(dict[str, str]().items()))
SMALL = frozenset([bool, type(None), *VIEWS])  # that need no counting
METHOD_TYPES = (types.BuiltinMethodType, types.MethodType, types.MethodWrapperType)
# Tests that look at a value's type alone.
CHEAP_TESTS = ["boolean", "callable", "defined", "even", "false", "float", "integer", "iterable", "mapping", "none"]
CHEAP_TESTS += ["number", "odd", "sequence", "string", "true", "undefined"]
LISTING = ("groupby", "list", "sort")  # filters that list the characters of a string

FILTERS = """
    abs attr batch capitalize center count d default dictsort e escape filesizeformat first float format groupby
    indent int items join last length list lower map max min random reject rejectattr replace reverse round safe
    select selectattr slice sort string sum title trim truncate unique upper urlencode wordcount
""".split()  # noqa: SIM905 (fifty lines otherwise)
STRING_METHODS = """
    capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip
    partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper zfill
""".split()  # noqa: SIM905
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(STRING_METHODS),
    dict: frozenset(["copy", "get", "items", "keys", "values"]),
    list: frozenset(["copy", "count", "index"]),
    tuple: frozenset(["count", "index"]),
}


class TooSlow(SecurityError):
    """The rendering took too long."""


class Meter:
    """Counts what one rendering costs. Raises SecurityError beyond the limits, which grow with the input."""

    def __init__(self, variables: Mapping[str, Any], seconds: float):
        self.bytes_left = self.value_bytes = sys.maxsize
        self._known: dict[int, int] = {}  # by id: given values live as long as the rendering
        for value in variables.values():
            if isinstance(value, list):
                self._known |= {id(item): self.weight(item) for item in value if isinstance(item, dict)}
        given = self.weight(list(variables.values()))
        self.bytes_left, self.value_bytes = BYTES + 64 * given, VALUE_BYTES + 8 * given
        self.steps_left = STEPS
        self.seconds = seconds
        self._end = time.thread_time() + seconds
        self._next_look = time.monotonic() + seconds
        self._unchecked = 0

    def tick(self, cost: int = 0) -> None:
        """Counts an operation on `cost` bytes, and now and then looks at the clock."""
        self._unchecked += 4096 + cost
        if self._unchecked > 1 << 18:
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        """Asks for the processor's time, a call of the system, only after as much time on the wall."""
        self._unchecked = 0
        if (now := time.monotonic()) > self._next_look:
            left = self._end - time.thread_time()
            if left < 0:
                raise TooSlow(f"it computes for more than {self.seconds:g} seconds")
            self._next_look = now + left

    def charge(self, size: int) -> None:
        """Counts `size` bytes of one value."""
        self._unchecked += 4096 + size  # as tick(), whose call would be felt: this runs some ten times a message
        if self._unchecked > 1 << 18:
            self._look_at_the_clock()
        self.bytes_left -= size
        if size > self.value_bytes or self.bytes_left < 0:
            raise SecurityError("it needs too much memory")

    def weight(self, value: Any) -> int:
        """The bytes of a value with all that it holds, as often as it holds it. Raises SecurityError once they are more
        than there are left."""
        if isinstance(value, str):
            return sys.getsizeof(value)
        total, waiting = 0, [value]
        while waiting:
            value = waiting.pop()
            if known := self._known.get(id(value)):
                total += known
                continue
            total += 64
            if isinstance(value, str):
                total += sys.getsizeof(value)
            elif isinstance(value, list | tuple):
                total += 40 * len(value)
                waiting += [item for item in value if not isinstance(item, NUMBERS)]
            elif isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 (the second is slow)
                total += 100 * len(value)
                waiting += value.keys()
                waiting += value.values()
            if total + 64 * len(waiting) > self.bytes_left:
                raise SecurityError("it needs too much memory")
        return total

    def count(self, value: Any) -> Any:
        """`value`, counted; the items of an iterator as they come."""
        if isinstance(value, str):
            self.charge(sys.getsizeof(value))
        elif type(value) in SMALL:
            self.tick()
        elif isinstance(value, list | tuple | dict):
            self.charge(self.weight(value))
        elif isinstance(value, NUMBERS):
            self.tick()
            if isinstance(value, int) and value.bit_length() > 64:
                raise SecurityError("a number of more than 64 bits is not allowed")
        elif isinstance(value, Iterator):
            return self._counted(value)
        else:
            self.tick()
        return value

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            yield self.count(item)

    def items(self, value: Any) -> Any:
        """`value`, whose items are about to be listed."""
        if isinstance(value, str):
            self.charge(CHARACTER * len(value))
        return value

    def loop(self, items: Any) -> Iterator[Any]:
        """Yields the items, each of them a step. Jinja lists them where a loop asks for its length."""
        for item in self.items(items):
            self._unchecked += 4096  # as tick(), whose call would be felt
            if self._unchecked > 1 << 18:
                self._look_at_the_clock()
            yield item

    def range(self, *limits: int) -> range:
        """Python's range, which refuses endless loops."""
        numbers = range(*limits)
        self.steps_left -= len(numbers)
        if self.steps_left < 0:
            raise SecurityError(f"loops of more than {STEPS:,} steps are not allowed")
        return numbers

    def numbers(self, template: str, sign: str, values: Any) -> None:
        """Counts what a format string makes of `values` at most: every field all of them, at the largest width."""
        widths = [int(digits[:12]) for digits in re.findall(r"\d+", template)]
        given = list(values.values()) if isinstance(values, Mapping) else values
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, int):  # a width may come from there
                widths.append(abs(value) if "*" in template or "{" in template else 0)
        fields = template.count(sign)
        self.charge(fields * (self.weight(given) + max(widths, default=0)))


def _text_size(value: Any) -> int:
    return len(value) if isinstance(value, str) else len(str(value))


_meter: contextvars.ContextVar[Meter] = contextvars.ContextVar("the meter of the rendering that is under way")


class _Growth:
    """Counts, before they run, filters and methods of strings whose result may be much larger than what they get.

    Each takes their arguments by their names. It returns the value to go on with.
    """

    @staticmethod
    def center(meter: Meter, value: Any, width: float = 80, fillchar: str = " ") -> Any:
        meter.charge(4 * math.ceil(width))
        return value

    ljust = rjust = zfill = center

    @staticmethod
    def expandtabs(meter: Meter, value: str, tabsize: int = 8) -> Any:
        meter.charge(value.count("\t") * abs(tabsize))
        return value

    @staticmethod
    def indent(meter: Meter, s: Any, width: float | str = 4, first: bool = False, blank: bool = False) -> Any:
        text = s if isinstance(s, str) else str(s)
        size = len(width) if isinstance(width, str) else math.ceil(width)
        meter.charge(4 * size * (len(text.splitlines()) + 1) + CHARACTER * text.count("\n"))
        return text

    @staticmethod
    def replace(meter: Meter, s: Any, old: Any, new: Any, count: Any = None) -> Any:
        text = s if isinstance(s, str) else str(s)
        meter.charge(text.count(old if isinstance(old, str) else str(old)) * 4 * _text_size(new))
        return text

    @staticmethod
    def join(meter: Meter, value: Any, d: Any = "", attribute: Any = None) -> Any:
        items = list(meter.loop(value))
        meter.charge(len(items) * 4 * _text_size(d))
        return items

    @staticmethod
    def split(meter: Meter, value: str, sep: str | None = None, maxsplit: int = -1) -> Any:
        meter.charge(CHARACTER * (value.count(sep) + 1 if sep else len(value) // 2 + 1))
        return value

    rsplit = split

    @staticmethod
    def splitlines(meter: Meter, value: str, keepends: bool = False) -> Any:
        meter.charge(CHARACTER * (len(value) // 2 + 1))
        return value

    @staticmethod
    def batch(meter: Meter, value: Any, linecount: float, fill_with: Any = None) -> Any:
        meter.charge(8 * math.ceil(abs(linecount)))
        return meter.items(value)

    @staticmethod
    def slice(meter: Meter, value: Any, slices: float, fill_with: Any = None) -> Any:
        meter.charge(100 * math.ceil(abs(slices)))
        return meter.items(value)

    @staticmethod
    def format(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter.numbers(str(value), "%", [*args, *kwargs.values()])
        return value

    @staticmethod
    def int(meter: Meter, value: Any, default: Any = 0, base: Any = 10) -> Any:
        if isinstance(value, str) and len(value) > 4300:  # Python's own limit, which early versions lack
            raise SecurityError(f"a number of {len(value)} digits is not allowed")
        return value

    @staticmethod
    def round(meter: Meter, value: Any, precision: float = 0, method: str = "common") -> Any:
        if abs(precision) > 1000:
            raise SecurityError(f"rounding to {precision} digits is not allowed")
        return value

    @staticmethod
    def sum(meter: Meter, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise SecurityError(f"a sum of {type(start).__name__} is not allowed")
        return iterable


class _Metering(NodeTransformer):
    """Puts counting filters into a template's syntax tree."""

    _buffers = 0  # around the node: what collects its output in a string

    def _wrapped(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _refused(self, node: nodes.Node) -> nodes.Node:
        raise SecurityError(f"{type(node).__name__.lower()} is not allowed")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_ScopedEvalContextModifier = _refused

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._wrapped(node.iter, "#loop")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        node.nodes = [self._written(child) for child in node.nodes]
        if self._buffers:  # other outputs are counted as they leave the template
            node.nodes = [self._wrapped(self._constant(child), "#output") for child in node.nodes]
        return node

    def _written(self, node: nodes.Expr) -> nodes.Expr:
        """An expression whose text is counted as it is written, so that a short sum in it need not be."""
        terms = self._terms(node)
        if sum(not isinstance(term, nodes.Const) for term in terms) > WRITTEN_TERMS:
            return cast(nodes.Expr, self.visit(node))
        terms = [self.visit(term) for term in terms]
        return functools.reduce(lambda left, right: nodes.Add(left, right, lineno=right.lineno), terms)

    def _terms(self, node: nodes.Expr) -> list[nodes.Expr]:
        """The terms of `a + b + c`."""
        terms = []
        while isinstance(node, nodes.Add):
            terms.append(node.right)
            node = node.left
        return [node, *reversed(terms)]

    def _constant(self, node: nodes.Expr) -> nodes.Expr:
        return nodes.Const(node.data, lineno=node.lineno) if isinstance(node, nodes.TemplateData) else node

    def _buffered(self, node: Any) -> nodes.Node:
        self._buffers += 1
        self.generic_visit(node)
        self._buffers -= 1
        return cast(nodes.Node, node)

    visit_Macro = visit_CallBlock = visit_FilterBlock = visit_AssignBlock = _buffered

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._wrapped(node, "#count")

    visit_List = visit_Dict = _made

    def visit_Tuple(self, node: nodes.Tuple) -> Any:
        return self._made(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        return self._made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._wrapped(nodes.List(node.nodes, lineno=node.lineno), "#concat")

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        """Adds all of `a + b + c` in one call."""
        terms = [self.visit(term) for term in self._terms(node)]
        return nodes.Filter(terms[0], "#add", terms[1:], [], None, None, lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int) and node.value.bit_length() > 64:
            raise SecurityError("a number of more than 64 bits is not allowed")
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        constant = isinstance(node.expr, nodes.Const)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const) and (not constant or operand.op in ("in", "notin")):
                operand.expr = self._wrapped(operand.expr, "#tick")
        return node

    def _called(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node, nodes.Test) and node.name not in CHEAP_TESTS:
            node.node = self._wrapped(node.node, "#tick")
        if node.dyn_args is not None:
            node.dyn_args = self._wrapped(node.dyn_args, "#items")
        return cast(nodes.Node, node)

    visit_Call = visit_Filter = visit_Test = _called


class _Names(Namespace):
    """A namespace that is not printed with all that it holds."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares a set)

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates, with the names that transformers gives them. `render` meters what they do.

    guard: a character that tojson never escapes.
    """

    #: The operators whose results can be much larger than what they are given.
    intercepted_binops = frozenset(["*", "**", "-", "%"])

    def __init__(self, guard: str) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._plain = ImmutableSandboxedEnvironment()
        self._plain.filters["tojson"] = _tojson(guard)
        self.filters = {name: self._metered(name) for name in [*FILTERS, "tojson"]}
        self.filters |= {
            "#loop": pass_context(lambda context, value: _meter.get().loop(value)),
            "#count": pass_context(lambda context, value: _meter.get().count(value)),
            "#items": pass_context(lambda context, value: _meter.get().items(value)),
            "#output": pass_context(_output),
            "#concat": pass_context(_concat),
            "#add": pass_context(_add),
            "#tick": pass_context(_tick),
        }
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Names, range=_range)

    def render(self, template: Any, **variables: Any) -> str:
        """The text that a template of `template()` makes. Raises SecurityError if it costs too much, and whatever
        else the template raises."""
        timeouts = getattr(template, "timeouts", 0)
        meter = Meter(variables, SECONDS / 2**timeouts)
        token = _meter.set(meter)
        try:
            pieces, size = [], 0
            sizeof = sys.getsizeof
            for piece in template.root_render_func(template.new_context(variables)):
                size += sizeof(piece)
                if size > 1 << 16:
                    meter.charge(size)
                    size = 0
                pieces.append(piece)
            return "".join(pieces)
        except TooSlow:
            template.timeouts = timeouts + 1  # a conversation is rendered in several ways: all together have an end
            raise
        finally:
            _meter.reset(token)

    def template(self, source: str) -> Any:
        """Compiles a template. Raises TemplateError if it is none, or is too long."""
        if len(source) > LONGEST_SOURCE:
            raise SecurityError(f"it has {len(source):,} characters, more than {LONGEST_SOURCE:,}")
        return self.from_string(_Metering().visit(self.parse(source)))

    def _metered(self, name: str) -> Callable[..., Any]:
        """A filter of Jinja's, counted. Jinja does not compute it while it compiles, since it needs a context."""
        growth = getattr(_Growth, name, None)
        lists = name in LISTING
        function = self._plain.filters[name]

        def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            meter = _meter.get()
            if growth is not None:
                value = growth(meter, value, *args, **kwargs)
            elif lists:
                meter.items(value)
            return meter.count(self._plain.call_filter(name, value, args, kwargs, context))

        def simple(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            return _meter.get().count(function(value, *args, **kwargs))

        return pass_context(metered if growth or lists or hasattr(function, "jinja_pass_arg") else simple)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = _meter.get()
        if operator in ("*", "**"):
            numbers = all(isinstance(x, int | float) and abs(x) < 1e6 for x in (left, right))
            text, times = (left, right) if isinstance(left, str) else (right, left)
            repeated = isinstance(text, str) and isinstance(times, int) and len(text) * times <= LONGEST_REPEAT
            if operator == "**" or not (numbers or repeated):
                raise SecurityError(f"{operator} of {type(left).__name__} is not allowed")
        elif operator == "%" and isinstance(left, str):
            meter.numbers(left, "%", right)
        return meter.count(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __callable: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()
        method: Any = __callable if type(__callable) in METHOD_TYPES else getattr(__callable, "__wrapped__", None)
        if type(method) in METHOD_TYPES:  # Jinja wraps str.format
            owner, name = method.__self__, method.__name__
            kind: Any = type(owner)
            if not _allowed(kind, name):
                raise SecurityError(f"{name} of {kind.__name__} is not allowed")
            if isinstance(owner, str):
                args = _before_method(meter, owner, name, args, kwargs)
            if method is __callable and kind in METHODS:  # as Jinja would, after more questions
                kwargs.pop("_block_vars", None)
                kwargs.pop("_loop_vars", None)
                return meter.count(method(*args, **kwargs))
        return meter.count(super().call(__context, __callable, *args, **kwargs))


@functools.lru_cache(maxsize=1000)
def _allowed(kind: type, name: str) -> bool:
    """True for a method of the package's or Jinja's own objects, and for those of METHODS."""
    names = next((names for known, names in METHODS.items() if issubclass(kind, known)), None)
    return name in names if names is not None else kind.__module__ != "builtins"


def _before_method(
    meter: Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Counts what a method of a string may make; its arguments, listed where they are an iterator."""
    if name == "join":
        items = list(meter.loop(*args))
        meter.charge(len(items) * sys.getsizeof(text))
        return (items,)
    if name in ("format", "format_map"):
        meter.numbers(text, "{", [*args, *kwargs.values()])
    elif hasattr(_Growth, name):
        named = {key: value for key, value in kwargs.items() if not key.startswith("_")}  # Jinja adds its own
        getattr(_Growth, name)(meter, text, *args, **named)
    return args


def _output(context: Context, value: Any) -> str:
    meter = _meter.get()
    text = value if isinstance(value, str) else str(value)
    meter.charge(sys.getsizeof(text))
    return text


def _concat(context: Context, values: Collection[Any]) -> str:
    texts = [value if isinstance(value, str) else str(value) for value in values]
    _meter.get().charge(sum(map(sys.getsizeof, texts)))
    return "".join(texts)


def _add(context: Context, *terms: Any) -> Any:
    meter = _meter.get()
    if set(map(type, terms)) == {str}:
        meter.charge(sum(map(sys.getsizeof, terms)))
        return "".join(terms)
    return functools.reduce(lambda left, right: meter.count(left + right), terms)


def _tick(context: Context, value: Any) -> Any:
    _meter.get().tick(len(value) if isinstance(value, str | list | tuple) else 0)
    return value


def _range(*limits: int) -> range:
    return _meter.get().range(*limits)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    if len(form) > 100:
        raise SecurityError("a format of a date with more than 100 characters is not allowed")
    return datetime.datetime.now().strftime(form)


def _tojson(guard: str) -> Callable[..., str]:
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if any((len(text) if isinstance(text, str) else text) > 16 for text in (indent or 0, *(separators or ()))):
            raise SecurityError("an indent or a separator of more than 16 characters is not allowed")
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        # The guard stays one character: an escape of it would be read as text.
        escaped = re.escape(json.dumps(guard)[1:-1])
        return re.sub(rf"(?<!\\)((?:\\\\)*){escaped}", rf"\g<1>{guard}", text) if ensure_ascii else text

    return tojson
