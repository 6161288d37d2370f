"""A second reading of a kernel: plain C++14, Metal 3's base language, pedantically, with each address space apart.

The lint reads C++ for OpenCL, whose generic pointers may hide a change of address space, and a newer C++. Here device,
constant and threadgroup are clang's address spaces 1 to 3, and nothing converts between them. What a shipped kernel may
not do besides: call a function that is fast rather than accurate by its plain name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .errors import InvalidLaunch
from .lint import SOURCE, Finding, parse, place
from .source import LINE, line_files, preamble
from .translate import is_code, tokenize

_ARGUMENTS = (
    *("-x", "c++", "-std=c++14", "-pedantic-errors", "-nostdinc", "-target", "x86_64-linux-gnu", "-msse2"),
    *("-ferror-limit=0", "-Wno-everything", "-Werror=c++17-extensions", "-Werror=c++20-extensions"),
)
# Metal constructs, copies and assigns structs in any address space; MLX's own arg_reduce.metal relies on it.
_STRUCTS = re.compile(
    r"no matching constructor for initialization of|no viable overloaded '='|no matching conversion for"
    r"|no viable conversion"
)
# Functions whose plain names mean the fast ones on macOS 15 and newer, where MLX asks for safe mathematics: it does not
# set Metal's mathFloatingPointFunctions.
_ANGLES = {f"{arc}{name}{kind}" for arc in ("", "a") for name in ("sin", "cos", "tan") for kind in ("", "h", "pi")}
_POWERS = {"exp", "exp10", "exp2", "fmod", "log", "log10", "log2", "pow", "powr", "rsqrt", "sqrt"}
_FAST = _ANGLES | _POWERS | {"atan2", "sincos"}
_SPACES = {"1": "device", "2": "constant", "3": "threadgroup"}


def strict(text: str) -> list[Finding]:
    """The findings of a kernel's text as metal_source returns it, by part and line.

    Raises InvalidLaunch if the text is not of that form and Unavailable without libclang.
    """
    match = SOURCE.match(text.removeprefix(preamble()))
    if not match:
        raise InvalidLaunch("The text is not one kernel as MLX writes it: header, signature, body. See metal_source.")
    files = ("header", "body", *line_files(text))
    found = {finding for part in ("header", "body") for finding in _fast_functions(part, match[part])}
    for diagnostic in parse(_unit(match), "kernel.cpp", _ARGUMENTS).diagnostics:
        part, line = place(diagnostic.location, files)
        if diagnostic.severity >= 3 and part and not _STRUCTS.match(diagnostic.spelling):
            words = re.sub(r"__attribute__\(\(address_space\((\d)\)\)\)", lambda m: _SPACES[m[1]], diagnostic.spelling)
            found.add(Finding("strict", part, line, words))
    return sorted(found, key=lambda f: (files.index(f.part), f.line, f.message))


def _fast_functions(part: str, text: str) -> Iterator[Finding]:
    line, before = 1, ["", ""]  # the two pieces of code before this one
    for token in tokenize(text):
        if is_code(token):
            if before[1] == "::" and before[0] in ("metal", "fast") and token in _FAST:
                yield Finding(
                    "fast-function", part, line, f"{token} may be the fast one: write metal::precise::{token}"
                )
            before = [before[1], token]
        elif match := LINE.match(token):
            part, line = match[2], int(match[1]) - 1
        line += token.count("\n")


def _unit(match: re.Match[str]) -> str:
    """The kernel as a template of C++, and its instantiation."""
    parameters = [
        re.sub(r" \[\[\w+(\(\d+\))?\]\]", "", part).strip() for part in re.split(r",\n|\) \{\n", match["parameters"])
    ]
    head = f"template <{match['template']}>\n" if match["template"] else ""
    # Threadgroup memory is a static variable of its address space, wherever a line declares it.
    body = re.sub(r"^([ \t]*)threadgroup (?=[^;()]*\[)", r"\1static threadgroup ", match["body"], flags=re.MULTILINE)
    kinds = ", ".join(part.rsplit(" ", 1)[0] for part in parameters)
    values = f"template void kernel_of<{match['values']}>({kinds});" if match["template"] else ""
    shim = (Path(__file__).parent / "shim" / "strict.h").read_text()
    return (
        f'#line 1 "strict.h"\n{shim}\n#line 1 "header"\n{match["header"]}\n#line 1 "signature"\n{head}void kernel_of('
        f'{", ".join(parameters)}) {{\n#line 1 "body"\n{body}\n}}\n{values}\n'
    )
