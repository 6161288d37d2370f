"""POST /v1/chat/completions. Source: OpenAI's API reference, "Chat"."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import QwenMLXError
from ..generation.text import GenerationChunk
from ..generation.tools import Tool
from .body import Body
from .errors import RequestError
from .messages import read_message, tools_of
from .response_fields import chosen, response_fields
from .sampling_fields import MOST_STOPS, UNLIMITED, generation_settings, sampling_arguments, seeds, time_limits
from .service import Service, Task
from .structured_fields import forced_call, form_of
from .tool_text import ToolText
from .usage import Usage, fingerprint, token_entry, wants_usage, whole_usage

MOST_CHOICES = 16


@dataclass
class Choice:
    """An answer so far, or a part of it."""

    text: str = ""
    reasoning: str = ""
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
        self._include_usage = wants_usage(body, self.stream)
        service.check_model(body)
        messages = [read_message(one) for one in body.objects("messages")]
        if not messages:
            body.refuse("messages", "is empty, expected at least one message")
        service.check_length(*(message["content"] for message in messages))
        self._tools = tools_of(body)
        forced, form = forced_call(service, body, self._tools), form_of(service, body)
        if form is not None and self._tools:
            body.refuse("tools", "are given with a form for the answer; set tool_choice to 'none', or leave one out")
        self._parallel = body.boolean("parallel_tool_calls", True)
        arguments = _limits(body) | sampling_arguments(body)
        arguments["stop"] = body.strings("stop", MOST_STOPS)
        arguments["logprobs"] = _logprobs(body)
        n = body.integer("n", 1, MOST_CHOICES, 1) or 1
        read_only = body.integer("n_predict", 0, 0) == 0
        body.integer("id_slot", -1)  # all slots share one prefix cache, so that any is as good
        self._fields = response_fields(body)
        if self._fields and self.stream:
            body.refuse("response_fields", "is given with stream")
        use_cache = body.boolean("cache_prompt", True)
        times = time_limits(body)
        _identifiers(body)
        body.done()
        settings = replace(generation_settings(service, arguments), constraint=forced or form)
        ids = _render(service, messages, self._tools)
        tasks = [
            Task(ids, replace(settings, seed=seed), read_only=read_only, use_cache=use_cache, **times)
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

    def add(self, index: int, chunk: GenerationChunk) -> Choice:
        """Notes a token, and returns what it adds to its choice."""
        choice, new = self.choices[index], Choice(text=chunk.answer, reasoning=chunk.reasoning)
        self.usage.add(index, chunk)
        if chunk.logprob is not None and chunk.token not in self.tasks[index].settings.eos_token_ids:
            new.logprobs = [token_entry(self.service.tokenizer, chunk)]
        if choice.tool_text is not None:
            new.text = choice.tool_text.add(chunk.answer)
            if chunk.finish_reason is not None:
                rest, calls = choice.tool_text.finish()
                new.text, new.calls = new.text + rest, calls if self._parallel else calls[:1]
        if chunk.finish_reason is not None:
            new.finish_reason = "tool_calls" if new.calls else chunk.finish_reason
        choice.text += new.text
        choice.reasoning += new.reasoning
        choice.calls += new.calls
        choice.logprobs += new.logprobs
        choice.finish_reason = new.finish_reason
        return new

    def response(self) -> dict[str, Any]:
        """The body once all choices have ended."""
        choices = []
        for index, choice in enumerate(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            entry = {"index": index, "message": message, "finish_reason": choice.finish_reason, "logprobs": None}
            if self.tasks[index].settings.logprobs is not None:
                entry["logprobs"] = {"content": choice.logprobs, "refusal": None}
            choices.append(entry)
        usage = whole_usage(self.usage, self.tasks)
        body = {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}
        return chosen(body, self._fields)

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first token."""
        return [self._event(i, {"role": "assistant", "content": ""}) for i in range(len(self.choices))]

    def events(self, index: int, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The events of a token."""
        new, events = self.add(index, chunk), []
        if new.reasoning:
            events.append(self._event(index, {"reasoning_content": new.reasoning}))
        if new.text or new.logprobs:
            events.append(self._event(index, {"content": new.text}, new.logprobs))
        for number, call in enumerate(new.calls):
            events.append(self._event(index, {"tool_calls": [{"index": number, **call}]}))
        if new.finish_reason is not None:
            events.append(self._event(index, {}, reason=new.finish_reason))
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


def _limits(body: Body) -> dict[str, Any]:
    """max_tokens under both names; -1 and a missing one mean all that the context has room for."""
    limits = {name: body.integer(name, -1) for name in ("max_completion_tokens", "max_tokens")}
    given = body.same(limits)
    if given == 0:
        body.refuse(next(name for name, limit in limits.items() if limit == 0), "is 0, expected 1 or more")
    return {"max_tokens": UNLIMITED if given in (None, -1) else given}


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
