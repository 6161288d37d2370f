"""A sandbox that renders a chat template over marked texts, so that its output tells who wrote what; see taint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from jinja2 import nodes
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, Macro
from jinja2.utils import pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from .sandbox import Sandbox
from .taint import (
    CASES,
    CUTS,
    JOINS,
    ORDERS,
    VALUES,
    Fields,
    escaped,
    keyed,
    marked_items,
    plain,
    printable,
    shown,
    traced,
)

# Tests that look at a text.
COMPARING = ["==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"]
COMPARING += ["in", "lower", "upper"]


class _Tracing(NodeTransformer):
    """Lets comparisons and look-ups of a template see plain texts, and printed lists keep their marks."""

    def _wrapped(self, node: Any, name: str) -> Any:
        constant = isinstance(node, nodes.Const | nodes.TemplateData)
        return node if constant else nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        node.expr = self._wrapped(node.expr, "#plain")
        for operand in node.ops:
            operand.expr = self._wrapped(operand.expr, "#within" if operand.op in ("in", "notin") else "#plain")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = self._wrapped(node.arg, "#plain")
        return node

    def visit_Add(self, node: nodes.Add) -> Any:
        self.generic_visit(node)
        added = nodes.Filter(node.left, "#plus", [node.right], [], None, None, lineno=node.lineno)
        return self._wrapped(added, "#count")

    def _shown(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [self._wrapped(child, "#shown") for child in node.nodes]
        return node

    visit_Output = visit_Concat = _shown


def _plus(context: Context, left: Any, right: Any) -> Any:
    """The sum of two values; what is added to a text of the filter `safe` gets escaped."""
    if isinstance(left, str) and isinstance(right, str) and isinstance(left, Markup) != isinstance(right, Markup):
        left, right = (text if isinstance(text, Markup) else escaped(text) for text in (left, right))
    return left + right


def _dict(*values: Any, **named: Any) -> dict[Any, Any]:
    """Python's dict, which lists the keys marked that a user wrote."""
    result, users = keyed(dict(*values))
    named, others = keyed(named)
    return Fields(result | named) if users or others else result | named


class TracingSandbox(Sandbox):
    """A sandbox that renders marked texts as it would render plain ones."""

    def __init__(self, guard: str) -> None:
        super().__init__(guard)
        named = (*CUTS, *CASES, *ORDERS, *VALUES, "replace")
        self.filters |= {name: self._traced_filter(name) for name in named if name in self.filters}
        self.filters["format"] = self._printing(self.filters["format"])
        self.filters["groupby"] = self._grouping(self.filters["groupby"])
        names, self.globals["dict"] = cast(Any, self.globals["namespace"]), _dict
        self.globals["namespace"] = lambda *values, **named: names(keyed(dict(*values, **named))[0])
        self.filters["#plain"] = pass_context(lambda _, value: plain(value))
        self.filters["#within"] = pass_context(lambda _, value: value if isinstance(value, Fields) else plain(value))
        self.filters["#plus"] = pass_context(_plus)
        self.filters["#shown"] = pass_context(lambda _, value: shown(value))
        self.tests |= {name: self._traced_test(self.tests[name]) for name in COMPARING}

    def parse(self, source: str, *arguments: Any) -> nodes.Template:
        tree: nodes.Template = _Tracing().visit(super().parse(source, *arguments))
        return tree

    def _traced_filter(self, name: str) -> Callable[..., Any]:
        metered = self.filters[name]

        def filtered(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
            def call(text: Any, *rest: Any, **others: Any) -> Any:
                return metered(context, text, *rest, **others)

            return traced(name, call, value, arguments, named)

        return pass_context(filtered)

    @staticmethod
    def _printing(metered: Any) -> Callable[..., Any]:
        def printed(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
            named = {plain(key): printable(item) for key, item in named.items()}
            return metered(context, value, *map(printable, arguments), **named)

        return pass_context(printed)

    def _grouping(self, metered: Any) -> Callable[..., Any]:
        """The filter groupby, which compares plain texts."""

        def grouped(context: Context, value: Any, attribute: Any, default: Any = None, *more: Any, **named: Any) -> Any:
            items = list(value)
            originals, key = marked_items(items), make_attrgetter(self, plain(attribute), default=default)
            groups = metered(context, plain(items), plain(attribute), plain(default), *more, **named)
            members = [[originals[repr(item)] for item in group.list] for group in groups]
            return [type(group)(key(own[0]), own) for group, own in zip(groups, members)]

        return pass_context(grouped)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            right = tuple(map(printable, right)) if isinstance(right, tuple) else printable(right)
        return super().call_binop(context, operator, left, right)

    @staticmethod
    def _traced_test(test: Any) -> Callable[..., Any]:
        return lambda *values: test(*map(plain, values))

    def call(__self, __context: Context, __callable: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__callable, "__wrapped__", __callable)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name == "get" and isinstance(owner, dict) and args and args[0] not in owner:
            args = (plain(args[0]), *args[1:])  # a user's word among the template's own keys
        if isinstance(owner, list | tuple) and name in ("count", "index"):
            return super().call(__context, getattr(plain(owner), name), *plain(args), **kwargs)
        if isinstance(__callable, Macro):  # it lists the other names
            kwargs = {plain(k) if plain(k) in __callable.arguments else k: v for k, v in kwargs.items()}
        elif __callable is not _dict:
            kwargs = {plain(key): value for key, value in kwargs.items()}
        if isinstance(owner, str) and name in ("format", "format_map"):
            args, kwargs = tuple(map(printable, args)), {key: printable(value) for key, value in kwargs.items()}
        if not isinstance(owner, str) or name in JOINS:
            return super().call(__context, __callable, *args, **kwargs)

        def call(text: str, *rest: Any, **others: Any) -> Any:
            return super(TracingSandbox, __self).call(__context, getattr(text, name), *rest, **others)

        return traced(name, call, owner, args, kwargs)
