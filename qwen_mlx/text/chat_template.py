"""A model's chat template, a program of the file's author: rendered in a sandbox, where a user's words stay text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError, shortened
from .messages import SYSTEM, TOOLS, Accepted, Message, normalized
from .token_names import name_splitter

if TYPE_CHECKING:
    from .sandbox import Sandbox

# Noncharacters, which are removed from what users write.
GUARD = "\ufdd0"  # breaks up the names of control tokens in a user's text
MARK = "\ufdd1"  # encloses the number of a message whose ids are known


def render(source: str, messages: Any, /, **variables: Any) -> str:
    """The conversation as the template `source` writes it. Raises QwenMLXError if it refuses the messages."""
    return render_normalized(source, normalized_for(source, messages, **variables), **variables)


def normalized_for(source: str, messages: Any, /, **variables: Any) -> list[Message]:
    """The messages in the form that the template `source` takes; see messages.normalized."""
    simple = {name: value for name, value in variables.items() if isinstance(value, str | bool | int | float)}
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    begins = isinstance(first, Mapping) and first.get("role") in ("system", "developer")
    return normalized(messages, _accepted(source, tuple(sorted(simple.items())), bool(variables.get("tools")), begins))


def render_normalized(source: str, messages: list[Message], /, **variables: Any) -> str:
    """render() of messages that have the template's form already."""
    import jinja2

    try:
        # Transformers defines these two in every conversation.
        given = {"tools": None, "documents": None, **variables}
        return _sandbox().render(_compiled(source), **given, messages=messages)
    except jinja2.TemplateError as error:
        raise QwenMLXError(f"The chat template cannot be used: {shortened(str(error))}.") from None
    except Exception as error:  # it can raise anything
        raise QwenMLXError(f"The chat template fails on these messages ({shortened(repr(error))}).") from None


@functools.lru_cache(maxsize=8)
def _accepted(source: str, variables: tuple[tuple[str, Any], ...], tools: bool, system: bool) -> Accepted:
    """The forms that a template takes in conversations with these variables, perhaps tools, and a system's message."""
    given = {**dict(variables), "tools": TOOLS if tools else None}
    return Accepted(lambda messages: render_normalized(source, messages, **given), source, [SYSTEM] if system else [])


def guarded_conversation(
    source: str,
    messages: Any,
    variables: Mapping[str, Any],
    tokens: Mapping[str, str],
    control: Collection[str],
    others: Collection[str] = (),
) -> tuple[list[Message], dict[str, Any]]:
    """The messages in the template's form and all variables, with GUARD inside every name of a `control` token that
    messages and `variables` bring along; `tokens`, the names of special tokens, stay, and so do those of `others`, the
    added tokens that are not control tokens. Without the guards the template's text is what it is from unguarded
    messages.

    A template that compares or splits a content with a control token, as those of thinking models may, gets that token
    unguarded. Raises QwenMLXError if a guard changes the text.
    """
    form = normalized_for(source, messages, **{**tokens, **variables})
    plain = guarded((form, dict(variables)), ())
    starts = frozenset(name[:2] for name in control)
    expected = render_normalized(source, plain[0], **{**tokens, **plain[1]})
    for compared in (frozenset[str](), _compared(source)):
        kept = frozenset([*others, *(name for name in control if name in compared)])
        safe = guarded((form, dict(variables)), starts, kept)
        given = {**tokens, **safe[1]}
        if safe == plain or render_normalized(source, safe[0], **given).replace(GUARD, "") == expected:
            return safe[0], given
    text = json.dumps(plain, ensure_ascii=False, default=str)
    names = ", ".join(name for name in control if name in text) or "the beginning of a control token"
    raise QwenMLXError(f"The chat template writes another text where a message holds {names}; leave it out.")


def _compared(source: str) -> frozenset[str]:
    """Texts that a template compares with, searches or splits by."""
    from jinja2 import nodes

    outer = _sandbox().parse(source).find_all((nodes.Compare, nodes.Call, nodes.Filter))
    return frozenset(
        const.value for node in outer for const in node.find_all(nodes.Const) if isinstance(const.value, str)
    )


def guarded(value: Any, starts: Collection[str], kept: Collection[str] = ()) -> Any:
    """`value` with each of `starts`, a control token's first two characters, broken up by GUARD in all its strings,
    except in the names `kept`. Not whole names: a template may change letters, or put two strings together."""
    if isinstance(value, str):
        value = value.replace(GUARD, "").replace(MARK, "")
        for start in starts:
            value = value.replace(start, start[0] + GUARD + start[1:])
            if value.endswith(start[0]):
                value += GUARD
        return _restored(value, frozenset(kept), frozenset(starts)) if kept and GUARD in value else value
    try:
        if isinstance(value, Mapping):
            return {guarded(key, starts, kept): guarded(item, starts, kept) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [guarded(item, starts, kept) for item in value]
    except RecursionError:
        raise QwenMLXError("A message nests its lists or objects too deeply; make it flatter.") from None
    return value


def _restored(value: str, kept: frozenset[str], starts: frozenset[str]) -> str:
    """`value` without GUARD in the names `kept`."""
    split, names = _guarded_names(kept, starts)
    return "".join(names.get(piece, piece) for piece in split(value))


@functools.lru_cache(maxsize=4)
def _guarded_names(kept: frozenset[str], starts: frozenset[str]) -> tuple[Callable[[str], list[str]], dict[str, str]]:
    names = {name[0] + GUARD + name[1:]: name for name in kept if name[:2] in starts}
    return name_splitter(names, MARK), names


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Any:
    return _sandbox().template(source)


@functools.cache
def _sandbox() -> Sandbox:
    from .sandbox import Sandbox

    return Sandbox(GUARD)
