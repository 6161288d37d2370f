"""Finds, without Metal's compiler, what it would refuse.

clang parses the text as C++ for OpenCL, whose address spaces and restrictions are Metal's and whose errors it words
alike; rules on the syntax tree and on the words add what the two languages differ in.
"""

from __future__ import annotations

import atexit
import functools
import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidLaunch, Unavailable
from .source import ATTRIBUTES, LINE, line_files, preamble
from .translate import is_code, tokenize

if TYPE_CHECKING:
    from clang.cindex import Cursor, Index, TranslationUnit

_PARTS = ("header", "body")
SOURCE = re.compile(
    r"\A(?P<header>.*?)(?:template <(?P<template>[^<>]*)>\n)?\[\[kernel\]\] void (?P<name>[^\n]*)\(\n"
    r"(?P<parameters>.*?)\) \{\n(?P<body>.*)\n\}\n(?:\ntemplate \[\[host_name[^\n]*<(?P<values>[^\n<>]*)>;\n)?\Z",
    re.DOTALL,
)
_ARGUMENTS = (
    *(
        "-x",
        "clcpp",
        "-cl-std=clc++2021",
        "-target",
        "x86_64-linux-gnu",
        "-cl-no-stdinc",
        "-cl-single-precision-constant",
    ),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"),
    *("-ferror-limit=0", "-Wno-everything", "-fno-exceptions"),
)
_SPACES = {"__global": "device", "__local": "threadgroup", "__constant": "constant", "__private": "thread"}
_UNSUFFIXED = re.compile(r"(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?|0[xX][0-9a-fA-F.]+[pP][+-]?\d+")
_VECTOR_IN_METAL = re.compile(r"\bmetal::(?=(?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]\b)")
_MACRO = re.compile(r"__[A-Z][A-Z_]*__")


@dataclass(frozen=True)
class Finding:
    """One finding. rule: language (clang's own), or the name of a rule of this file; part: header, body, or the file
    that a #line of the text names."""

    rule: str
    part: str
    line: int
    message: str

    @property
    def only_cuda(self) -> bool:
        """True if Metal accepts it and only the same body as CUDA would be wrong."""
        return self.rule == "literal"

    def __str__(self) -> str:
        return f"{self.part} line {self.line}: {self.message} [{self.rule}]"


def lint(text: str) -> list[Finding]:
    """The findings of a kernel's text as metal_source returns it (with or without the preamble), by part and line.

    Raises InvalidLaunch if the text is not of that form and Unavailable without libclang.
    """
    match = SOURCE.match(text.removeprefix(preamble()))
    if not match:
        raise InvalidLaunch("The text is not one kernel as MLX writes it: header, signature, body. See metal_source.")
    unit = parse(_translation_unit(match), "kernel.clcpp", _ARGUMENTS)
    files = (*_PARTS, *line_files(text))
    found = [*_diagnostics(unit, files), *_tree_rules(unit, files)]
    for part in _PARTS:
        found += _token_rules(part, match[part])
    return sorted(set(found), key=lambda f: (files.index(f.part), f.line, f.rule, f.message))


# The text for clang


def _translation_unit(match: re.Match[str]) -> str:
    """The kernel without parameters: template values and arguments are local, as OpenCL's kernels take fewer types."""
    prototypes, locals_ = [], []
    names = [item.split() for item in (match["template"] or "").split(", ") if item]
    for (kind, name), value in zip(names, (match["values"] or "").split(", ")):
        locals_.append(f"typedef {value} {name};" if kind == "typename" else f"constexpr {kind} {name} = {value};")
    for parameter in re.split(r",\n|\) \{\n", match["parameters"]):
        kind, name = parameter.split(" [[")[0].strip().rsplit(" ", 1)
        reference = kind.endswith("&")
        kind = kind.removesuffix("&") + "*" * reference
        prototypes.append(f"{kind} lint_argument_{name}();")
        if name in ATTRIBUTES:
            locals_.append(f"{kind} {name} = lint_argument_{name}();")
        elif reference:
            locals_.append(f"{kind.removesuffix('*')}& {name} = *lint_argument_{name}();")
        else:
            locals_.append(f"{kind} {name} = lint_argument_{name}();")
    standard = (Path(__file__).parent / "shim" / "lint.h").read_text()
    # Vector types are global in lint.h, and what makes them is a macro.
    in_header, in_body = (_VECTOR_IN_METAL.sub("", match[part]) for part in _PARTS)
    includes = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>", re.MULTILINE)
    before = includes.sub("", preamble())
    header = includes.sub("", in_header)
    return (
        f'#line 1 "lint.h"\n{standard}\n#line 1 "preamble"\n{before}\n#line 1 "header"\n{header}\n'
        f'#line 1 "arguments"\n{" ".join(prototypes)}\n__kernel void lint_kernel() {{\n{" ".join(locals_)}\n'
        f'#line 1 "body"\n{in_body}\n}}\n'
    )


@functools.cache
def _index() -> Index:
    try:
        from clang.cindex import Index
    except ImportError as error:
        raise Unavailable("The lint needs libclang: `pip install libclang`.") from error
    atexit.register(_release)
    return Index.create()


def _release() -> None:
    """Frees libclang's objects before the interpreter clears the module that their destructors call."""
    _index.cache_clear()
    gc.collect()


def parse(text: str, name: str, arguments: Sequence[str]) -> TranslationUnit:
    """libclang's reading of a text, as a file of this name."""
    # Without detailed preprocessing, which would cost memory for what no rule reads.
    return _index().parse(name, list(arguments), unsaved_files=[(name, text)])


# Clang's own errors


def place(location, files: Sequence[str]) -> tuple[str, int]:
    """File and line as #line says, ("", 0) outside of the kernel's text."""
    part, line = _presumed(location)
    return (part, line) if part in files else ("", 0)


def _presumed(location) -> tuple[str, int]:
    import ctypes

    from clang.cindex import _CXString, conf

    name, line, column = _CXString(), ctypes.c_uint(), ctypes.c_uint()
    conf.lib.clang_getPresumedLocation(location, ctypes.byref(name), ctypes.byref(line), ctypes.byref(column))
    return conf.lib.clang_getCString(name) or "", line.value


def _in_metal(message: str) -> str:
    for opencl, metal in _SPACES.items():
        message = message.replace(opencl, metal)
    return message.replace("__bf16", "bfloat")


def _diagnostics(unit: TranslationUnit, files: Sequence[str]) -> Iterator[Finding]:
    for diagnostic in unit.diagnostics:
        if diagnostic.severity < 3:
            continue
        part, line = place(diagnostic.location, files)
        if not part:  # an error within a macro or template of the preamble, made by a use in the kernel, is at the use
            continue
        yield Finding("language", part, line, _in_metal(diagnostic.spelling))


# Rules on the syntax tree


def _tree_rules(unit: TranslationUnit, files: Sequence[str]) -> Iterator[Finding]:
    from clang.cindex import CursorKind as K

    calls: dict[str, set[str]] = {}
    places: dict[str, tuple[str, int, str]] = {}
    # Each cursor with its parent and what the functions around it call.
    left: list[tuple[Cursor, Cursor | None, tuple[set[str], ...]]]
    left = [(top, None, ()) for top in _own(unit.cursor, files)]
    while left:
        cursor, parent, around = left.pop()
        (part, line), kind = place(cursor.location, files), cursor.kind
        if part and kind in (K.FUNCTION_DECL, K.FUNCTION_TEMPLATE, K.CXX_METHOD) and cursor.is_definition():
            name = cursor.get_usr()
            places[name], calls[name] = (part, line, cursor.spelling), set()
            around = (*around, calls[name])
        if around and kind in (K.CALL_EXPR, K.DECL_REF_EXPR, K.OVERLOADED_DECL_REF):
            called = _only(cursor) if kind == K.OVERLOADED_DECL_REF else cursor.referenced
            for names in around if called is not None else ():
                names.add(called.get_usr())
        children = list(cursor.get_children())
        left += [(child, cursor, around) for child in children]
        for rule, message in _rules(cursor, parent, children) if part else ():
            yield Finding(rule, part, line, message)
    for function, (part, line, name) in places.items():
        if function in _reachable(calls, function):
            yield Finding("recursion", part, line, f"{name} calls itself; Metal has no recursion")


def _rules(cursor: Cursor, parent: Cursor | None, children: Sequence[Cursor]) -> Iterator[tuple[str, str]]:
    from clang.cindex import CursorKind as K
    from clang.cindex import TypeKind

    kind = cursor.kind
    if kind == K.LAMBDA_EXPR:
        yield "lambda", "a lambda; Metal has none"
    elif kind in (K.GOTO_STMT, K.INDIRECT_GOTO_STMT):
        yield "goto", "goto; Metal has none"
    casts = (K.CSTYLE_CAST_EXPR, K.CXX_FUNCTIONAL_CAST_EXPR, K.CXX_STATIC_CAST_EXPR, K.CXX_REINTERPRET_CAST_EXPR)
    written = (K.VAR_DECL, K.PARM_DECL, K.FIELD_DECL, K.TYPEDEF_DECL, K.TYPE_ALIAS_DECL, K.CXX_CONST_CAST_EXPR, *casts)
    if kind in written or kind in (K.FUNCTION_DECL, K.FUNCTION_TEMPLATE, K.CXX_METHOD):
        kind_of = cursor.result_type if kind in (K.FUNCTION_DECL, K.FUNCTION_TEMPLATE, K.CXX_METHOD) else cursor.type
        pointers = (TypeKind.POINTER, TypeKind.LVALUEREFERENCE, TypeKind.RVALUEREFERENCE)
        target = kind_of.get_pointee() if kind_of.kind in pointers else None
        if target is not None and "__generic" in target.spelling:
            what = "pointer" if kind_of.kind == TypeKind.POINTER else "reference"
            yield (
                "address-space",
                f"{what} {_in_metal(kind_of.spelling.replace('__generic ', ''))} names no address space",
            )
    if kind == K.UNEXPOSED_EXPR and len(children) == 1 and (parent is None or parent.kind not in casts):
        types = _scalar(cursor), _scalar(children[0])
        if types in (("bfloat", "float"), ("bfloat", "half")):
            yield "bfloat-conversion", f"{types[1]} becomes bfloat without a cast"
    if kind == K.COMPOUND_ASSIGNMENT_OPERATOR:
        left, right = (_scalar(_bare(c)) for c in children[:2])
        if left == "bfloat" and right in ("float", "half"):
            yield "bfloat-conversion", f"{right} becomes bfloat without a cast"
    if kind == K.BINARY_OPERATOR:
        operands = {_scalar(_bare(c)) for c in children}
        if operands == {"bfloat", "half"}:
            yield "bfloat-half", "bfloat and half have no common type"
    if kind == K.CONDITIONAL_OPERATOR:
        operands = {_scalar(_bare(c)) for c in children[1:]}
        if "bfloat" in operands and operands & {"float", "half"}:
            yield "bfloat-conditional", "`? :` between bfloat and another floating type: cast one of them"


def _scalar(cursor: Cursor) -> str:
    """float, half or bfloat for an expression of that type; otherwise another name, which no rule looks for."""
    spelling = cursor.type.get_canonical().spelling
    words = [word for word in spelling.split() if word not in ("const", "volatile", *_SPACES)]
    return {"__bf16": "bfloat", "_Float16": "half"}.get(" ".join(words), " ".join(words))


def _bare(cursor: Cursor) -> Cursor:
    """The expression inside parentheses and conversions that nobody wrote."""
    from clang.cindex import CursorKind as K

    children = list(cursor.get_children())
    while cursor.kind in (K.UNEXPOSED_EXPR, K.PAREN_EXPR) and len(children) == 1:
        cursor = children[0]
        children = list(cursor.get_children())
    return cursor


def _own(cursor: Cursor, files: Sequence[str]) -> Iterator[Cursor]:
    """The declarations of the kernel's header, and the kernel."""
    for child in cursor.get_children():
        if _presumed(child.location)[0] in (*files, "arguments"):
            yield child


def _only(reference: Cursor) -> Cursor | None:
    """The declaration that a name in a template refers to, if there is one candidate."""
    from clang.cindex import conf

    if conf.lib.clang_getNumOverloadedDecls(reference) != 1:
        return None
    return conf.lib.clang_getOverloadedDecl(reference, 0)


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = list(calls.get(start, ()))
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += calls.get(name, ())
    return seen


# Rules on the words


def _token_rules(part: str, text: str) -> Iterator[Finding]:
    line = 1
    for token in tokenize(text):
        if not token.isascii():
            yield Finding("ascii", part, line, "a character outside of ASCII")
        if is_code(token):
            if _UNSUFFIXED.fullmatch(token):
                yield Finding("literal", part, line, f"{token} has no suffix, and is a double in CUDA: write {token}f")
            if token.startswith("__") and not _MACRO.fullmatch(token):
                yield Finding("reserved-name", part, line, f"{token}: names that start with __ are the compiler's")
        elif match := LINE.match(token):
            part, line = match[2], int(match[1]) - 1
        line += token.count("\n")
