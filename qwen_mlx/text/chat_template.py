"""A model's chat template, a program of the file's author: rendered in a sandbox, where a user's words stay text."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError, shortened
from .function_schema import function_schema
from .messages import SYSTEM, TOOLS, Accepted, Message, normalized, plain_data
from .taint import Taint, plain

if TYPE_CHECKING:
    from .sandbox import Sandbox

MARK = "\ufdd1"  # encloses the number of a message whose ids are known


def variables_of(tools: Any, **others: Any) -> dict[str, Any]:
    """The variables of a template: tools, of which functions become their schemas, and others. Raises QwenMLXError for
    what is neither, and for values that JSON does not have."""
    if tools is not None and not isinstance(tools, list | tuple):
        raise QwenMLXError(f"The tools are {type(tools).__name__}, expected a list of functions or JSON schemas.")
    schemas = tools and [function_schema(tool) if inspect.isroutine(tool) else tool for tool in tools]
    given = {"tools": schemas, **others}
    try:
        return {name: plain_data(value, f"the variable {name!r}") for name, value in given.items()}
    except RecursionError:
        raise QwenMLXError("A variable of the chat template nests too deeply; make it flatter.") from None


def render(source: str, messages: Any, /, **variables: Any) -> str:
    """The conversation as the template `source` writes it. Raises QwenMLXError if it refuses the messages."""
    return render_normalized(source, normalized_for(source, messages, **variables), **variables)


def normalized_for(source: str, messages: Any, /, **variables: Any) -> list[Message]:
    """The messages in the form that the template `source` takes; see messages.normalized."""
    simple = {name: value for name, value in variables.items() if isinstance(value, str | bool | int | float)}
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    begins = isinstance(first, Mapping) and first.get("role") in ("system", "developer")
    tools = isinstance(given := variables.get("tools"), list | tuple) and len(given) > 0
    return normalized(messages, _accepted(source, tuple(sorted(simple.items())), tools, begins))


def render_normalized(source: str, messages: list[Message], /, **variables: Any) -> str:
    """render() of messages that have the template's form already."""
    return _rendered(_sandbox(), source, messages, variables)


def _rendered(sandbox: Sandbox, source: str, messages: list[Message], variables: Mapping[str, Any]) -> str:
    import jinja2

    try:
        # Transformers defines these two in every conversation.
        given = {"tools": None, "documents": None, **variables}
        return sandbox.render(_compiled(sandbox, source), **given, messages=messages)
    except jinja2.TemplateError as error:
        raise QwenMLXError(f"The chat template cannot be used: {shortened(str(error))}.") from None
    except Exception as error:  # it can raise anything
        raise QwenMLXError(f"The chat template fails on these messages ({shortened(repr(error))}).") from None


@functools.lru_cache(maxsize=8)
def _accepted(source: str, variables: tuple[tuple[str, Any], ...], tools: bool, system: bool) -> Accepted:
    """The forms that a template takes in conversations with these variables, perhaps tools, and a system's message."""
    given = {**dict(variables), "tools": TOOLS if tools else None}
    return Accepted(lambda messages: render_normalized(source, messages, **given), source, [SYSTEM] if system else [])


def render_traced(
    source: str, messages: list[Message], variables: Mapping[str, Any], tokens: Mapping[str, str], taint: Taint
) -> str:
    """render_normalized() with the characters that come from messages and `variables` marked by `taint`; those of
    `tokens`, the names of special tokens, and roles of letters, digits, - and _ are the template's.

    Raises QwenMLXError if the template writes another text over marked characters.
    """
    marked, given = taint.mark(messages), {name: taint.mark(value) for name, value in variables.items()}
    for message in marked:
        if re.fullmatch(r"[\w-]+", role := plain(message["role"])):  # such as the templates' <|user|>
            message["role"] = role
    expected = _rendered(_sandbox(), source, messages, {**tokens, **variables})  # first: it is metered whole
    try:
        text = _rendered(_tracing_sandbox(), source, marked, {**tokens, **given})
    except QwenMLXError:
        text = ""  # what the template calls compares marks
    if (own := plain(text)) != expected:
        same = next((i for i, (ours, right) in enumerate(zip(own, expected)) if ours != right), len(own))
        raise QwenMLXError(
            "The chat template rewrites users' texts, so that they cannot be told from its own control tokens, "
            f"where it writes {expected[same : same + 40]!r}; give the prompt as it is (--raw, or raw=True)."
        )
    return text


@functools.lru_cache(maxsize=8)
def _compiled(sandbox: Sandbox, source: str) -> Any:
    return sandbox.template(source)


@functools.cache
def _sandbox() -> Sandbox:
    from .sandbox import Sandbox

    return Sandbox(MARK)


@functools.cache
def _tracing_sandbox() -> Sandbox:
    from .tracing import TracingSandbox

    return TracingSandbox(MARK)
