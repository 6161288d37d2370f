"""The fields of a request that say what form its answer has: OpenAI's response_format and tool_choice, llama.cpp's
json_schema, and vLLM's structured_outputs."""

from __future__ import annotations

from typing import Any

from ..errors import QwenMLXError
from ..generation.structured import Constraint, constraint, tool_call_constraint
from ..generation.tools import Tool
from .body import Body, short
from .errors import RequestError
from .service import Service

KINDS = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choices",
    "grammar": "grammar",
}


def form_of(service: Service, body: Body) -> Constraint | None:
    """Takes response_format, json_schema and structured_outputs, of which one at most may be given."""
    forms = [_response_format(body), _json_schema(body), _structured_outputs(body)]
    given = [form for form in forms if form is not None]
    if len(given) > 1:
        raise RequestError(400, "More than one of response_format, json_schema and structured_outputs is given.")
    return _made(service, *given[0]) if given else None


def forced_call(service: Service, body: Body, tools: dict[str, Tool]) -> Constraint | None:
    """Takes tool_choice: "none" forgets the tools; "required" and the name of a tool force a call, which is one."""
    choice = body.take("tool_choice")
    if choice in (None, "auto"):
        return None
    if choice == "none":
        tools.clear()
        return None
    name = None
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and (not isinstance(name, str) or name not in tools):
        expected = "'none', 'auto', 'required' or one of the tools"
        body.refuse("tool_choice", f"is {short(choice)}, expected {expected}")
    if not tools:
        body.refuse("tool_choice", "is given without tools")
    try:
        return tool_call_constraint(service.tokenizer, [tools[name]] if name else list(tools.values()))
    except QwenMLXError as error:
        raise RequestError(400, str(error), "tools") from None


def _response_format(body: Body) -> tuple[str, dict[str, Any]] | None:
    response_format = body.object("response_format")
    if response_format is None:
        return None
    kind = response_format.choice("type", "text", "json_object", "json_schema")
    schema: Any = None
    if kind == "json_schema":
        inner = response_format.object("json_schema")
        if inner is None:
            response_format.refuse("json_schema", "is missing, expected a name and a schema")
        for name in ("name", "description"):
            inner.string(name)
        inner.boolean("strict", True)  # the answer satisfies the schema in any case
        schema = inner.take("schema")
        inner.done()
        if schema is None:
            inner.refuse("schema", "is missing, expected a JSON schema")
    elif kind == "json_object":
        schema = response_format.take("schema")  # llama.cpp's
    elif kind is None:
        response_format.refuse("type", "is missing, expected 'text', 'json_object' or 'json_schema'")
    response_format.done()
    if kind == "text":
        return None
    return "response_format", {"json_object": True} if schema is None else {"json_schema": schema}


def _json_schema(body: Body) -> tuple[str, dict[str, Any]] | None:
    schema = body.take("json_schema")
    return None if schema is None else ("json_schema", {"json_schema": schema})


def _structured_outputs(body: Body) -> tuple[str, dict[str, Any]] | None:
    outputs = body.object("structured_outputs")
    if outputs is None:
        return None
    given = {KINDS[name]: value for name in KINDS if (value := outputs.take(name)) is not None}
    outputs.done()
    return "structured_outputs", given


def _made(service: Service, field: str, arguments: dict[str, Any]) -> Constraint:
    try:
        return constraint(service.tokenizer, **arguments)
    except QwenMLXError as error:
        raise RequestError(400, str(error), field) from None
