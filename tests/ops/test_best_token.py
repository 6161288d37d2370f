"""The likeliest token against numpy's argmax, with numbers that are not finite anywhere."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_mlx import ops
from qwen_mlx.ops.best_token import PARTS
from reference.emulator import emulate
from tests.helpers.cases import each

SPECIAL = [0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45, float("inf"), float("-inf"), float("nan")]


def expected(logits: np.ndarray) -> list[int]:
    return [int(row.argmax()) if np.isfinite(row).all() else -1 for row in logits]


@each(
    ("count", "dtype"),
    [
        *((count, mx.float32) for count in (1, 2, PARTS - 1, PARTS + 1, 1000)),
        *((count, dtype) for count in (PARTS + 1, 1000) for dtype in (mx.float16, mx.bfloat16)),
        (151_936, mx.bfloat16),
    ],
    ids=str,
)
def test_the_largest_of_each_row(executor: str, dtype: mx.Dtype, count: int):
    logits = mx.random.normal((3, count), key=mx.random.key(count)).astype(dtype)  # 16 bits: with equal ones
    found = ops.best_token(logits)
    assert found.dtype == mx.int32
    assert found.tolist() == expected(np.array(logits.astype(mx.float32)))


@each("value", [float("nan"), float("inf"), float("-inf")])
@each("at", [0, 700, 1999])
def test_a_row_that_is_not_finite_is_told(executor: str, value: float, at: int):
    logits = np.linspace(-1, 1, 4000, dtype=np.float32).reshape(2, 2000)
    logits[1, at] = value
    assert ops.best_token(mx.array(logits)).tolist() == [1999, -1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=1, max_size=300))
def test_any_numbers(values: list[float]):
    row = np.array([values], np.float32)
    with emulate():
        assert ops.best_token(mx.array(row)).tolist() == expected(row)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (mx.zeros((3,)), r"logits has shape \(3,\), expected \(B, V\)"),
        (mx.zeros((1, 0)), r"logits has shape \(1, 0\)"),
        (mx.zeros((1, 3), mx.int32), "logits .*int32, expected an array of float32"),
    ],
)
def test_what_it_refuses(logits: mx.array, message: str):
    with pytest.raises(ValueError, match=message):
        ops.best_token(logits)
