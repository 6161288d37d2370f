"""Small wrong changes of a source text: of Python by its syntax tree, of the kernels by what stands between spaces."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
IN_KERNELS = {
    r" < ": " <= ",
    r" \+ ": " - ",
    r" - ": " + ",
    r" \* ": " / ",
    r" == ": " != ",
    r" && ": " || ",
    r" \+= ": " -= ",
    r"(?<![\w.])\d+(?=u?\b(?!\.))": "{}1",  # another number: digits are put behind it
    r"\bmin\(": "max(",
    r"\bmax\(": "min(",
    r"\b(threadgroup|simdgroup)_barrier\(.*\);": ";",
}


class Mutant(NamedTuple):
    """A change of text[start:end] to `new`."""

    start: int
    end: int
    new: str

    def apply(self, text: str) -> str:
        """The text with the change."""
        return text[: self.start] + self.new + text[self.end :]


def statement_lines(text: str, line: int) -> set[int]:
    """The lines of the Python statement around a line, without the statements within it."""
    within = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno <= line]
    around = [node for node in within if line <= (node.end_lineno or 0)]
    if not around:
        return {line}
    node = min(around, key=lambda node: (node.end_lineno or 0) - node.lineno)
    body: list[ast.stmt] = getattr(node, "body", [])
    return {line, *range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1)}


def of_kernel(text: str) -> list[Mutant]:
    """The mutants of a Metal source, outside of comments and preprocessor lines."""
    code = re.sub(r"//.*|^ *#.*|/\*.*?\*/|template <.*>", lambda match: "\0" * len(match[0]), text, flags=re.M)
    found = (
        Mutant(m.start(), m.end(), new.format(m[0])) for old, new in IN_KERNELS.items() for m in re.finditer(old, code)
    )
    return sorted(found)


def of_python(text: str) -> list[Mutant]:
    """The mutants of a Python source: operators, numbers, conditions and calls, but for annotations and messages."""
    starts = list(itertools.accumulate((len(line) + 1 for line in text.split("\n")), initial=0))

    def place(line: int, column: int) -> int:
        text_line = text[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text_line.encode()[:column].decode())

    def begin(node: ast.expr | ast.stmt) -> int:
        return place(node.lineno, node.col_offset)

    def end(node: ast.expr | ast.stmt) -> int:
        return place(node.end_lineno or 0, node.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Mutant]:
        start = text.find(old, end(left), begin(right))
        if start >= 0:
            yield Mutant(start, start + len(old), new)

    def of(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                yield from between(left, right, *COMPARISONS[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            yield from between(node.left, node.right, *ARITHMETIC[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            words = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in itertools.pairwise(node.values):
                yield from between(left, right, *words)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield Mutant(begin(node), begin(node) + (3 if isinstance(node.op, ast.Not) else 1), "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield Mutant(begin(node), end(node), str(not node.value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            yield Mutant(begin(node), end(node), repr(node.value + 1))
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Mutant(begin(node.test), end(node.test), f"not ({text[begin(node.test) : end(node.test)]})")
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in NAMES:
                yield Mutant(end(node) - len(name), end(node), NAMES[name])
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield Mutant(begin(node), end(node), "pass")

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        yield from of(node)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "bases"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from walk(child)

    return sorted(set(walk(ast.parse(text))))
