"""A conversation with a model: its messages, the part of them that is computed already, and tools to call."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import GeneratorType
from typing import Any

from ..errors import QwenMLXError, check_integer, refuse_unknown, refuses_wrong_arguments
from ..model import display
from ..model.qwen2 import Qwen2
from ..parallel.control import on_first
from ..text.files import LARGEST_JSON, atomic_write, read_text
from ..text.tokenizer import Tokenizer
from .engine import GenerationStats, Progress
from .prompt_cache import PromptCache
from .settings import Draft
from .structured import Constraint, tool_call_constraint
from .text import GenerationChunk, check_caches, settings_of, stream
from .tools import Tool, ToolCall, parse_tool_calls, run, tools_by_name

ROLES = ("system", "user", "assistant", "tool")


def read_messages(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The messages of a file that `Chat.save` wrote, or of any JSON list of {"role", "content"}; an assistant's may
    have "ids". Raises QwenMLXError naming the message that is something else."""
    where = Path(path)
    text = read_text(str(where), largest=LARGEST_JSON)
    try:
        data = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise QwenMLXError(f"{where}: not valid JSON in UTF-8 ({error}).") from None
    if not isinstance(data, list):
        raise QwenMLXError(f"{where}: not a conversation, which is a list of messages.")
    messages = []
    for i, entry in enumerate(data):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if role not in ROLES or not isinstance(content, str) or (role == "system" and i > 0):
            raise QwenMLXError(
                f"{where}: message {i} is {str(entry)[:80]!r}, expected a 'role' among {', '.join(ROLES)} (system only "
                "first) and a 'content' that is text."
            )
        try:
            content.encode()
        except UnicodeEncodeError:
            raise QwenMLXError(f"{where}: message {i} holds a lone surrogate, which is not a character.") from None
        messages.append({"role": role, "content": content})
        ids = entry.get("ids")
        if role == "assistant" and isinstance(ids, list) and all(type(token) is int for token in ids):
            messages[-1]["ids"] = ids
    return messages


@dataclass(frozen=True)
class ToolResult:
    """A tool call of the model and the text that it got for an answer."""

    call: ToolCall
    text: str


Turn = Generator[GenerationChunk | ToolResult, None, None]


class Chat:
    """A conversation. Every token of it is computed once: answers stay the ids that the model made, and each turn
    continues the prompt cache.

        chat = Chat(model, tokenizer, tools=[get_weather])
        for chunk in chat.send("Hi"):
            print(chunk.text, end="")

    tools: Python functions with type hints and Google docstrings, or JSON schemas.
    tool_choice: "auto", "required" (a turn begins with a call) or the name of the tool that it calls.
    max_tool_rounds: answers of a turn whose calls are run.
    seed: of the first answer; the next takes seed + 1.

    The other arguments are stream_generate's. Raises QwenMLXError for an argument that stream_generate refuses, a tool
    that cannot be described, or tools that the model's chat template ignores.

    messages: {"role", "content"} in order, the system message first if there is one; an assistant's has "ids" too.
    turn: statistics of the last turn's generations, one more than it had rounds of tool calls.
    settings, progress: of the next answer.
    """

    @refuses_wrong_arguments
    def __init__(
        self,
        model: Qwen2,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Sequence[Callable[..., Any] | Mapping[str, Any] | Tool] = (),
        tool_choice: str = "auto",
        max_tool_rounds: int = 5,
        max_tokens: int = 512,
        min_tokens: int = 0,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        reasoning_budget: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        typical_p: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        xtc_probability: float | None = None,
        xtc_threshold: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        seed: int | None = None,
        prompt_cache: PromptCache | None = None,
        draft_model: Draft | Qwen2 | str | None = None,
        num_draft_tokens: int | None = None,
        prefill_step_size: int | None = None,
        progress: Progress | None = None,
    ):
        self.settings = settings_of(model, tokenizer, locals())
        self.max_tool_rounds = check_integer("max_tool_rounds", max_tool_rounds, 1, float("inf"), "1 or more")
        self.model, self.tokenizer, self.progress = model, tokenizer, progress
        self.tools = tools_by_name(tools)
        self._forced: Constraint | None = None
        if tool_choice != "auto":
            if tool_choice != "required":
                refuse_unknown([tool_choice], self.tools, "tool")
            chosen = [tool for name, tool in self.tools.items() if tool_choice in ("required", name)]
            self._forced = tool_call_constraint(tokenizer, chosen)
        self.prompt_cache = PromptCache(model) if prompt_cache is None else prompt_cache
        check_caches(model, self.settings, None, self.prompt_cache)
        self.messages: list[dict[str, Any]] = []
        self.turn: list[GenerationStats] = []
        self._running: weakref.ref[Turn] | None = None
        self.system = system
        if self.tools and self._render([{"role": "user", "content": ""}]) == tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}]
        ):
            raise QwenMLXError("The model's chat template knows no tools; leave them out, or take an Instruct model.")

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {len(self.prompt_cache.ids)} tokens computed)"

    def _repr_html_(self) -> str:
        return display.table([(message["role"], message["content"]) for message in self.messages], repr(self))

    @property
    def system(self) -> str | None:
        """The system message; None is the chat template's own. Setting it keeps the rest of the conversation."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[1:] if self.system is not None else self.messages
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + rest

    @refuses_wrong_arguments
    def send(self, text: str) -> Turn:
        """Adds the user's message and yields the answer as stream_generate does, and a ToolResult for every tool call.

        Closed or interrupted, what was answered so far stays in the conversation; a message without any answer is
        taken out again. Raises QwenMLXError as stream_generate.
        """
        if not isinstance(text, str):
            raise QwenMLXError(f"The message is {type(text).__name__}, expected a string.")
        if not text:
            raise QwenMLXError("The message is empty; give at least one character.")
        return self._begin(self._send(text))

    def _begin(self, turn: Turn) -> Turn:
        self._end()
        self._running = weakref.ref(turn)  # a turn that nobody refers to ends by itself
        return turn

    def _end(self) -> None:
        """Ends a turn that is under way, so that the conversation is complete before it changes."""
        turn = None if self._running is None else self._running()
        if isinstance(turn, GeneratorType) and not turn.gi_running:
            turn.close()

    def _send(self, text: str) -> Turn:
        self.turn = []
        self.messages.append({"role": "user", "content": text})
        yield from self._answer()

    def retry(self) -> Turn:
        """Answers the last user's message again; interrupted before a token is made, the old answer stays. Raises
        QwenMLXError if there is none."""
        if not self.questions:
            self.undo()  # says so
        return self._begin(self._retry())

    def _retry(self) -> Turn:
        before = list(self.messages)
        question = self.undo()
        try:
            yield from self._send(question)
        finally:
            if not self.turn:
                self.messages = before

    def undo(self) -> str:
        """Takes the last user's message and what came after it out, and returns it. Raises QwenMLXError if there is
        none."""
        return self.edit(max(len(self.questions), 1))

    @refuses_wrong_arguments
    def edit(self, number: int) -> str:
        """Takes the user's message `number`, from 1, and what came after it out, and returns it, to be sent again."""
        self._end()
        questions = self.questions
        if not 1 <= number <= len(questions):
            has = f"{len(questions)} of yours" if questions else "no message of yours yet"
            raise QwenMLXError(f"There is no message {number}; the conversation has {has}.")
        at = questions[number - 1]
        text: str = self.messages[at]["content"]
        del self.messages[at:]
        return text

    @property
    def questions(self) -> list[int]:
        """Indices of the user's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def clear(self) -> None:
        """Forgets everything but the system message."""
        self._end()
        del self.messages[0 if self.system is None else 1 :]

    @refuses_wrong_arguments
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the messages as a JSON list; the file appears whole or not at all. Raises QwenMLXError if it cannot be
        written."""
        with atomic_write(path) as file:
            file.write_text(json.dumps(self.messages, ensure_ascii=False, indent=1), encoding="utf-8")

    @refuses_wrong_arguments
    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes the messages of a file that `save` wrote, or any JSON list of {"role", "content"}, in place of these.

        Ids that are not what the tokenizer reads the content from, or that hold a control token, are left out. Raises
        QwenMLXError, and changes nothing, for a file that is something else."""
        messages = read_messages(path)
        self._end()
        vocabulary = range(min(self.tokenizer.vocab_size, self.model.config.vocab_size))
        for message in messages:
            ids = message.get("ids", [])
            if any(i not in vocabulary for i in ids) or self._text(ids, False) != message["content"]:
                message.pop("ids", None)
        self.messages = messages

    def _render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self.tokenizer.apply_chat_template(messages, [tool.schema for tool in self.tools.values()] or None)

    def _answer(self) -> Turn:
        """Answers the last message, and the results of its tool calls, until there are none."""
        previous = None
        for rounds in range(self.max_tool_rounds + 1):
            answer: dict[str, Any] = {"role": "assistant", "content": "", "ids": []}
            spoken = ""  # without thoughts, in which a call is not meant
            try:
                with contextlib.closing(self._generate()) as chunks:
                    for chunk in chunks:
                        self.turn[rounds:] = [chunk.stats]
                        answer["content"] += chunk.text
                        spoken += chunk.answer
                        answer["ids"] += [] if chunk.token in self.settings.eos_token_ids else [chunk.token]
                        yield chunk
            finally:
                if len(self.turn) > rounds:
                    self.messages.append(self._as_written(answer))
                elif rounds == 0:
                    self.messages.pop()
            calls = parse_tool_calls(spoken, self.tools) if self.tools else []
            if not calls:
                return
            refused = None
            if rounds == self.max_tool_rounds:
                refused = f"error: not run, the limit of {rounds} rounds of tool calls is reached"
            elif answer["content"] == previous and any(call.error for call in calls):
                refused = "error: not run, the same answer was wrong before"
            previous = answer["content"]
            for call in calls:
                result = "error: interrupted"
                try:
                    result = refused or on_first(functools.partial(self._result, call))
                finally:
                    self.messages.append({"role": "tool", "content": result})
                yield ToolResult(call, result)
            if refused:
                return

    def _result(self, call: ToolCall) -> str:
        """A tool's answer, or an error in place of one that would leave no room in the model's context."""
        result = run(call, self.tools)
        most = self.model.config.context_length // 2
        if len(result) <= most or (len(result) <= 16 * most and len(self.tokenizer.encode(result)) <= most):
            return result
        return f"error: the result has {len(result)} characters, more than the {most} tokens that there is room for"

    def _text(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text that `ids` continue a conversation with."""
        stream = self.tokenizer.detokenizer(skip_special)
        return "".join([*map(stream.add, ids), stream.finish()])

    def _as_written(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with the ids that make its text: a stop string or a Ctrl-C may leave more, or half a character.
        Without any ids if none make the very text."""
        text, ids = answer["content"], answer["ids"]
        for end in range(len(ids), max(len(ids) - 16, -1), -1):
            if self._text(ids[:end]) == text:
                return answer | {"ids": ids[:end]}
        return {"role": answer["role"], "content": text}

    def _generate(self) -> Generator[GenerationChunk, None, None]:
        settings, ids = self.settings, self._render(self.messages)
        if settings.seed is not None:
            self.settings = replace(settings, seed=(settings.seed + 1) % 2**64)
        if self._forced is not None and self.messages[-1]["role"] == "user":
            settings = replace(settings, constraint=self._forced)
        return stream(self.model, self.tokenizer, ids, settings, prompt_cache=self.prompt_cache, progress=self.progress)
