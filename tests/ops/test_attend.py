"""Attention of one token on a buffer, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops
from tests.helpers.cases import each
from tests.helpers.decoding_calls import tiles


def exact(q: np.ndarray, kv: np.ndarray, offset: int, scale: float, window: int | None) -> np.ndarray:
    n_heads, n_kv_heads = q.shape[1], kv.shape[1] // 2
    first = 0 if window is None else max(0, offset + 1 - window)
    keys, values = (kv[0, i : i + n_kv_heads, first : offset + 1] for i in (0, n_kv_heads))
    keys, values = (np.repeat(a, n_heads // n_kv_heads, axis=0) for a in (keys, values))
    scores = np.einsum("hd,hsd->hs", q[0, :, 0], keys) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hs,hsd->hd", weights / weights.sum(axis=-1, keepdims=True), values)


SHAPES = [
    (14, 2, 64, 256, 0, 0, None),  # the recent alone
    (14, 2, 64, 256, 31, 31, None),
    (4, 4, 128, 256, 256, 271, None),
    (7, 1, 128, 256, 90, 97, 50),
    (2, 1, 64, 256, 20, 30, 5),  # the window begins in the recent
    (2, 1, 64, 256, 20, 30, 50),
    (2, 1, 64, 2304, 40, 41, None),  # most splits have no keys
    (6, 2, 64, 2304, 1999, 2010, None),
    (129, 129, 16, 2304, 17, 18, None),  # more heads than splits
]


@each(("number", "half"), [*((n, False) for n in range(len(SHAPES))), *((n, True) for n in (1, 2, 3, 6, 7))])
def test_attend_one(executor: str, number: int, half: bool):
    """In float32, and in one of the dtypes of 16 bits."""
    assert_attends(*SHAPES[number], (mx.float16, mx.bfloat16)[number % 2] if half else mx.float32)


@pytest.mark.emulator
@each(
    "shape",
    [
        (6, 2, 64, 2304, 1999, 2010, None),
        (7, 1, 128, 2304, 1030, 1043, None),
        (8, 1, 128, 2304, 300, 310, 250),
        (5, 1, 64, 4096, 4090, 4100, None),
        (64, 64, 64, 2304, 260, 262, None),  # few splits: a simdgroup reads several times
        (2, 1, 64, 2304, 40, 41, 1),
    ],
)
def test_attend_on_tensor_cores(shape: tuple[int, int, int, int, int, int, int | None]):
    from reference.emulator import emulate

    with tiles(), emulate():
        assert_attends(*shape, (mx.float16, mx.bfloat16)[shape[0] % 2])


def assert_attends(
    heads: int, kv_heads: int, head_dim: int, room: int, filled: int, position: int, window: int | None, dtype: mx.Dtype
) -> None:
    keys = mx.random.split(mx.random.key(position), 3)
    q = (2 * mx.random.normal((1, heads, 1, head_dim), key=keys[0])).astype(dtype)
    kv = mx.random.normal((1, 2 * kv_heads, room, head_dim), key=keys[1]).astype(dtype)
    recent = mx.random.normal((1, 2 * kv_heads, 16, head_dim), key=keys[2]).astype(dtype)
    # Slots that are not filled yet must not count, whatever they hold.
    kv = mx.where((mx.arange(room) >= filled)[:, None], mx.array(1e4, dtype), kv)
    recent = mx.where((mx.arange(16) > position - filled)[:, None], mx.array(1e4, dtype), recent)
    scale = head_dim**-0.5
    out = ops.decode_attention(q, kv, recent, mx.array([position, filled], mx.int32), scale, window)
    assert out.shape == q.shape
    assert out.dtype == dtype
    both = mx.concatenate([kv[:, :, :filled], recent], axis=2)
    wide = [np.array(a.astype(mx.float32), np.float64) for a in (q, both, out)]
    expected = exact(wide[0], wide[1], position, scale, window)
    ulp = {mx.float32: 2e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(wide[2][0, :, 0], expected, rtol=2 * ulp, atol=2 * ulp)


@each("window", [None, 20])
@each("room", [256, 2304])
def test_rows_are_those_of_one_at_a_time(executor: str, room: int, window: int | None):
    """Padding holds NaN, which must not count."""
    heads, kv_heads, head_dim, filled, newest, firsts = 4, 2, 64, 40, 51, [0, 7, 39, 45]
    keys = mx.random.split(mx.random.key(room), 3)
    q = mx.random.normal((4, heads, 1, head_dim), key=keys[0])
    kv = mx.random.normal((4, 2 * kv_heads, room, head_dim), key=keys[1])
    recent = mx.random.normal((4, 2 * kv_heads, 16, head_dim), key=keys[2])
    rows, position = mx.array(firsts, mx.int32), mx.array([newest, filled], mx.int32)
    padded = [
        mx.where(mx.arange(start, start + a.shape[2])[:, None] < rows[:, None, None, None], value, a)
        for start, a, value in ((0, kv, float("nan")), (filled, recent, float("nan")))
    ]
    if executor == "reference":  # MLX's own attention adds NaN times 0
        padded = [kv, recent]
    out = ops.decode_attention(q, *padded, position, 0.125, window, rows)
    assert out.shape == q.shape
    both = mx.concatenate([kv[:, :, :filled], recent], axis=2)
    for row, first in enumerate(firsts):
        parts = [np.array(a[row : row + 1], np.float64) for a in (q, both[:, :, first:])]
        expected = exact(parts[0], parts[1], newest - first, 0.125, window)
        np.testing.assert_allclose(np.array(out[row, :, 0]), expected, rtol=4e-6, atol=4e-6)


def test_padding_of_another_batch_is_refused():
    q, kv, recent = (mx.zeros((2, 4, n, 64)) for n in (1, 256, 16))
    position = mx.zeros(2, mx.int32)
    with pytest.raises(ValueError, match=r"first has shape \(3,\).*expected \(2,\)"):
        ops.decode_attention(q, kv, recent, position, 1.0, None, mx.zeros(3, mx.int32))


@each(
    ("q", "kv", "recent", "message"),
    [
        ((1, 4, 2, 64), (1, 4, 256, 64), (1, 4, 16, 64), "q has shape"),
        ((1, 4, 1, 64), (1, 6, 256, 64), (1, 6, 16, 64), "kv has shape"),
        ((1, 4, 1, 64), (1, 4, 256, 32), (1, 4, 16, 32), "kv has shape"),
        ((1, 4, 1, 64), (1, 4, 256, 64), (1, 2, 16, 64), "recent_kv has shape"),
        ((2, 4, 1, 64), (1, 4, 256, 64), (1, 4, 16, 64), "kv has shape"),
    ],
)
def test_what_does_not_agree_is_named(q, kv, recent, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(mx.zeros(q), mx.zeros(kv), mx.zeros(recent), mx.array([0, 0], mx.int32), 1.0)
