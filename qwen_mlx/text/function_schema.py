"""The JSON schema of a Python function that a model can call."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, Union

from ..errors import QwenMLXError

JSON_TYPES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
SECTIONS = ("Args", "Returns", "Raises")


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function from its type hints and its Google-style docstring, as transformers'
    get_json_schema writes it. Raises QwenMLXError for a parameter without type or description, or a type that JSON has
    no word for.
    """
    name = getattr(function, "__name__", "tool")
    doc = inspect.getdoc(function)
    if not doc:
        raise QwenMLXError(f"The tool {name!r} has no docstring; say what it does and describe its arguments.")
    main, descriptions, returns = _docstring(doc)
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # an annotation is an expression of the file's author
        raise QwenMLXError(f"The tool {name!r} has a type hint that cannot be evaluated ({error}).") from None
    try:
        arguments = inspect.signature(function).parameters
    except ValueError:  # such as max
        raise QwenMLXError(f"The tool {name!r} does not tell its arguments; wrap it in a function.") from None
    properties: dict[str, Any] = {}
    required = []
    for key, parameter in arguments.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise QwenMLXError(f"The tool {name!r} has the argument {parameter}, expected ones that have a name.")
        for what, known in (("type hint", hints), ("description in the docstring's Args", descriptions)):
            if key not in known:
                raise QwenMLXError(f"The argument {key!r} of the tool {name!r} has no {what}; add one.")
        schema, text = _type_schema(hints[key], f"The argument {key!r} of the tool {name!r}"), descriptions[key]
        choices = re.search(r"\(choices:\s*(.*?)\)\s*$", text, re.IGNORECASE)
        if choices:
            try:
                schema["enum"] = [c.strip() if isinstance(c, str) else c for c in json.loads(choices[1])]
            except ValueError:
                raise QwenMLXError(
                    f"The argument {key!r} of the tool {name!r} has choices {choices[1]}, expected a JSON list."
                ) from None
            text = text[: choices.start()].strip()
        properties[key] = schema | {"description": text}
        if parameter.default is parameter.empty:
            required.append(key)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    inner: dict[str, Any] = {"name": name, "description": main, "parameters": parameters}
    if "return" in hints:
        try:
            inner["return"] = _type_schema(hints["return"], "")
        except QwenMLXError:
            pass  # the model gets text, whatever a tool returns
        else:
            inner["return"] |= {} if returns is None else {"description": returns}
    return {"type": "function", "function": inner}


def _docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """(description, descriptions of arguments, description of what is returned) of a Google-style docstring."""
    lines: dict[str, list[str]] = {"": []}
    section = ""
    for line in doc.strip().splitlines():
        if line.strip().rstrip(":") in SECTIONS and line.strip().endswith(":"):
            section = line.strip()[:-1]
        lines.setdefault(section, []).append(line)
    arguments: dict[str, str] = {}
    indent, key = None, None
    for line in lines.get("Args", [])[1:]:
        match = re.match(r"([ \t]*)(\w+):(.*)", line)
        if match and (indent is None or len(match[1]) <= indent):
            indent, key = len(match[1]), match[2]
            arguments[key] = match[3].strip()
        elif key is not None and line.strip():
            arguments[key] = f"{arguments[key]} {line.strip()}".strip()
    returns = "\n".join(lines.get("Returns", [])[1:]).strip()
    return "\n".join(lines[""]).strip(), arguments, returns or None


def _type_schema(hint: Any, what: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_schema([member.value for member in hint], what)
    if origin is None and hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if origin in (Union, types.UnionType):
        inner = [_type_schema(kind, what) for kind in arguments if kind is not type(None)]
        names = sorted({kind.get("type", "") for kind in inner if isinstance(kind.get("type", ""), str)})
        if len(inner) == 1:
            schema = inner[0]
        elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in inner):
            schema = {"type": names[0] if len(names) == 1 else names}
        else:
            schema = {"anyOf": inner}
        return schema | ({"nullable": True} if type(None) in arguments else {})
    if origin is Literal:
        return _enum_schema(list(arguments), what)
    if origin is list:
        return {"type": "array", "items": _type_schema(arguments[0], what)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [_type_schema(kind, what) for kind in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], what)}
    raise QwenMLXError(
        f"{what} has the type {hint!r}, expected int, float, str, bool, list, dict, Literal, Enum or a union."
    )


def _enum_schema(values: list[Any], what: str) -> dict[str, Any]:
    if not values or any(type(value) not in JSON_TYPES or isinstance(value, list | tuple | dict) for value in values):
        raise QwenMLXError(f"{what} has the choices {values}, expected numbers, strings, booleans or None.")
    names = list(dict.fromkeys(JSON_TYPES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
