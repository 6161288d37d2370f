"""Bodies: whatever bytes come, the answer is a Body or a refusal in one sentence; nothing that was asked is lost."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx.server.body import DEEPEST, Body
from qwen_mlx.server.errors import RequestError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
TAKERS = {
    "integer": lambda body: body.integer("x", -5, 7),
    "number": lambda body: body.number("x", -1, 1),
    "boolean": lambda body: body.boolean("x"),
    "string": lambda body: body.string("x"),
    "strings": lambda body: body.strings("x", 3),
    "choice": lambda body: body.choice("x", "a", "b"),
    "object": lambda body: body.object("x"),
    "objects": lambda body: body.objects("x", []),
    "only": lambda body: body.only("x", False, 0),
}
RIGHT = {
    "integer": lambda v: not isinstance(v, bool) and isinstance(v, int | float) and v == int(v) and -5 <= v <= 7,
    "number": lambda v: not isinstance(v, bool) and isinstance(v, int | float) and -1 <= v <= 1,
    "boolean": lambda v: isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "strings": lambda v: (
        isinstance(v, str | list)
        and len([v] if isinstance(v, str) else v) <= 3
        and v != ""
        and all(isinstance(s, str) and s for s in v)
    ),
    "choice": lambda v: v in ("a", "b") and isinstance(v, str),
    "object": lambda v: isinstance(v, dict),
    "objects": lambda v: isinstance(v, list) and all(isinstance(one, dict) for one in v),
    "only": lambda v: v is False or (type(v) is int and v == 0),
}


def refusal(call: Callable[[], object]) -> RequestError | None:
    try:
        call()
    except RequestError as error:
        return error
    return None


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_body_or_refused(raw: bytes):
    error = refusal(lambda: Body.read(raw).done())
    if error is not None:
        assert error.status == 400
        assert error.message.endswith((".", "?"))
        assert len(error.message) < 400
    else:
        assert not any(value is not None for value in json.loads(raw).values())


@settings(max_examples=300)
@given(value=JSON, kind=st.sampled_from(sorted(TAKERS)))
def test_a_field_is_taken_if_it_is_of_its_kind_and_refused_else(value, kind: str):
    body = Body.read(json.dumps({"x": value}).encode())
    right = value is None or RIGHT[kind](value)
    error = refusal(lambda: TAKERS[kind](body))
    if error is not None:
        assert not right
        assert error.param is not None
        assert error.param.startswith("x")
        assert len(error.message) < 400
    else:
        assert right
        body.done()


def test_a_field_that_nobody_takes_is_refused_with_the_one_it_may_mean():
    body = Body({"temprature": 1})
    body.number("temperature", 0, 2)
    with pytest.raises(RequestError, match="did you mean 'temperature'") as error:
        body.done()
    assert error.value.code == "unknown_field"


def test_depth_is_bounded():
    def nested(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    Body.read(nested(DEEPEST))
    for levels in (DEEPEST + 1, 10**6):
        with pytest.raises(RequestError, match="nested more than 64 levels"):
            Body.read(nested(levels))
