"""Messages and tools of a chat request, as the chat template takes them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import QwenMLXError
from ..generation.tools import Tool, tools_by_name
from .body import Body, short
from .errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_message(body: Body) -> dict[str, Any]:
    """A message as the chat template takes it: text parts joined, a developer's as a system's, arguments of calls as
    objects."""
    role = body.choice("role", *ROLES)
    if role is None:
        body.refuse("role", f"is missing, expected one of {', '.join(ROLES)}")
    content = body.take("content")
    if isinstance(content, list):
        content = "".join(_part(body, part, i) for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        body.refuse("content", f"is {short(content)}, expected a string or a list of text parts")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content or ""}
    calls = body.objects("tool_calls", []) if role == "assistant" else []
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    if content is None and not calls:
        body.refuse("content", "is missing, expected a string")
    if role == "tool":
        body.string("tool_call_id")
        body.string("name")  # of the tool, which the call before it has too
    if role == "assistant":
        reasoning = body.string("reasoning_content")
        if reasoning:
            message["reasoning_content"] = reasoning
        body.only("refusal", "")
        body.only("audio")
        body.only("function_call")
        body.only("annotations", [])
    body.only("name", "")
    body.done()
    return message


def _part(body: Body, part: Any, index: int) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        body.refuse(f"content[{index}]", f"is {short(part)}, expected a text part: the model reads text alone")
    return str(part["text"])


def _call(body: Body) -> dict[str, Any]:
    body.string("id")
    body.choice("type", "function")
    function = body.object("function")
    if function is None:
        body.refuse("function", "is missing")
    name, arguments = function.string("name"), function.take("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (RecursionError, ValueError):
            function.refuse("arguments", "is not JSON")
    if not name or not isinstance(arguments, dict):
        function.refuse("arguments" if name else "name", "is not an object" if name else "is missing")
    function.done()
    body.take("index")  # streams number the calls
    body.done()
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tools_of(body: Body) -> dict[str, Tool]:
    """Takes the tools, by name. Raises RequestError for one that is not described."""
    sources = []
    for one in body.objects("tools", []):
        one.choice("type", "function", default="function")
        function = one.take("function")
        if not isinstance(function, dict):
            one.refuse("function", "is missing, expected a name and parameters")
        one.done()
        # `strict` needs nothing more: a call that does not fit its parameters is text.
        sources.append({key: value for key, value in function.items() if key != "strict"})
    body.only("functions")
    body.only("function_call")
    try:
        return tools_by_name(sources)
    except QwenMLXError as error:
        raise RequestError(400, str(error), "tools") from None
