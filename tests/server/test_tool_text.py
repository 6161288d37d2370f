"""Tool calls in a stream: however the text is cut into pieces, the same is shown and called."""

from __future__ import annotations

import itertools
import json

from hypothesis import example, given
from hypothesis import strategies as st

from qwen_mlx.generation.tools import parse_tool_calls, tools_by_name
from qwen_mlx.server.tool_text import ToolText

TOOLS = tools_by_name(
    [
        {
            "name": "add",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        }
    ]
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
WRONG = '<tool_call>\n{"name": "sub", "arguments": {"a": 1}}\n</tool_call>'
BARE = '{"name": "add", "arguments": {"a": 1}}'
PIECES = st.sampled_from(
    [CALL, WRONG, BARE, "<tool_call>", "</tool_call>", "<tool", "text ", "\n", "{", "```json\n", "```"]
)


def shown_and_called(pieces: list[str]) -> tuple[str, list[tuple[str, dict]]]:
    stream = ToolText(TOOLS)
    text = "".join(stream.add(piece) for piece in pieces)
    rest, calls = stream.finish()
    assert len({call["id"] for call in calls}) == len(calls)
    functions = [call["function"] for call in calls]
    return text + rest, [(f["name"], json.loads(f["arguments"])) for f in functions]


@given(pieces=st.lists(PIECES, max_size=6), cuts=st.lists(st.integers(0, 200)))
@example(pieces=["text ", CALL], cuts=[1, 2, 3, 7, 9])
@example(pieces=[CALL, CALL], cuts=list(range(100)))
@example(pieces=["```json\n", BARE, "```"], cuts=[5])
def test_pieces_are_the_whole(pieces: list[str], cuts: list[int]):
    text = "".join(pieces)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    cut = [text[a:b] for a, b in itertools.pairwise(edges)]
    shown, calls = shown_and_called(cut)
    assert (shown, calls) == shown_and_called([text])
    if calls:
        assert text.startswith(shown)
        parsed = parse_tool_calls(text, TOOLS)
        assert calls == [(call.name, call.arguments) for call in parsed]
    else:
        assert shown == text, "what is no call is text"


def test_calls_with_tags_and_without():
    assert shown_and_called(["So: ", CALL]) == ("So: ", [("add", {"a": 1})])
    assert shown_and_called([CALL, "\n", CALL])[1] == [("add", {"a": 1})] * 2
    assert shown_and_called(["```json\n", BARE, "\n```"]) == ("", [("add", {"a": 1})])
    assert shown_and_called([WRONG]) == (WRONG, [])
    assert shown_and_called([CALL, WRONG]) == (CALL + WRONG, [])
    assert shown_and_called(["plain"]) == ("plain", [])
