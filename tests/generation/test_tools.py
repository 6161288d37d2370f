"""Tools: schemas against transformers' get_json_schema, strict parsing, validation, files."""

from __future__ import annotations

import enum
import gc
import json
import time
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from qwen_mlx import QwenMLXError
from qwen_mlx.errors import Stopped
from qwen_mlx.generation.tools import (
    Tool,
    ToolCall,
    function_schema,
    load_tools,
    parse_tool_calls,
    run,
    tool,
    tools_by_name,
)
from reference.lazy import transformers
from tests.helpers.cases import each


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """
    The weather forecast.

    Two paragraphs of description.

    Args:
        city: Name of the city,
            with its country: France, say.
        days: How many days (choices: [1, 3, 7])
        unit: Of the temperature

    Returns:
        A sentence
        of text.

    Raises:
        KeyError: never
    """
    return f"{city}: 21 {unit}, {days} days"


def everything(
    a: list[int],
    b: dict[str, float],
    c: Optional[str],  # noqa: UP045
    d: int | float,
    e: Union[list[str], bool, None],  # noqa: UP007
    f: Unit,
    g: Any,
    h: tuple[int, str],
    i: Literal[1, "two", None],
    j: list,
    k: dict,
    l: list[dict[str, list[int]]] | None = None,  # noqa: E741
) -> dict[str, int]:
    """One of every type.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F (choices: ["C", " F "])
        g: G
        h: H
        i: I
        j: J
        k: K
        l: L: with a colon
    """
    return {"a": len(a)}


def nothing():
    """Takes nothing."""


def returns_a_class(x: float) -> Unit:
    """Returns.

    Args:
        x: a number
    """
    return Unit(x)


@each("function", [weather, everything, nothing, returns_a_class], ids=lambda f: f.__name__)
def test_schema_equals_transformers(function):
    ours, theirs = function_schema(function), transformers.utils.get_json_schema(function)
    assert ours == theirs
    assert json.dumps(ours) == json.dumps(theirs)  # the template writes it in this order


def untyped(x):
    """T.

    Args:
        x: an x
    """


def undescribed(x: int):
    """T."""


def undocumented(x: int):
    pass


def exotic(x: bytes):
    """T.

    Args:
        x: an x
    """


def starred(*x: int):
    """T.

    Args:
        x: an x
    """


@each(
    ("function", "words"),
    [
        (untyped, ("'x'", "'untyped'", "type hint")),
        (undescribed, ("'x'", "'undescribed'", "description")),
        (undocumented, ("'undocumented'", "docstring")),
        (exotic, ("'x'", "'exotic'", "bytes")),
        (starred, ("'starred'", "*x")),
        (max, ("'max'",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_function_that_cannot_be_described_is_named(function, words):
    with pytest.raises(QwenMLXError) as error:
        function_schema(function)
    assert all(word in str(error.value) for word in words), error.value


def text(name: Any = "weather", arguments: Any = None, **more: Any) -> str:
    given = {"city": "Oslo"} if arguments is None else arguments
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given, **more})}\n</tool_call>"


TOOLS = tools_by_name([weather, everything, nothing])


def test_calls_are_found_in_order_between_text():
    answer = f"Let me see.\n{text()}\n{text('nothing', {})} and {text(arguments={'city': 'Ærø', 'days': 3})}"
    calls = parse_tool_calls(answer, TOOLS)
    assert calls == [
        ToolCall("weather", {"city": "Oslo"}),
        ToolCall("nothing", {}),
        ToolCall("weather", {"city": "Ærø", "days": 3}),
    ]
    assert [run(call, TOOLS) for call in calls] == ["Oslo: 21 C, 1 days", "null", "Ærø: 21 C, 3 days"]
    assert str(calls[2]) == 'weather(city="Ærø", days=3)'
    bare = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert parse_tool_calls(bare, TOOLS) == parse_tool_calls(f"```json\n{bare}\n```", TOOLS) == calls[:1]
    assert parse_tool_calls(f"It is {bare}", TOOLS) == []
    assert parse_tool_calls('{"name": "unknown", "arguments": {}}', TOOLS) == []
    assert parse_tool_calls('no call; {"name": "weather"} ```json\n{}```', TOOLS) == []


@each(
    ("answer", "words"),
    [
        ("<tool_call>{", ("not closed",)),
        ("<tool_call></tool_call>", ("not valid JSON",)),
        ("<tool_call>{'name': 'weather'}</tool_call>", ("not valid JSON",)),
        ("<tool_call>[1]</tool_call>", ("[1]", "not a JSON object")),
        ('<tool_call>{"name": "weather", "name": "x", "arguments": {}}</tool_call>', ("twice",)),
        ('<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>', ("NaN",)),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", ("not valid JSON",)),
        ('{"name": "weather", "arguments": {"town": "Oslo"}}', ("lacks 'city'",)),
        (text(extra=1), ("extra",)),
        (text(name=3), ("'name'",)),
        (text(arguments="Oslo"), ("'arguments'",)),
        ('<tool_call>{"name": "weather"}</tool_call>', ("arguments",)),
        (text("wether"), ("'wether'", "weather")),
        (text(arguments={}), ("lacks 'city'",)),
        (text(arguments={"city": 3}), ("city is 3", "string")),
        (text(arguments={"city": "x", "days": True}), ("days is True", "integer")),
        (text(arguments={"city": "x", "days": 2}), ("days is 2", "[1, 3, 7]")),
        (text(arguments={"city": "x", "unit": "K"}), ("unit is 'K'",)),
        (text(arguments={"city": "x", "town": "y"}), ("'town'", "city, days, unit")),
        (text("nothing", {"x": 1}), ("'x'", "nothing")),
        (text("everything", {"a": [1, "2"]}), ("lacks 'b'",)),
    ],
)
def test_what_is_almost_a_call_says_why_and_does_not_run(answer: str, words: tuple[str, ...]):
    (call,) = parse_tool_calls(answer, TOOLS)
    assert call.error is not None
    assert all(word in call.error for word in words), call.error
    assert run(call, TOOLS) == f"error: {call.error}"


GOOD = {"a": [1], "b": {"x": 1.5}, "c": None, "d": 1, "e": ["x"], "f": "C", "g": {}, "h": [1, "x"], "i": "two"} | {
    "j": [None],
    "k": {"x": 1},
}


def test_every_type_is_checked():
    assert parse_tool_calls(text("everything", GOOD), TOOLS)[0].error is None
    for key, bad in (("a", ["1"]), ("b", []), ("c", 3), ("d", "1"), ("e", [1]), ("f", "K"), ("i", 2), ("l", [3])):
        (call,) = parse_tool_calls(text("everything", GOOD | {key: bad}), TOOLS)
        assert call.error is not None, key
        assert call.error.startswith(key)


def test_a_tool_that_fails_or_cannot_run_is_the_answer():
    def broken() -> int:
        """Breaks."""
        raise KeyError("x\ny")

    def odd() -> object:
        """Returns what JSON cannot hold."""
        return object()

    def leaves() -> str:
        """Ends the program."""
        raise SystemExit(3)

    def half() -> str:
        """Half a character."""
        return "a\ud800b"

    tools = tools_by_name([broken, odd, leaves, half, {"name": "described", "parameters": None}])
    assert run(ToolCall("broken", {}), tools).startswith("error: broken failed (KeyError")
    assert "not JSON serializable" in run(ToolCall("odd", {}), tools)
    assert "cannot run" in run(ToolCall("described", {}), tools)
    assert "SystemExit: 3" in run(ToolCall("leaves", {}), tools)
    assert run(ToolCall("half", {}), tools) == "a?b"


class Odd(BaseException):
    def __str__(self) -> str:
        raise ValueError


class Text(str):
    def encode(self, *arguments):
        raise ValueError


def raises(error: BaseException):
    def function():
        raise error

    return function


@each(
    ("function", "expected"),
    [
        (raises(Odd()), "error: f failed (Odd)"),
        (raises(GeneratorExit("x")), "error: f failed (GeneratorExit: x)"),
        (raises(SystemExit(3)), "error: f failed (SystemExit: 3)"),
        (lambda: Text("a\ud800"), "a?"),
        (lambda: object(), "error: f failed (TypeError: Object of type object is not JSON serializable)"),
    ],
    ids=["Odd", "GeneratorExit", "SystemExit", "surrogate", "object"],  # the same in every process
)
def test_a_tool_of_any_kind_answers(function, expected: str):
    schema = {"type": "function", "function": {"name": "f"}}
    assert run(ToolCall("f", {}), {"f": Tool(schema, function)}) == expected


def test_only_ctrl_c_and_the_end_of_the_process_go_through_a_tool():
    schema = {"type": "function", "function": {"name": "f"}}
    for error in (KeyboardInterrupt(), Stopped(15)):
        with pytest.raises(type(error)):
            run(ToolCall("f", {}), {"f": Tool(schema, raises(error))})


def test_hostile_answers_are_read_in_linear_time():
    """A pattern for a bare call once took half a minute for the spaces after one."""
    tools = {"f": Tool({"type": "function", "function": {"name": "f"}}, None)}
    for make in (lambda n: '{"name":"f","arguments":{}}' + " " * n + "x", lambda n: "<tool_call>" * n):
        seconds = []
        for size in (3_000, 30_000):
            text, times = make(size), []
            for _ in range(3):
                gc.collect()
                gc.disable()  # a collection of what other tests hold would count as this one's work
                start = time.process_time()
                parse_tool_calls(text, tools)
                times.append(time.process_time() - start)
                gc.enable()
            seconds.append(min(times))
        assert seconds[1] < 30 * seconds[0] + 0.05
    (call,) = parse_tool_calls('<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>', tools)
    assert "beyond any float" in call.error


def test_schemas_with_and_without_the_envelope():
    inner = function_schema(weather)["function"]
    assert tool(inner).schema == tool({"type": "function", "function": inner}).schema == function_schema(weather)
    assert tool(Tool({"function": inner})).name == "weather"
    with pytest.raises(QwenMLXError, match="'weather'"):
        tools_by_name([weather, inner])
    for bad in ({}, {"function": 3}, {"name": 3}, [], {"name": "x", "parameters": {"properties": []}}):
        with pytest.raises(QwenMLXError, match="expected"):
            tool(bad)


def test_a_schema_that_is_none_is_reported_and_not_raised():
    for wrong in ({"x": {"type": 5}}, {"x": {"anyOf": 3}}, {"x": {"enum": 3}}):
        tools = tools_by_name([{"name": "odd", "parameters": {"type": "object", "properties": wrong}}])
        (call,) = parse_tool_calls(text("odd", {"x": 1}), tools)
        assert call.error is not None
        assert "not a JSON schema" in call.error


def test_files(tmp_path: Path):
    code = tmp_path / "mine.py"
    code.write_text(
        "from __future__ import annotations\nfrom json import dumps\nfrom textwrap import dedent\ndef _hidden(): pass\n"
        'def add(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a: one\n        b: other\n    """\n'
        "    return a + b\n"
    )
    (found,) = load_tools(code)
    assert run(ToolCall("add", {"a": 2, "b": 3}), {"add": found}) == "5"
    schemas = tmp_path / "mine.json"
    schemas.write_text(json.dumps([function_schema(weather), function_schema(nothing)["function"]]))
    assert [one.name for one in load_tools(schemas)] == ["weather", "nothing"]
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "leaves.py").write_text("raise SystemExit")
    (tmp_path / "empty.py").write_text("x = 3")
    (tmp_path / "syntax.py").write_text("def")
    (tmp_path / "broken.json").write_text("[")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "list.json").write_text("[3]")
    (tmp_path / "tools.txt").write_text("")
    for name, word in (
        ("raises.py", "ZeroDivisionError"),
        ("leaves.py", "SystemExit"),
        ("empty.py", "no tool"),
        ("syntax.py", "line 1: invalid syntax"),
        ("broken.json", "not valid JSON"),
        ("latin.json", "UTF-8"),
        ("deep.json", "not valid JSON"),
        ("list.json", "expected a function"),
        ("tools.txt", ".py or .json"),
        ("absent.py", "cannot be read"),
    ):
        with pytest.raises(QwenMLXError) as error:
            load_tools(tmp_path / name)
        assert word in str(error.value), error.value
        assert str(tmp_path / name) in str(error.value)


def test_a_schema_that_nests_without_end():
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(900):
        deep = {"type": "object", "properties": {"a": deep}}
    with pytest.raises(QwenMLXError, match="nests its schema more than 64 deep"):
        tool({"name": "f", "parameters": deep})
