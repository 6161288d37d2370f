"""Tools that a model can call: their JSON schemas, Qwen2.5's `<tool_call>`, and running a call.

A call is, as Qwen2.5's chat template asks: `<tool_call>`, one JSON object of exactly a name and arguments, and
`</tool_call>`. Anything else is text, and a near miss is reported to the model with the reason.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError, Stopped
from ..text.files import LARGEST_JSON, read_text
from ..text.function_schema import function_schema

OPEN, CLOSE = "<tool_call>", "</tool_call>"
DEEPEST = 64  # levels of a schema: beyond, Python's own limit of calls would come


@dataclass(frozen=True)
class Tool:
    """A tool. schema: {"type": "function", "function": {"name", "description", "parameters"}}, as in OpenAI's API.
    function: called with the arguments by name; None where only the schema is known."""

    schema: dict[str, Any]
    function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        name: str = self.schema["function"]["name"]
        return name

    @property
    def parameters(self) -> dict[str, Any]:
        return self.schema["function"].get("parameters") or {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote. error: the reason why it cannot run, or None; with one, `name` may be empty."""

    name: str
    arguments: dict[str, Any]
    error: str | None = None

    def __str__(self) -> str:
        given = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in self.arguments.items())
        return f"{self.name or '?'}({given})"


def tool(source: Callable[..., Any] | Mapping[str, Any] | Tool) -> Tool:
    """A tool from a Python function with type hints and a Google-style docstring, or from a JSON schema (that of the
    function alone is enough). Raises QwenMLXError naming what is missing."""
    if isinstance(source, Tool):
        return source
    if callable(source):
        return Tool(function_schema(source), source)
    inner = source.get("function", source) if isinstance(source, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise QwenMLXError(f"A tool is {_short(source)}, expected a function or a JSON schema with a 'name'.")
    parameters = inner.get("parameters")
    if parameters is not None and not _is_object_schema(parameters):
        raise QwenMLXError(
            f"The tool {inner['name']!r} has parameters {_short(parameters)}, expected a JSON schema of an object: "
            '{"type": "object", "properties": {...}, "required": [...]}.'
        )
    if _is_deeper(inner, DEEPEST):
        raise QwenMLXError(f"The tool {inner['name']!r} nests its schema more than {DEEPEST} deep; make it flatter.")
    return Tool({"type": "function", "function": dict(inner)})


def _is_deeper(value: Any, depth: int) -> bool:
    """True if a value holds values more than `depth` deep."""
    level = [value]
    for _ in range(depth):
        level = [item for one in level if isinstance(one, Mapping | list) for item in _items(one)]
        if not level:
            return False
    return True


def _items(value: Mapping[str, Any] | list[Any]) -> Sequence[Any]:
    return value if isinstance(value, list) else list(value.values())


def _is_object_schema(schema: Any) -> bool:
    if not isinstance(schema, Mapping) or not isinstance(schema.get("required", []), list):
        return False
    properties = schema.get("properties", {})
    return isinstance(properties, Mapping) and all(isinstance(entry, Mapping) for entry in properties.values())


def tools_by_name(sources: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool]) -> dict[str, Tool]:
    """The tools under their names. Raises QwenMLXError if two have the same."""
    if isinstance(sources, str | Mapping) or not isinstance(sources, Sequence):
        raise QwenMLXError(f"The tools are {_short(sources)}, expected a list of functions or JSON schemas.")
    tools: dict[str, Tool] = {}
    for one in map(tool, sources):
        if one.name in tools:
            raise QwenMLXError(f"Two tools are named {one.name!r}; rename one.")
        tools[one.name] = one
    return tools


def load_tools(path: str | os.PathLike[str]) -> list[Tool]:
    """Tools of a file: a .json with a list of schemas, or a .py, **which is run**, whose public functions they are
    (those it defines itself). Raises QwenMLXError for a file that cannot be read or run, or holds no tool."""
    where = Path(path)
    try:
        if where.suffix == ".json":
            data = json.loads(read_text(str(where), largest=LARGEST_JSON))
            sources = data if isinstance(data, list) else [data]
        elif where.suffix == ".py":
            names = runpy.run_path(str(where), run_name="__tools__")
            functions = {name: value for name, value in names.items() if inspect.isfunction(value)}
            sources = [f for name, f in functions.items() if name[0] != "_" and f.__module__ == "__tools__"]
        else:
            raise QwenMLXError(f"{where}: not a .py or .json file; tools are Python functions or JSON schemas.")
        tools = list(tools_by_name(sources).values())
    except OSError as error:
        raise QwenMLXError(f"{where}: cannot be read ({error.strerror}).") from None
    except QwenMLXError as error:
        raise QwenMLXError(str(error) if str(error).startswith(str(where)) else f"{where}: {error}") from None
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QwenMLXError(f"{where}: not valid JSON in UTF-8 ({error}).") from None
    except SyntaxError as error:
        raise QwenMLXError(f"{where}: line {error.lineno}: {error.msg}.") from None
    except (Exception, SystemExit) as error:  # the file's own code can raise anything
        raise QwenMLXError(f"{where}: fails when it is run ({error!r}).") from None
    if not tools:
        raise QwenMLXError(f"{where}: holds no tool; define a function, or write a list of JSON schemas.")
    return tools


def parse_tool_calls(text: str, tools: Mapping[str, Tool]) -> list[ToolCall]:
    """The calls in an answer, in order; one that cannot run has `error` set. No `<tool_call>`, no calls, unless the
    answer is nothing else than a call of one of the tools, as small models write it."""
    calls = []
    bare = text.strip().removesuffix("```").removeprefix("```").removeprefix("json").strip()
    if OPEN not in text and bare.startswith("{") and bare.endswith("}"):
        call = _parse(bare, tools)
        if call.name in tools:
            calls.append(call)
    for piece in text.split(OPEN)[1:]:
        body, close, _ = piece.partition(CLOSE)
        calls.append(_parse(body, tools) if close else ToolCall("", {}, f"{OPEN} is not closed by {CLOSE}"))
    return calls


def _parse(body: str, tools: Mapping[str, Tool]) -> ToolCall:
    try:
        data = json.loads(body, object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite)
    except (RecursionError, ValueError) as error:
        return ToolCall("", {}, f"not valid JSON ({error})")
    if not isinstance(data, dict):
        return ToolCall("", {}, f"{_short(data)} is not a JSON object with 'name' and 'arguments'")
    name, arguments = data.get("name"), data.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict) or len(data) != 2:
        known = name if isinstance(name, str) else ""
        return ToolCall(known, {}, f"its keys are {sorted(data)}, expected a string 'name' and an object 'arguments'")
    if name not in tools:
        return ToolCall(name, arguments, f"there is no tool {name!r}; there are {', '.join(sorted(tools))}")
    try:
        wrong = mismatch(tools[name].parameters, arguments, "arguments")
    except (AttributeError, LookupError, RecursionError, TypeError):
        wrong = "the parameters of the tool are not a JSON schema that can be checked"
    return ToolCall(name, arguments, wrong)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{_short(text)} is beyond any float")
    return float(text)


def mismatch(schema: Mapping[str, Any], value: Any, where: str) -> str | None:
    """The way in which `value` fails a JSON schema's type, enum, anyOf, nullable, items, properties and required, or
    None. Other keywords are ignored; an object may have only the properties that its schema lists, if it lists any.
    """
    if value is None and schema.get("nullable"):
        return None
    if "anyOf" in schema and all(mismatch(option, value, where) for option in schema["anyOf"]):
        return f"{where} is {_short(value)}, which none of its types allows"
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(_is(value, name) for name in names):
        return f"{where} is {_short(value)}, expected {' or '.join(names)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is {_short(value)}, expected one of {json.dumps(schema['enum'], ensure_ascii=False)}"
    if isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        return next(filter(None, (mismatch(schema["items"], v, f"{where}[{i}]") for i, v in enumerate(value))), None)
    if isinstance(value, dict):
        properties = schema.get("properties")
        missing = [key for key in schema.get("required", []) if key not in value]
        if missing:
            return f"{where} lacks {missing[0]!r}"
        if properties is not None:
            unknown = [key for key in value if key not in properties]
            if unknown and not schema.get("additionalProperties"):
                return f"{where} has {unknown[0]!r}, expected only {', '.join(properties) or 'nothing'}"
            for key in value.keys() & properties.keys():
                if wrong := mismatch(properties[key], value[key], key if where == "arguments" else f"{where}.{key}"):
                    return wrong
    return None


def _is(value: Any, name: str) -> bool:
    kinds: dict[str, Any] = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list}
    kind = (kinds | {"object": dict, "null": type(None)}).get(name, object)
    return isinstance(value, kind) and (not isinstance(value, bool) or name not in ("integer", "number"))


def run(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """The tool's answer as text for the model: a string as it is, anything else as JSON. A call that cannot run, or
    that fails, answers `error: ` and the reason; only Ctrl-C and the end of the process go through."""
    if call.error is not None:
        return f"error: {call.error}"
    function = tools[call.name].function
    if function is None:
        return f"error: the tool {call.name!r} is only described here, and cannot run"
    try:
        result = function(**call.arguments)
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # a tool is anyone's code, and its failure is the model's to read
        text = f"error: {call.name} failed ({type(error).__name__}{_message(error)})"
    return str.encode(text, "utf-8", "replace").decode()  # no lone surrogates, which are not text


def _message(error: BaseException) -> str:
    try:
        return f": {error}"
    except Exception:  # its own code too
        return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
