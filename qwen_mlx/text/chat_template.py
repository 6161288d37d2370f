"""A model's chat template, a program of the file's author: rendered in a sandbox, where a user's words stay text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import QwenMLXError

if TYPE_CHECKING:
    import jinja2

# Noncharacters, which are removed from what users write.
GUARD = "\ufdd0"  # breaks up the names of control tokens in a user's text
MARK = "\ufdd1"  # encloses the number of a message whose ids are known


def render(source: str, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
    """The conversation as the template `source` writes it. Raises QwenMLXError if it refuses the messages."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise QwenMLXError(f"A message is {message!r}, expected a dict with 'role' and 'content'.")
        if not isinstance(message.get("content"), str | list | None):
            raise QwenMLXError(f"The content of a message is {message['content']!r}, expected a string.")
    import jinja2

    try:
        return _compiled(source).render(**variables, messages=messages, range=_bounded_range())
    except jinja2.TemplateError as error:
        raise QwenMLXError(f"The chat template cannot be used: {error}.") from None
    except Exception as error:  # it can raise anything
        raise QwenMLXError(
            f"The chat template fails on these messages ({error!r}); is every 'content' a string?"
        ) from None


def guarded(value: Any, starts: Collection[str]) -> Any:
    """`value` with each of `starts`, a control token's first two characters, broken up by GUARD in all its strings."""
    if isinstance(value, str):
        value = value.replace(GUARD, "").replace(MARK, "")
        for start in starts:
            value = value.replace(start, start[0] + GUARD + start[1:])
            if value.endswith(start[0]):  # a template may put two strings together
                value += GUARD
        return value
    if isinstance(value, Mapping):
        return {guarded(key, starts): guarded(item, starts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [guarded(item, starts) for item in value]
    return value


def _bounded_range() -> Callable[..., range]:
    """Python's range for one rendering, which refuses endless loops."""
    steps = 0

    def bounded(*limits: int) -> range:
        import jinja2

        nonlocal steps
        numbers = range(*limits)
        steps += len(numbers)
        if steps > 100_000:
            raise jinja2.exceptions.SecurityError("loops of more than 100,000 steps are not allowed")
        return numbers

    return bounded


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    """The template in a sandbox with the names that transformers gives it. Products are bounded."""
    import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            if not all(isinstance(x, int | float) and abs(x) < 1e6 for x in (left, right)) or operator == "**":
                raise jinja2.exceptions.SecurityError(f"{operator} of {type(left).__name__} is not allowed")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form)
    )
    return sandbox.from_string(source)
