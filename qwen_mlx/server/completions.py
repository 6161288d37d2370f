"""POST /v1/completions, with `suffix` for fills. Source: OpenAI's API reference, "Completions"."""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import QwenMLXError
from ..generation.fill import fill_ends, fill_prompt
from ..generation.text import GenerationChunk
from .body import Body, short
from .errors import RequestError
from .sampling_fields import MOST_STOPS, UNLIMITED, generation_settings, sampling_arguments, seeds
from .service import Service, Task
from .structured_fields import form_of
from .usage import Usage, fingerprint, token_name, wants_usage, whole_usage

MOST_PROMPTS, MOST_CHOICES = 64, 16
DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass
class Choice:
    """One answer so far; `prompt` is echoed before it."""

    prompt: str
    text: str = ""
    finish_reason: str | None = None
    tokens: list[GenerationChunk] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


class CompletionRequest:
    """A request, its tasks, and its answer in OpenAI's shape, at once or as events of a stream. Raises RequestError
    for a body that is not served."""

    path = "/v1/completions"

    def __init__(self, service: Service, body: Body) -> None:
        self.service = service
        self.stream = body.boolean("stream")
        self._include_usage = wants_usage(body, self.stream)
        service.check_model(body)
        prompts = _prompts(body)
        suffix = body.string("suffix")
        echo = body.boolean("echo")
        limit = body.integer("max_tokens", -1, default=DEFAULT_MAX_TOKENS)
        arguments = {"max_tokens": UNLIMITED if limit == -1 else max(1, limit or 0)} | sampling_arguments(body)
        arguments["stop"] = body.strings("stop", MOST_STOPS)
        arguments["logprobs"] = _logprobs(body)
        n = body.integer("n", 1, MOST_CHOICES, 1) or 1
        body.only("best_of", n)
        for name in ("user", "safety_identifier"):
            body.string(name)
        form = form_of(service, body)
        body.done()
        if arguments["logprobs"] is not None and echo:
            body.refuse("echo", "is true with logprobs, and those of a prompt are not computed; leave one out")
        settings = replace(generation_settings(service, arguments), constraint=form)
        self.tasks: list[Task] = []
        self.choices: list[Choice] = []
        for prompt in prompts:
            ids, own = self._encode(prompt, suffix), settings
            if suffix is not None:
                own = replace(settings, eos_token_ids=fill_ends(service.tokenizer))
            text = ""
            if echo:
                text = prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, skip_special=False)
            for seed in seeds(own.seed, n):
                task = Task(ids, replace(own, seed=seed), read_only=limit == 0)
                self.tasks.append(service.prepare(task))
                self.choices.append(Choice(text))
        self.usage = Usage()
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": self.usage.created,
            "model": service.name,
            "system_fingerprint": fingerprint(),
        }

    def _encode(self, prompt: str | list[int], suffix: str | None) -> list[int]:
        tokenizer = self.service.tokenizer
        if isinstance(prompt, str):
            self.service.check_length(prompt, suffix or "")
        if suffix is None:
            ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt, allow_special=True)
            if not ids:
                raise RequestError(400, "prompt is empty, expected at least one character.", "prompt")
            return ids
        if not isinstance(prompt, str):
            raise RequestError(
                400, "prompt is a list of token ids, expected a string where there is a suffix.", "prompt"
            )
        try:
            return fill_prompt(tokenizer, prompt, suffix, max_prompt_tokens=sys.maxsize)  # nothing is cut in silence
        except QwenMLXError as error:
            raise RequestError(400, str(error), "suffix") from None

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Notes a token."""
        choice = self.choices[index]
        self.usage.add(index, chunk)
        if chunk.token >= 0 and chunk.token not in self.tasks[index].settings.eos_token_ids:
            choice.tokens.append(chunk)
            choice.offsets.append(len(choice.prompt) + len(choice.text))
        choice.text += chunk.text
        choice.finish_reason = chunk.finish_reason or choice.finish_reason

    def response(self) -> dict[str, Any]:
        """The body once all choices have ended."""
        choices = [
            self._choice(i, choice.prompt + choice.text, choice.finish_reason, choice.tokens, choice.offsets)
            for i, choice in enumerate(self.choices)
        ]
        return {**self._head, "choices": choices, "usage": whole_usage(self.usage, self.tasks)}

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first token: prompts that are echoed."""
        return [self._event(self._choice(i, c.prompt, None, [], [])) for i, c in enumerate(self.choices) if c.prompt]

    def events(self, index: int, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The events of a token."""
        choice = self.choices[index]
        before = len(choice.tokens)
        self.add(index, chunk)
        tokens, offsets = choice.tokens[before:], choice.offsets[before:]
        wants_token = tokens and self.tasks[index].settings.logprobs is not None
        if not (chunk.text or chunk.finish_reason or wants_token):
            return []
        return [self._event(self._choice(index, chunk.text, chunk.finish_reason, tokens, offsets))]

    def closing(self) -> list[dict[str, Any]]:
        """The events after the last token."""
        usage = whole_usage(self.usage, self.tasks)
        return [{**self._head, "choices": [], "usage": usage}] if self._include_usage else []

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice]} | ({"usage": None} if self._include_usage else {})

    def _choice(
        self, index: int, text: str, reason: str | None, tokens: list[GenerationChunk], offsets: list[int]
    ) -> dict[str, Any]:
        logprobs = None
        if self.tasks[index].settings.logprobs is not None:
            tokenizer = self.service.tokenizer
            logprobs = {
                "tokens": [token_name(tokenizer, chunk.token) for chunk in tokens],
                "token_logprobs": [chunk.logprob for chunk in tokens],
                "top_logprobs": [{token_name(tokenizer, i): p for i, p in chunk.top_logprobs} for chunk in tokens],
                "text_offset": offsets,
            }
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def _prompts(body: Body) -> list[str | list[int]]:
    """A string, a list of strings, a list of ids or a list of such lists, as a list of prompts."""
    value = body.take("prompt")
    prompts = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not 1 <= len(prompts) <= MOST_PROMPTS or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        expected = f"a string, a list of token ids, or a list of up to {MOST_PROMPTS} of either"
        body.refuse("prompt", f"is {short(value)}, expected {expected}")
    return prompts


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _logprobs(body: Body) -> int | None:
    value = body.take("logprobs")
    if value is False or value is None:
        return None
    if type(value) is not int or not 0 <= value <= 20:
        body.refuse("logprobs", f"is {short(value)}, expected an integer from 0 to 20")
    return int(value)
