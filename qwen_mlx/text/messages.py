"""Messages as OpenAI's API delivers them, in the form that a chat template takes.

Templates differ in what they take: text parts, the absence of a content, the arguments of a tool call as text or as an
object. A template tells by rendering small conversations, as llama.cpp asks its templates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import QwenMLXError

# JSON's scalars, and what makes an instance of a subclass one of them; nothing is a subclass of bool.
SCALARS: dict[type, Callable[[Any], Any]] = {bool: bool, int: int.__int__, float: float.__float__, str: str.__str__}
ROLES = ("system", "user", "assistant", "tool")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first is the one that templates read
Message = dict[str, Any]
Render = Callable[[list[Message]], str]
SYSTEM = {"role": "system", "content": "a system's text"}
FUNCTION = {
    "name": "probed_function",
    "description": "a description",
    "parameters": {"type": "object", "properties": {"key": {"type": "integer", "description": "a number"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]


class Accepted:
    """The forms of a message that a template takes, each found when it is first asked for.

    render: gives a conversation's text with the variables, and tools if there are any, of the real one; begins:
    messages before every probe, as a template may need a system's.
    """

    def __init__(self, render: Render, source: str, begins: Sequence[Message] = ()):
        self._render, self._begins = render, list(begins)
        self._names_developer = "developer" in source
        self.function_call = "function_call" in source  # OpenAI's older form of a tool call
        self._parts: dict[str, bool] = {}
        self._written: dict[tuple[str, bool], bool] = {}

    def rendered(self, messages: list[Message]) -> str | None:
        """The text of `messages`, None if the template refuses them."""
        try:
            return self._render(messages)
        except Exception:  # it can raise anything
            return None

    def parts(self, role: str) -> bool:
        """True if lists of text parts are written in a message of this role: one as its text, and all of several."""
        if role not in self._parts:
            forms = ("a text", [_part("a text")], [_part("some text "), _part("and more")])
            text, one, two = (self.rendered(self._said(role, form)) for form in forms)
            whole = two is not None and "some text " in two and "and more" in two
            self._parts[role] = (
                text is not None and text == one and whole and not re.search("['\"]type['\"]", two or "")
            )
        return self._parts[role]

    def _said(self, role: str, content: Any) -> list[Message]:
        """A conversation in which this role says `content`."""
        if role == "tool":
            return [*self._begins, *_called({}, self.no_content, content)]
        before = [] if role == "system" else self._begins
        before = before + [{"role": "user", "content": "a text"}] * (role == "assistant")
        return [*before, {"role": role, "content": content}]

    def writes(self, role: str, first: bool) -> bool:
        """True unless the template takes a message of the role `system` or `tool` and leaves out what it says; `first`:
        the message begins the conversation."""
        if (role, first) not in self._written:
            question, text = {"role": "user", "content": "a text"}, "probed text"
            messages = [*self._said(role, text), question]
            if role == "system" and not first:
                messages = [*self._begins, question, {"role": "assistant", "content": "a text"}, *messages]
            written = self.rendered(messages)
            self._written[role, first] = written is None or text in written
        return self._written[role, first]

    @functools.cached_property
    def developer(self) -> bool:
        """True if the template names the role `developer` and writes what it says."""
        messages = [{"role": "developer", "content": "probed text"}, {"role": "user", "content": "a text"}]
        return self._names_developer and "probed text" in (self.rendered(messages) or "")

    def _call(self, arguments: Any, content: Message) -> str:
        """The text of a call, in an answer with this content."""
        return self.rendered([*self._begins, *_called(arguments, content, "a result")]) or ""

    @functools.cached_property
    def no_content(self) -> Message:
        """The content of an answer that only calls tools: nothing, None or an empty text."""
        forms: tuple[Message, ...] = ({}, {"content": None}, {"content": ""})
        written = (form for form in forms if self._writes_calls(form))
        return next(written, next((form for form in forms if self._call({}, form)), {"content": ""}))

    def _writes_calls(self, content: Message) -> bool:
        return any(_is_written(self._call(arguments, content)) for arguments in ({"key": 13570}, '{"key": 13570}'))

    @functools.cached_property
    def calls(self) -> bool:
        """True if a call is written."""
        return self._writes_calls(self.no_content)

    @functools.cached_property
    def text_arguments(self) -> bool:
        """True if arguments that are JSON text are written as they are."""
        return '{"key":13570}' in self._call('{"key":13570}', self.no_content)

    @functools.cached_property
    def object_arguments(self) -> bool:
        """True if arguments that are an object are written, and not as Python writes a dict."""
        text = self._call({"key": 13570}, self.no_content)
        return _is_written(text) and "{'key'" not in text

    def drops(self, messages: list[Message], i: int) -> bool:
        """True if the template writes the same whatever message `i` says."""
        other = {**messages[i], "content": "a text" if messages[i].get("content") != "a text" else "another text"}
        text = self.rendered(messages)
        return text is not None and text == self.rendered([*messages[:i], other, *messages[i + 1 :]])


def _is_written(text: str) -> bool:
    """True if a text has a probe's arguments, by their names or by their values alone."""
    return "key" in text or "13570" in text


def _called(arguments: Any, content: Message, result: Any) -> list[Message]:
    """A call between a question and the call's result; content: of the answer that calls."""
    function = {"name": "probed_function", "arguments": arguments}
    call = {"id": "call00000", "type": "function", "function": function}
    answer = {"role": "assistant", "tool_calls": [call], **content}
    returned = {"role": "tool", "content": result, "tool_call_id": "call00000", "name": "probed_function"}
    return [{"role": "user", "content": "a text"}, answer, returned]


def plain_data(value: Any, what: str) -> Any:
    """A copy of `value` of JSON's types and tuples, as transformers makes one; the guard of control tokens marks no
    others.

    Instances of subclasses become plain, dataclasses and pydantic's models dicts, NumPy's numbers Python's. Raises
    QwenMLXError naming `what` for any other value.
    """
    if value is None or type(value) in SCALARS:
        return value
    if kind := next((kind for kind in SCALARS if isinstance(value, kind)), None):
        return SCALARS[kind](value)
    if isinstance(value, Mapping):
        return {plain_data(key, what): plain_data(item, what) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item, what) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item, what) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name), what) for field in dataclasses.fields(value)}
    for name in ("model_dump", "item"):  # of pydantic, and of NumPy's numbers
        if callable(method := getattr(value, name, None)) and not isinstance(value, type):
            with contextlib.suppress(Exception):  # such as an array of several numbers
                return plain_data(method(), what)
    raise QwenMLXError(
        f"A value of the type {type(value).__name__} is in {what}, expected text, numbers, lists and dicts."
    )


def normalized(messages: Any, accepted: Accepted) -> list[Message]:
    """The messages in the form that the template takes.

    Keys whose value is None are left out, as transformers does; `developer` is `system` for a template that does not
    name it; text parts are joined and a call's arguments become an object, or the other way round, unless the template
    takes them as they are; `function_call` and the role `function`, OpenAI's older form, become a tool call and its
    result. Warns of what the template leaves out: tool calls, their results, systems' messages, or another role than
    those of ROLES. Raises QwenMLXError for what is no message, or holds other parts than text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise QwenMLXError(f"The messages are {type(messages).__name__}, expected a list of dicts.")
    if not messages:
        raise QwenMLXError("There are no messages, expected one at least.")
    dicts = [_dict(message) for message in messages]
    plain = [_normalized(message, accepted) for message in (dicts if accepted.function_call else _tool_calls(dicts))]
    left_out = list(dict.fromkeys(name for i in range(len(plain)) for name in _left_out(plain, i, accepted)))
    if left_out:
        warnings.warn(f"The model's chat template leaves out {' and '.join(left_out)}.", stacklevel=2)
    return plain


def _left_out(messages: list[Message], i: int, accepted: Accepted) -> Iterator[str]:
    """Names what the template leaves out of message `i`."""
    role = messages[i]["role"]
    if role == "system" and not accepted.writes(role, i == 0):
        yield "systems' messages" + " within a conversation" * (i > 0)
    elif role == "tool" and not accepted.writes(role, False):
        yield "results of tool calls"
    elif role not in ROLES and accepted.drops(messages, i):
        yield f"the role {role!r}"
    if messages[i].get("tool_calls") and not accepted.calls:
        yield "tool calls"


def _dict(message: Any) -> Message:
    """A message without the keys whose value is None."""
    try:
        message = plain_data(message, "a message")
    except RecursionError:
        raise QwenMLXError("A message nests its lists or objects too deeply; make it flatter.") from None
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise QwenMLXError(f"A message is {_short(message)}, expected a dict with 'role' and 'content'.")
    plain = {key: value for key, value in message.items() if value is not None}
    ids = plain.get("ids", [])
    if not isinstance(ids, list | tuple) or not all(type(i) is int and i >= 0 for i in ids):
        raise QwenMLXError(
            f"The 'ids' of a message are {_short(ids)}, expected the token ids that its content was generated as."
        )
    return plain


def _tool_calls(messages: list[Message]) -> list[Message]:
    """Messages with OpenAI's older `function_call`, and the role `function` for its result, as tool calls."""
    changed, pending = [], 0
    for message in messages:
        if "function_call" in message and message["role"] == "assistant":
            pending += 1
            call = {"id": f"call{pending:05}", "type": "function", "function": message["function_call"]}
            others = {key: value for key, value in message.items() if key != "function_call"}
            message = {**others, "tool_calls": [*_list(message.get("tool_calls", [])), call]}
        elif message["role"] == "function" and pending:
            message = {**message, "role": "tool", "tool_call_id": f"call{pending:05}"}
        changed.append(message)
    return changed


def _normalized(message: Message, accepted: Accepted) -> Message:
    plain = dict(message)
    if plain["role"] == "developer" and not accepted.developer:
        plain["role"] = "system"
    reasoning = next((plain[name] for name in REASONING_FIELDS if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    if "content" in plain:
        plain["content"] = _content(plain["content"], plain["role"], accepted)
    elif plain["role"] != "assistant":
        raise QwenMLXError(f"The message of the role {plain['role']!r} has no content, expected a string.")
    else:
        plain |= accepted.no_content if plain.get("tool_calls") else {"content": ""}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_call(call, accepted) for call in _list(plain["tool_calls"])]
    return plain


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _content(content: Any, role: str, accepted: Accepted) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise QwenMLXError(f"The content of a message is {_short(content)}, expected a string or a list of text parts.")
    wrong = [part for part in content if not _is_text(part)]
    if wrong:
        kind = wrong[0].get("type", wrong[0]) if isinstance(wrong[0], Mapping) else wrong[0]
        raise QwenMLXError(
            f"A part of a message is {_short(kind)}, expected {{'type': 'text', 'text': ...}}; this is a model of text."
        )
    texts = [part["text"] for part in content]
    return list(map(_part, texts)) if accepted.parts(role) else "".join(texts)


def _is_text(part: Any) -> bool:
    """True for a part of chat.completions or of responses that is text."""
    kinds = ("text", "input_text", "output_text")
    return isinstance(part, Mapping) and part.get("type", "text") in kinds and isinstance(part.get("text"), str)


def _call(call: Any, accepted: Accepted) -> Message:
    """A tool call whose arguments are as the template takes them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise QwenMLXError(
            f"A tool call is {_short(call)}, expected {{'function': {{'name': ..., 'arguments': ...}}}}."
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str) and not accepted.text_arguments and accepted.object_arguments:
        try:
            parsed = json.loads(arguments) if arguments.strip() else None
            arguments = {} if parsed is None else parsed
        except (RecursionError, ValueError):
            raise QwenMLXError(
                f"The arguments of the tool call {function['name']!r} are {_short(arguments)}, expected a JSON object."
            ) from None
    elif isinstance(arguments, Mapping) and not accepted.object_arguments and accepted.text_arguments:
        arguments = json.dumps(arguments, ensure_ascii=False)
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise QwenMLXError(f"The tool calls of a message are {_short(value)}, expected a list.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
