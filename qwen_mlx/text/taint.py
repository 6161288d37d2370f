"""Taint tracking through a chat template: which characters of a prompt are a user's, and which the template's own.

A user's character is replaced by a lone surrogate (`Taint.mark`), which is no character and which nobody can write, the
template is rendered with these, and every character of the prompt then tells its author. Comparisons and searches see
the plain text (`plain`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ..errors import QwenMLXError

SURROGATES = range(0xD800, 0xE000)
_MARKED = re.compile("[\ud800-\udfff]+")
# str.translate is quick where its table has the character; a run of those that it has is translated at once.
_ASCII = {letter: letter for letter in range(128)}
_KNOWN = re.compile("[\x00-\x7f\ud800-\udfff]+")
# The surrogate of each letter that a control token's name has, of any tokenizer, and the letter of each surrogate.
_MARKS: dict[int, int] = {}
_LETTERS: dict[int, int] = dict(_ASCII)

# Methods and filters of a string by what they give: pieces of it, or a text of its length. Those of JOINS put texts
# together, which needs no help, as for what is named nowhere.
CUTS = (
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "strip",
    "trim",
)
CASES = ("capitalize", "casefold", "lower", "swapcase", "title", "upper")
JOINS = ("center", "expandtabs", "format", "format_map", "join", "ljust", "rjust", "splitlines", "zfill")
ORDERS = ("dictsort", "max", "min", "sort", "unique")
VALUES = ("e", "escape", "float", "int", "string", "tojson", "urlencode", "wordcount")  # filters


class Taint:
    """Marks users' characters: those that the names of the `control` tokens consist of, but not white space, so that
    it can be trimmed. Raises QwenMLXError for names of more different characters than there are surrogates."""

    def __init__(self, control: Iterable[str]) -> None:
        letters = {c for name in control for c in name if not c.isspace()}
        new = sorted(letter for letter in letters if ord(letter) not in _MARKS)
        if len(_MARKS) + len(new) > len(SURROGATES):
            raise QwenMLXError(
                f"The control tokens have names of more than {len(SURROGATES):,} different characters; save the "
                "tokenizer with fewer special tokens."
            )
        for letter, mark in zip(new, SURROGATES[len(_MARKS) :]):
            _MARKS[ord(letter)], _LETTERS[mark] = mark, ord(letter)
        self._marks = _ASCII | {ord(letter): _MARKS[ord(letter)] for letter in letters}
        self._known = re.compile(f"[\\x00-\\x7f{re.escape(''.join(letters))}]+")

    def mark(self, value: Any) -> Any:
        """`value` with the characters of all its strings marked. A dict has its keys unmarked, but lists them marked:
        so a template finds what it names. Raises QwenMLXError for a lone surrogate."""
        if isinstance(value, str):
            if not value.isascii() and (odd := _MARKED.search(value)):
                raise QwenMLXError(f"A text holds a lone surrogate at {odd.start()}, which is not a character.")
            return self._known.sub(lambda run: run[0].translate(self._marks), value)
        if isinstance(value, Mapping):
            return Fields({key: self.mark(item) for key, item in value.items()})
        if isinstance(value, tuple):
            return tuple(map(self.mark, value))
        return [self.mark(item) for item in value] if isinstance(value, list) else value


class Fields(dict[Any, Any]):
    """A dict whose keys a user wrote."""

    def __iter__(self) -> Iterator[Any]:
        return (_all_marked(key) if isinstance(key, str) else key for key in super().__iter__())

    def keys(self) -> Any:
        return list(self)

    def items(self) -> Any:
        return list(zip(self, self.values()))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(plain(key))

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(plain(key), default)

    def copy(self) -> Fields:
        return Fields(zip(super().__iter__(), self.values()))

    def __reversed__(self) -> Iterator[Any]:
        return iter([*self][::-1])

    def __repr__(self) -> str:
        return _all_marked(repr(plain(self)))


class Quoted(str):
    """A marked text whose quoted form, as `%r` asks for it, is marked, too."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _all_marked(repr(plain(str(self))))


class Listed(list[Any]):
    """A marked list or tuple that is printed with marks."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__(values)
        self._text: str = shown(values)

    def __repr__(self) -> str:
        return self._text


def printable(value: Any) -> Any:
    """A marked value in a form that a format string prints with marks; anything else as it is."""
    if isinstance(value, Fields) or not is_marked(value):
        return value
    if isinstance(value, dict):
        return Fields(keyed(value)[0])
    return Quoted(value) if isinstance(value, str) else Listed(value)


def keyed(values: Mapping[Any, Any]) -> tuple[dict[Any, Any], bool]:
    """A dict with plain keys, and True if a user wrote one of them."""
    return {plain(key): item for key, item in values.items()}, any(map(is_marked, values))


def plain(value: Any) -> Any:
    """`value` with all its strings as users wrote them."""
    if isinstance(value, str):
        return value if value.isascii() else _KNOWN.sub(lambda run: run[0].translate(_LETTERS), value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):  # such as a group of groupby, which has names for its items
        return tuple.__new__(type(value), map(plain, value))
    return [plain(item) for item in value] if isinstance(value, list) else value


def _all_marked(text: str) -> str:
    return text.translate(_MARKS)


def escaped(text: str) -> Markup:
    """A text that is perhaps marked, escaped for HTML."""
    return Markup("".join(_all_marked(escape(plain(c))) if _MARKED.match(c) else str(escape(c)) for c in text))


def is_marked(value: Any) -> bool:
    """True if a string, or one within a list or dict, has a user's characters, and for what a user wrote as a dict."""
    if isinstance(value, str):
        return not value.isascii() and _MARKED.search(value) is not None
    if isinstance(value, dict):
        return isinstance(value, Fields) or any(map(is_marked, value)) or any(map(is_marked, value.values()))
    return isinstance(value, list | tuple) and any(map(is_marked, value))


def shown(value: Any) -> Any:
    """A list or a dict as Python prints it, with marks; anything else as it is."""
    if isinstance(value, list | tuple | dict) and is_marked(value):
        return _all_marked(str(plain(value)))
    return value


def _cut(name: str, text: str, arguments: tuple[Any, ...], result: Any) -> Any:
    """The pieces of the marked `text` that `result` is of the plain one."""
    if isinstance(result, str):
        from_end = name in ("lstrip", "removeprefix")
        start = len(text) - len(result) if from_end else plain(text).find(result)
        return text[start : start + len(result)]
    separator = arguments[0] if name in ("split", "rsplit") and arguments else "" if "part" in name else None
    pieces, at = [], 0
    for piece in result:
        if separator is None:  # white space, which no piece begins with
            at = plain(text).find(piece, at)
        pieces.append(text[at : at + len(piece)])
        at += len(piece) + len(separator or "")
    return pieces if isinstance(result, list) else tuple(pieces)


def _cased(text: str, result: str) -> str:
    if len(text) != len(result):
        return _all_marked(result)
    return "".join(_all_marked(new) if _MARKED.match(old) else new for old, new in zip(text, result))


def _replaced(text: str, arguments: tuple[Any, ...]) -> str:
    old, new, count = (*arguments, -1)[:3]
    counted = (str(plain(old)), -1 if count is None else count)
    pieces = _cut("split", text, counted, plain(text).split(*counted))
    return str(new).join(pieces)


def marked_items(items: Iterable[Any]) -> dict[str, Any]:
    """The items by how their plain forms are printed; a marked one goes before its equals."""
    originals: dict[str, Any] = {}
    for item in items:
        key = repr(plain(item))
        originals[key] = item if is_marked(item) else originals.get(key, item)
    return originals


def traced(name: str, call: Callable[..., Any], text: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The result of a method or a filter of a string, with the marks that its characters had.

    call: computes the result, and counts what it costs.
    """
    if (
        name in JOINS
        or (name == "string" and isinstance(text, str))
        or not is_marked([text, *arguments, *named.values()])
    ):
        return call(text, *arguments, **named)
    result = call(plain(text), *plain(arguments), **plain(named))
    if name in CUTS and isinstance(text, str):
        given = plain(tuple(arguments) or tuple(named[key] for key in ("sep", "chars") if key in named))
        return _cut(name, text, tuple(item for item in given[:1] if item is not None), result)
    if name in ("e", "escape"):
        return escaped(text) if isinstance(text, str) and not isinstance(text, Markup) else result
    if name in CASES and isinstance(text, str):
        return _cased(text, result)
    if name == "replace" and isinstance(text, str) and len(arguments) > 1 and plain(arguments[0]):
        return _replaced(text, arguments)
    if name in ORDERS:
        originals = marked_items(text.items() if name == "dictsort" else text)
        if name in ("max", "min"):
            return originals.get(repr(result), result)
        return [originals[repr(item)] for item in result]
    return _all_marked(result) if isinstance(result, str) else result
