"""Metal's text as C++: address spaces are erased and threadgroup variables live in the emulator's memory.

Line numbers stay what they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SPACES = {"device", "constant", "thread", "threadgroup"}
_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<directive>^[ \t]*\#(?:[^\n\\]|\\.|\\\n)*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<word>[A-Za-z_]\w*)
    |(?P<other>::|->|\.?[0-9](?:[eEpP][+-]|[\w.])*|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def translate(text: str) -> str:
    """C++ that means on one thread of the emulator what `text` means on one thread of a GPU."""
    return "".join(_without_twins(_erase(tokenize(text))))


def tokenize(text: str) -> list[str]:
    """The text in pieces that add up to it: words, numbers, signs, comments, white space, whole directives."""
    return [match.group() for match in _TOKEN.finditer(text)]


def is_code(token: str) -> bool:
    """True if a token is neither white space nor a comment nor a directive."""
    return not (token.isspace() or token.startswith(("//", "/*")) or token.lstrip(" \t").startswith("#"))


def _erase(tokens: list[str]) -> list[str]:
    result, index, variables = [], 0, 0
    while index < len(tokens):
        token = tokens[index]
        if token == "threadgroup" and (end := _end_of_variables(tokens, index)):
            declared = [t for t in tokens[index + 1 : end] if is_code(t)]
            newlines = "".join(tokens[index:end]).count("\n")
            for part in _declarators(declared):
                result.append(_variable(*part, variables))
                variables += 1
            result.append("\n" * newlines)
            index = end + 1
            continue
        if token in _SPACES:
            token = ""
        elif not is_code(token) and token.lstrip(" \t").startswith("#"):
            token = _directive(token)
        result.append(token)
        index += 1
    return result


def _directive(text: str) -> str:
    if re.match(r"\s*#\s*include\s*<metal_\w+>", text):
        return ""
    return re.sub(r"\b(device|constant|threadgroup|thread)\b", "", text)


def _end_of_variables(tokens: list[str], start: int) -> int | None:
    """The index of the semicolon if `threadgroup` at start declares variables, None if it is part of a type."""
    for index, depth in enumerate(_depths(tokens[start + 1 :]), start + 1):
        token = tokens[index]
        if depth < 0 or (depth == 0 and token in ("*", "&", "=", "{", "}", ":", ")")):
            return None
        if token == ";":
            return index if depth == 0 else None
    return None


def _depths(tokens: list[str]) -> Iterator[int]:
    """The number of brackets and template arguments open after each token; within brackets < and > are comparisons."""
    brackets = angles = 0
    for token in tokens:
        brackets += (token in ("[", "(")) - (token in ("]", ")"))
        if brackets == 0:
            angles += (token == "<") - (token == ">")
        yield brackets + angles


def _declarators(tokens: list[str]) -> list[tuple[str, str, str]]:
    """(type, name, dimensions) of each variable of a declaration."""
    groups: list[list[str]] = [[]]
    for token, depth in zip(tokens, _depths(tokens)):
        if token == "," and depth == 0:
            groups.append([])
        else:
            groups[-1].append(token)
    parts = []
    kind = ""
    for number, group in enumerate(groups):
        bracket = _first_bracket(group)
        if number == 0:
            kind = " ".join(group[: bracket - 1])
        parts.append((kind, group[bracket - 1], "".join(group[bracket:])))
    return parts


def _first_bracket(tokens: list[str]) -> int:
    """The first one outside template arguments."""
    return next((i for i, depth in enumerate(_depths(tokens)) if tokens[i] == "[" and depth == 1), len(tokens))


def _variable(kind: str, name: str, dimensions: str, index: int) -> str:
    return (
        f"{kind} (&{name}){dimensions} = *({kind} (*){dimensions})"
        f"emulator_threadgroup({index}, sizeof({kind} {dimensions}), sizeof({kind}));"
    )


def _without_twins(tokens: list[str]) -> list[str]:
    """Drops functions that repeat an earlier one of the same scope: overloads that differed by address space only."""
    result = list(tokens)
    scopes: list[set[tuple[str, ...]]] = [set()]
    start = 0  # of the declaration
    current: list[str] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if not is_code(token):
            if not current:
                start = index + 1
            index += 1
            continue
        if not token:
            index += 1
            continue
        current.append(token)
        if token == "{" and _opens_scope(current):
            scopes.append(set())
            current, start = [], index + 1
        elif token == "{":
            end = _closing(tokens, index)
            current += [t for t in tokens[index + 1 : end + 1] if t and is_code(t)]
            if not (end + 1 < len(tokens) and _continues(tokens, end)):
                key = tuple(current)
                if key in scopes[-1]:
                    for k in range(start, end + 1):
                        result[k] = "\n" * tokens[k].count("\n")
                scopes[-1].add(key)
                current, start = [], end + 1
            index = end
        elif token == "}":
            if len(scopes) > 1:
                scopes.pop()
            current, start = [], index + 1
        elif token == ";":
            current, start = [], index + 1
        index += 1
    return result


def _opens_scope(declaration: list[str]) -> bool:
    before = declaration[: declaration.index("(")] if "(" in declaration else declaration
    return any(word in before for word in ("namespace", "struct", "class", "union", "enum"))


def _closing(tokens: list[str], start: int) -> int:
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index] == "{") - (tokens[index] == "}")
        if depth == 0:
            return index
    return len(tokens) - 1


def _continues(tokens: list[str], end: int) -> bool:
    """True if a brace closed an initialiser in the middle of a declaration, as in a constructor's list."""
    following = next((t for t in tokens[end + 1 :] if t and is_code(t)), "")
    return following in (",", "{", ")")
