"""llama.cpp's `response_fields`: the parts of an answer that a client asks for. Source: json_get_nested_values in
llama.cpp's tools/server."""

from __future__ import annotations

from typing import Any

from .body import Body, short


def response_fields(body: Body) -> list[str] | None:
    """Takes response_fields: names, of which `a/b` is b of a."""
    value = body.take("response_fields")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) > 100 or not all(isinstance(name, str) for name in value):
        body.refuse("response_fields", f"is {short(value)}, expected a list of names, as 'timings/prompt_n'")
    return value


def chosen(full: dict[str, Any], paths: list[str] | None) -> dict[str, Any]:
    """The parts of an answer that `paths` name, each by its path; those that there are not are left out, and without
    paths all is there."""
    if not paths:
        return full
    parts: dict[str, Any] = {}
    for path in paths:
        value: Any = full
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            parts[path] = value
    return parts
