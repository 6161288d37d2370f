"""llama.cpp's routes: /infill, /completion, /props, /tokenize, /detokenize. Source: llama.cpp's tools/server/README.md,
and the requests of llama.vim (autoload/llama.vim), llama.vscode (src/llama-server.ts) and Continue (core/llm/llms)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

from .. import __version__
from ..errors import QwenMLXError
from ..generation.fill import MIDDLE, FillStop, fill_ends, fill_prompt
from ..generation.text import GenerationChunk
from ..generation.tools import OPEN
from .body import Body, short
from .errors import RequestError
from .response_fields import chosen, response_fields
from .sampling_fields import (
    MOST_STOPS,
    UNLIMITED,
    defaults,
    generation_settings,
    sampling_arguments,
    seeds,
    time_limits,
)
from .service import Service, Task
from .structured_fields import form_of
from .usage import Usage

MOST_FILES, MOST_CHOICES = 256, 16
FILL_TOKENS = 128  # of a fill whose request sets no limit, as llama.vim and llama.vscode ask for


@dataclass
class Answer:
    """An answer so far; reason: llama.cpp's word for why it ended."""

    text: str = ""
    reason: str = "none"


class NativeRequest:
    """A request to /infill or /completion, its tasks, and its answers in llama.cpp's shape, at once or as events of a
    stream. Raises RequestError for a body that is not served."""

    def __init__(self, service: Service, body: Body, *, infill: bool) -> None:
        self.service, self.path = service, "/infill" if infill else "/completion"
        self.stream, self._truncated = body.boolean("stream"), False
        service.check_model(body)
        given = body.same({name: body.integer(name, -2) for name in ("n_predict", "max_tokens")})
        limit = (FILL_TOKENS if infill else -1) if given is None else given
        arguments = {"max_tokens": UNLIMITED if limit < 0 else max(1, limit)} | sampling_arguments(body)
        arguments["stop"] = body.strings("stop", MOST_STOPS)
        if infill and arguments["temperature"] is None:
            arguments["temperature"] = 0.0  # a fill is the likeliest text unless a temperature is asked for
        if body.boolean("ignore_eos"):
            arguments["min_tokens"] = arguments["max_tokens"]
        self._fields = response_fields(body)
        use_cache = body.boolean("cache_prompt", True)
        times = time_limits(body)
        n_indent = body.integer("n_indent", 0, 1000, 0) or 0
        self._count = body.same({name: body.integer(name, 1, MOST_CHOICES) for name in ("n_cmpl", "n")}) or 1
        body.integer("id_slot", -1)  # all slots share one prefix cache, so that any is as good
        for name, nothing in (("n_keep", 0), ("n_probs", 0), ("n_discard", 0)):
            body.only(name, nothing)
        for name in ("return_tokens", "return_progress", "timings_per_token", "post_sampling_probs"):
            body.only(name, False)
        body.only("grammar", "")
        form = form_of(service, body)
        body.only("lora", [])
        make = self._infill if infill else self._completion
        texts = make(body)
        body.done()
        settings = replace(generation_settings(service, arguments), constraint=form)
        if infill:
            settings = replace(settings, eos_token_ids=self._ends())
        # A limit without bound takes what the prompt leaves; else the context is cut so that the answer has room.
        ids = self._ids(texts, settings.max_tokens) if infill else texts
        task = Task(
            ids,
            settings,
            read_only=limit == 0,
            use_cache=use_cache,
            fill_stop=FillStop(indent=n_indent) if n_indent else None,
            **times,
        )
        # Greedy answers to one prompt are the same: one is computed.
        numbers = [settings.seed] if settings.sampling.greedy else seeds(settings.seed, self._count)
        tasks = [replace(task, settings=replace(settings, seed=seed)) for seed in numbers]
        self.tasks = [service.prepare(task) for task in tasks]
        self.usage, self._answers = Usage(), [Answer() for _ in tasks]

    def _infill(self, body: Body) -> Any:
        around = [body.string(f"input_{name}") for name in ("prefix", "suffix")]
        files = []
        for one in body.objects("input_extra", []):
            text, name = one.string("text"), one.string("filename", "filename") or "filename"
            if text is None:
                one.refuse("text", "is missing, expected a string")
            one.take("time")  # when the editor saw the text: llama.vim sends it, nobody reads it
            one.done()
            files.append((name, text))
        if around == [None, None]:
            body.refuse("input_prefix", "and input_suffix are missing, expected one of them or both")
        prefix, suffix = (text or "" for text in around)
        return prefix, suffix, files[-MOST_FILES:], body.string("prompt", "") or ""

    def _completion(self, body: Body) -> list[int]:
        prompt = body.take("prompt")
        if isinstance(prompt, str) and prompt:
            self.service.check_length(prompt)
            return self.service.tokenizer.encode(prompt, allow_special=True)
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            body.refuse("prompt", f"is {short(prompt)}, expected a string or a list of token ids, not empty")
        return prompt

    def _ends(self) -> tuple[int, ...]:
        try:
            return fill_ends(self.service.tokenizer)
        except QwenMLXError as error:
            raise RequestError(501, str(error)) from None

    def _ids(self, texts: Any, max_tokens: int) -> list[int]:
        prefix, suffix, files, prompt = texts
        tokenizer, context = self.service.tokenizer, self.service.model.config.context_length
        after = tokenizer.encode(prompt)
        most = context - min(max_tokens, context // 2) - len(after)
        try:
            ids = fill_prompt(tokenizer, prefix, suffix, files=files, max_prompt_tokens=most)
            if sum(map(len, (prefix, suffix, *(text for _, text in files)))) > self.service.most_characters:
                self._truncated = True
            elif len(ids) > most // 3:  # less is never cut
                self._truncated = ids != fill_prompt(
                    tokenizer, prefix, suffix, files=files, max_prompt_tokens=sys.maxsize
                )
        except QwenMLXError as error:
            raise RequestError(400, str(error)) from None
        return ids + after

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Notes a token."""
        self.usage.add(index, chunk)
        answer = self._answers[index]
        answer.text += chunk.text
        if chunk.finish_reason == "length":
            answer.reason = "limit"
        elif chunk.finish_reason == "stop":
            answer.reason = "eos" if chunk.token in self.tasks[index].settings.eos_token_ids else "word"

    def response(self) -> dict[str, Any] | list[dict[str, Any]]:
        """The body once all answers have ended: a list where several are asked for."""
        answers = [chosen(self._final(place % len(self.tasks), place), self._fields) for place in range(self._count)]
        return answers[0] if self._count == 1 else answers

    def opening(self) -> list[dict[str, Any]]:
        """The events before the first token: none."""
        return []

    def events(self, index: int, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """The events of a token."""
        self.add(index, chunk)
        events = []
        for place in range(index, self._count, len(self.tasks)):
            if chunk.text:
                stats = chunk.stats
                event = {"index": place, "content": chunk.text, "stop": False, "id_slot": -1}
                read = stats.prompt_tokens + stats.reused_tokens
                events.append(event | {"tokens_predicted": stats.generated_tokens, "tokens_evaluated": read})
            if chunk.finish_reason is not None:
                events.append(chosen(self._final(index, place) | {"content": ""}, self._fields))
        return events

    def closing(self) -> list[dict[str, Any]]:
        """The events after the last token: none."""
        return []

    def _final(self, index: int, place: int) -> dict[str, Any]:
        """An answer with what llama.cpp says about it; place: its number among those that are asked for."""
        task, stats, answer = self.tasks[index], self.usage.stats[index], self._answers[index]
        return {
            "index": place,
            "content": answer.text,
            "stop": True,
            "id_slot": -1,
            "model": self.service.name,
            "tokens_predicted": stats.generated_tokens,
            "tokens_evaluated": len(task.ids),
            "tokens_cached": stats.reused_tokens,
            "generation_settings": defaults(task.settings.sampling) | {"n_predict": task.settings.max_tokens},
            "has_new_line": "\n" in answer.text,
            "truncated": self._truncated,
            "stop_type": answer.reason,
            "stopping_word": "",
            "timings": _timings(stats.prompt_tokens, stats.prompt_seconds, "prompt")
            | {"cache_n": stats.reused_tokens}
            | _timings(stats.generated_tokens, stats.generation_seconds, "predicted"),
        }


def _timings(count: int, seconds: float, name: str) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": 1000 * seconds,
        f"{name}_per_token_ms": 1000 * seconds / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds else 0.0,
    }


def props(service: Service) -> dict[str, Any]:
    """The body of GET /props."""
    tokenizer, config = service.tokenizer, service.model.config
    template = tokenizer.chat_template or ""
    end = min(tokenizer.eos_token_ids)
    return {
        "default_generation_settings": {
            "params": defaults(service.model.generation_defaults),
            "n_ctx": config.context_length,
        },
        "total_slots": service.scheduler.slots,
        "model_alias": service.name,
        "chat_template": template,
        "chat_template_caps": {"supports_tools": OPEN in template},
        "modalities": {"vision": False, "audio": False},
        "bos_token": tokenizer.special_tokens.get("bos_token", ""),
        "eos_token": tokenizer.names[end],
        "fills": MIDDLE in tokenizer.special,
        "build_info": f"qwen_mlx {__version__}",
    }


def tokenize(service: Service, body: Body) -> dict[str, Any]:
    """The answer to POST /tokenize."""
    text = body.take("content")
    if not isinstance(text, str):
        body.refuse("content", f"is {short(text)}, expected a string")
    add_special, parse_special = body.boolean("add_special"), body.boolean("parse_special", True)
    with_pieces = body.boolean("with_pieces")
    body.done()
    tokenizer = service.tokenizer
    ids = tokenizer.encode(text, allow_special=parse_special)
    if add_special:
        ids = tokenizer.with_prefix(ids)
    if not with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": i, "piece": _piece(tokenizer.token_bytes(i))} for i in ids]}


def _piece(raw: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


def detokenize(service: Service, body: Body) -> dict[str, Any]:
    """The answer to POST /detokenize."""
    ids = body.take("tokens")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        body.refuse("tokens", f"is {short(ids)}, expected a list of token ids")
    body.done()
    return {"content": service.tokenizer.decode(ids, skip_special=False)}
