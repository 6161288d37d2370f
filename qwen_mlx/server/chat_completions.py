"""POST /v1/chat/completions. Source: OpenAI's API reference, "Chat"."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import QwenMLXError
from ..generation.text import GenerationChunk
from ..generation.tools import Tool, tools_by_name
from .body import Body, short
from .errors import RequestError
from .sampling_fields import MOST_STOPS, generation_settings, sampling_arguments, seeds
from .service import Service, Task
from .structured_fields import forced_call, form_of
from .tool_text import ToolText
from .usage import Usage, fingerprint, token_entry, whole_usage

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_CHOICES = 16


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    tool_text: ToolText | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None


class ChatRequest:
    """A request, its tasks, and its answer in OpenAI's shape, at once or as events of a stream. Raises RequestError
    for a body that is not served."""

    path = "/v1/chat/completions"

    def __init__(self, service: Service, body: Body) -> None:
        self.service = service
        self.stream = body.boolean("stream")
        options = body.object("stream_options")
        self._include_usage = options is not None and options.boolean("include_usage")
        if options is not None:
            options.only("include_obfuscation", False)
            options.done()
            if not self.stream:
                body.refuse("stream_options", "is given without stream")
        service.check_model(body)
        messages = [_message(one) for one in body.objects("messages")]
        if not messages:
            body.refuse("messages", "is empty, expected at least one message")
        service.check_length(*(message["content"] for message in messages))
        self._tools = _tools(body)
        forced, form = forced_call(service, body, self._tools), form_of(service, body)
        if form is not None and self._tools:
            body.refuse("tools", "are given with a form for the answer; set tool_choice to 'none', or leave one out")
        self._parallel = body.boolean("parallel_tool_calls", True)
        arguments = _limits(body) | sampling_arguments(body)
        arguments["stop"] = body.strings("stop", MOST_STOPS)
        arguments["logprobs"] = _logprobs(body)
        n = body.integer("n", 1, MOST_CHOICES, 1) or 1
        read_only = body.integer("n_predict", 0, 0) == 0
        use_cache = body.boolean("cache_prompt", True)
        prompt_ms, predict_ms = (body.number(name, 0, 1e9) for name in ("t_max_prompt_ms", "t_max_predict_ms"))
        _identifiers(body)
        body.done()
        settings = replace(generation_settings(service, arguments), constraint=forced or form)
        ids = _render(service, messages, self._tools)
        tasks = [
            Task(
                ids,
                replace(settings, seed=seed),
                read_only=read_only,
                use_cache=use_cache,
                prompt_seconds=prompt_ms / 1000 if prompt_ms else None,
                predict_seconds=predict_ms / 1000 if predict_ms else None,
            )
            for seed in seeds(settings.seed, n)
        ]
        self.tasks = [service.prepare(task) for task in tasks]
        self.usage = Usage()
        self.choices = [Choice(tool_text=ToolText(self._tools) if self._tools else None) for _ in tasks]
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": self.usage.created,
            "model": service.name,
            "system_fingerprint": fingerprint(),
        }

    def add(self, index: int, chunk: GenerationChunk) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
        """Notes a token. Returns the text to show, the log-probabilities of its tokens, and, at the end, the calls."""
        choice = self.choices[index]
        self.usage.add(index, chunk)
        text = chunk.text
        calls: list[dict[str, Any]] = []
        logprobs: list[dict[str, Any]] = []
        if chunk.logprob is not None and chunk.token not in self.tasks[index].settings.eos_token_ids:
            logprobs = [token_entry(self.service.tokenizer, chunk)]
        if choice.tool_text is not None:
            text = choice.tool_text.add(text)
            if chunk.finish_reason is not None:
                rest, calls = choice.tool_text.finish()
                text, calls = text + rest, calls if self._parallel else calls[:1]
        choice.text += text
        choice.calls += calls
        choice.logprobs += logprobs
        if chunk.finish_reason is not None:
            choice.finish_reason = "tool_calls" if calls else chunk.finish_reason
        return text, logprobs, calls

    def response(self) -> dict[str, Any]:
        """The body once all choices have ended."""
        choices = []
        for index, choice in enumerate(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            entry = {"index": index, "message": message, "finish_reason": choice.finish_reason, "logprobs": None}
            if self.tasks[index].settings.logprobs is not None:
                entry["logprobs"] = {"content": choice.logprobs, "refusal": None}
            choices.append(entry)
        usage = whole_usage(self.usage, self.tasks)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first token."""
        return [self._event(i, {"role": "assistant", "content": ""}) for i in range(len(self.choices))]

    def events(self, index: int, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The events of a token."""
        text, logprobs, calls = self.add(index, chunk)
        events = []
        if text or logprobs:
            events.append(self._event(index, {"content": text}, logprobs))
        for number, call in enumerate(calls):
            events.append(self._event(index, {"tool_calls": [{"index": number, **call}]}))
        if chunk.finish_reason is not None:
            events.append(self._event(index, {}, reason=self.choices[index].finish_reason))
        return events

    def closing(self) -> list[dict[str, Any]]:
        """The events after the last token."""
        if not self._include_usage:
            return []
        event = {**self._head, "object": "chat.completion.chunk", "choices": []}
        return [{**event, "usage": whole_usage(self.usage, self.tasks)}]

    def _event(
        self, index: int, delta: dict[str, Any], logprobs: list[dict[str, Any]] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        if logprobs:
            choice["logprobs"] = {"content": logprobs, "refusal": None}
        event = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return event | ({"usage": None} if self._include_usage else {})


def _message(body: Body) -> dict[str, Any]:
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


def _tools(body: Body) -> dict[str, Tool]:
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


def _limits(body: Body) -> dict[str, Any]:
    """max_tokens under both names; -1 and a missing one mean all that the context has room for."""
    limits = [body.integer(name, -1) for name in ("max_completion_tokens", "max_tokens")]
    given = next((limit for limit in limits if limit is not None), -1)
    if given == 0:
        body.refuse("max_completion_tokens" if limits[0] is not None else "max_tokens", "is 0, expected 1 or more")
    return {"max_tokens": 10**9 if given == -1 else given}


def _logprobs(body: Body) -> int | None:
    wanted, top = body.boolean("logprobs"), body.integer("top_logprobs", 0, 20)
    if top is not None and not wanted:
        body.refuse("top_logprobs", "is given without logprobs")
    return (top or 0) if wanted else None


def _identifiers(body: Body) -> None:
    """Fields that ask for nothing: names that a client gives, and values that are this server's own behaviour."""
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        body.string(name)
    body.object("metadata")
    body.only("store", False)
    body.only("service_tier", "auto", "default")
    body.only("modalities", ["text"])
    body.only("timings_per_token", False)
    body.only("verbosity", "medium")


def _render(service: Service, messages: list[dict[str, Any]], tools: Mapping[str, Tool]) -> list[int]:
    try:
        return service.tokenizer.apply_chat_template(messages, [tool.schema for tool in tools.values()] or None)
    except QwenMLXError as error:
        raise RequestError(400, str(error), "messages") from None
