"""The forms that structured output can be asked for, as llguidance compiles them, and their bounds.

Source: llguidance's docs/syntax.md and docs/json_schema.md.
"""

from __future__ import annotations

import decimal
import json
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..errors import QwenMLXError
from .tools import CLOSE, OPEN, Tool

LARGEST = 1 << 18  # characters of a schema, a regular expression or a list of choices
LARGEST_GRAMMAR = 1 << 15  # a chain of terminals takes a time that grows with its square
STACK = 256 << 20  # bytes; 6,336 schemas, each within the one before, need more than 32 MB
HEAP = 128 << 20  # bytes beside the stack; where an allocation fails, the compiler ends the process
NO_ROOM = f"There is no memory to compile a grammar; leave {(STACK + HEAP) >> 20} MB of it."
LEXER_STATES = 30_000  # of 2 kB at most
LEXER_FUEL = 200_000  # for the first mask; with the library's million "(a{1000}){1000}" takes it seconds
MULTIPLE = 10_000  # of a multipleOf without its decimal point: llguidance makes a state for each remainder
# Bytes that must follow are not added ahead: "start: /a+/ /a+/", of which the first pattern takes every "a", would add
# them without end. Only a grammar of terminals has such states: those of one pattern or schema lead to its end.
UNFORCED = '\n%llguidance {"no_forcing": true}\n'  # the last declaration holds
_stack_size = threading.Lock()  # the size is the process's, for all threads that start
# One way to write each value, as json.dumps writes it: a model that may add white space can add it without end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


def grammar_source(json_schema: Any, json_object: bool, regex: Any, choices: Any, grammar: Any) -> tuple[str, str]:
    """The name of the argument that is given, and llguidance's form of it. Raises QwenMLXError unless exactly one is
    given, and for what is no such thing or too large."""
    given = {
        "json_schema": json_schema,
        "json_object": json_object or None,
        "regex": regex,
        "choices": choices,
        "grammar": grammar,
    }
    kinds = [name for name, value in given.items() if value is not None]
    if len(kinds) != 1:
        what = f"{' and '.join(kinds)} are given" if kinds else "Nothing is given"
        raise QwenMLXError(f"{what}, expected one of {', '.join(given)}.")
    (kind,) = kinds
    matcher = library().LLMatcher
    source: str
    if kind in ("json_schema", "json_object"):
        text = _schema_text({"type": "object"} if kind == "json_object" else json_schema)
        try:
            source = matcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
        except ValueError as error:  # it is nested too deeply
            raise QwenMLXError(unusable(kind, str(error))) from None
    elif kind == "choices":
        source = matcher.grammar_from_lark(_bounded("choices", _lark_of_choices(choices)))
    elif kind == "regex":
        source = matcher.grammar_from_regex(_bounded("regex", regex))
    else:
        source = matcher.grammar_from_lark(_bounded("grammar", grammar, LARGEST_GRAMMAR) + UNFORCED)
    return kind, source


def tool_calls_source(tools: Sequence[Tool], special: Mapping[str, int], most: int) -> str:
    """llguidance's form of one to `most` calls of tools; special: the ids of tokens that are no ordinary text."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": _closed(tool.parameters)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    if not calls:
        raise QwenMLXError("There is no tool to call; give at least one.")
    schema = _schema_text({"anyOf": calls, "x-guidance": JSON_STYLE})
    opening, closing = (f"<[{special[tag]}]>" if tag in special else json.dumps(tag) for tag in (OPEN, CLOSE))
    again = f'("\\n" call){{0,{most - 1}}}' if most > 1 else ""
    source = f'start: call {again}\ncall: {opening} "\\n" body "\\n" {closing}\nbody: %json {schema}'
    text: str = library().LLMatcher.grammar_from_lark(source)
    return text


def _closed(schema: Any) -> Any:
    """A tool's schema whose objects have no other properties than it lists, which parse_tool_calls refuses."""
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    if isinstance(schema.get("properties"), Mapping):
        result["properties"] = {name: _closed(one) for name, one in schema["properties"].items()}
        result.setdefault("additionalProperties", False)
    if isinstance(schema.get("anyOf"), list):
        result["anyOf"] = [_closed(one) for one in schema["anyOf"]]
    return result | ({"items": _closed(schema["items"])} if "items" in schema else {})


def _schema_text(schema: Any) -> str:
    if hasattr(schema, "model_json_schema"):  # a class of pydantic's
        schema = schema.model_json_schema()
    try:
        text = _bounded("json_schema", schema if isinstance(schema, str) else json.dumps(schema))
        schema = json.loads(text, object_hook=_check_multiple)
    except QwenMLXError:
        raise
    except (RecursionError, TypeError, ValueError) as error:
        raise QwenMLXError(f"The json_schema is not JSON ({error}).") from None
    if schema is False:
        raise QwenMLXError(unusable("json_schema", "nothing satisfies it"))
    if schema is not True and not isinstance(schema, Mapping):
        raise QwenMLXError(f"The json_schema is {type(schema).__name__}, expected a mapping or true.")
    return "{}" if schema is True else text


def _check_multiple(schema: dict[str, Any]) -> dict[str, Any]:
    multiple = schema.get("multipleOf")
    if type(multiple) in (int, float) and decimal.Decimal(str(multiple)).is_finite():
        digits = decimal.Decimal(str(multiple))
        if digits.scaleb(max(0, -int(digits.as_tuple().exponent))) > MULTIPLE:
            raise QwenMLXError(unusable("json_schema", f"multipleOf {multiple} has more than {MULTIPLE:,} remainders"))
    return schema


def _bounded(kind: str, text: Any, largest: int = LARGEST) -> str:
    if not isinstance(text, str):
        raise QwenMLXError(f"The {kind} is {type(text).__name__}, expected a string.")
    if len(text) > largest:
        raise QwenMLXError(f"The {kind} has {len(text):,} characters, expected at most {largest:,}.")
    return text


def _lark_of_choices(choices: Any) -> str:
    valid = isinstance(choices, Sequence) and not isinstance(choices, str) and len(choices) > 0
    if not valid or not all(isinstance(choice, str) and choice for choice in choices):
        raise QwenMLXError(f"choices is {choices!r:.80}, expected a list of strings that are not empty.")
    return "start: " + " | ".join(map(json.dumps, choices))


def library() -> Any:
    """llguidance. Raises QwenMLXError where it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise QwenMLXError(
            "Structured output needs llguidance; install qwen_mlx with its extra structured, by pip install "
            "'.[structured]' in its folder."
        ) from None
    return llguidance


def limits() -> Any:
    """Bounds of what a grammar may cost."""
    return library().LLParserLimits(max_lexer_states=LEXER_STATES, initial_lexer_fuel=LEXER_FUEL, verbose_errors=False)


def on_deep_stack(function: Callable[[], Any]) -> Any:
    """Calls `function`, which compiles a grammar, on a thread with a stack of STACK bytes. The compiler recurses as
    deeply as rules name one another, and would end the process where the stack is too small."""

    def with_room() -> Any:
        mmap.mmap(-1, HEAP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
        return function()

    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            pool = ThreadPoolExecutor(1)
            future = pool.submit(with_room)
        except RuntimeError:  # the thread could not start
            raise QwenMLXError(NO_ROOM) from None
        finally:
            threading.stack_size(before)
    try:
        with pool:
            return future.result()
    except OSError:
        raise QwenMLXError(NO_ROOM) from None


def unusable(kind: str, error: str) -> str:
    """The sentence that says why a grammar is refused."""
    return f"The {kind} cannot be used: {one_line(error).rstrip('.')}."


def one_line(text: str) -> str:
    """An error of the library in one line that is not too long."""
    text = " ".join(text.replace("<non-verbose/>", "").split())
    return text if len(text) <= 200 else text[:197] + "..."
