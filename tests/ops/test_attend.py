"""Attention of one token on a buffer, against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops


def exact(q: np.ndarray, kv: np.ndarray, offset: int, scale: float, window: int | None) -> np.ndarray:
    n_heads, n_kv_heads = q.shape[1], kv.shape[1] // 2
    first = 0 if window is None else max(0, offset + 1 - window)
    keys, values = (kv[0, i : i + n_kv_heads, first : offset + 1] for i in (0, n_kv_heads))
    keys, values = (np.repeat(a, n_heads // n_kv_heads, axis=0) for a in (keys, values))
    scores = np.einsum("hd,hsd->hs", q[0, :, 0], keys) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hs,hsd->hd", weights / weights.sum(axis=-1, keepdims=True), values)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "room", "offset", "window"),
    [
        (14, 2, 64, 256, 0, None),
        (14, 2, 64, 256, 31, None),
        (4, 4, 128, 256, 255, None),
        (7, 1, 128, 256, 97, 50),
        (2, 1, 64, 256, 20, 50),
        (2, 1, 64, 5120, 4999, None),  # more runs of keys than splits
    ],
)
def test_attend_one(executor: str, dtype, heads, kv_heads, head_dim, room, offset, window):
    keys = mx.random.split(mx.random.key(offset), 2)
    q = (2 * mx.random.normal((1, heads, 1, head_dim), key=keys[0])).astype(dtype)
    kv = mx.random.normal((1, 2 * kv_heads, room, head_dim), key=keys[1]).astype(dtype)
    # What is not filled yet must not count, whatever it holds.
    kv = mx.where((mx.arange(room) > offset)[:, None], mx.array(1e4, dtype), kv)
    scale = head_dim**-0.5
    out = ops.attend_one(q, kv, mx.array([offset], mx.int32), scale, window)
    assert out.shape == q.shape
    assert out.dtype == dtype
    wide = [np.array(a.astype(mx.float32), np.float64) for a in (q, kv, out)]
    expected = exact(wide[0], wide[1], offset, scale, window)
    ulp = {mx.float32: 2e-6, mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    np.testing.assert_allclose(wide[2][0, :, 0], expected, rtol=2 * ulp, atol=2 * ulp)


@pytest.mark.parametrize(
    ("q", "kv", "message"),
    [
        ((1, 4, 2, 64), (1, 4, 256, 64), "q has shape"),
        ((1, 4, 1, 64), (1, 6, 256, 64), "kv has shape"),
        ((1, 4, 1, 64), (1, 4, 256, 32), "kv has shape"),
    ],
)
def test_what_does_not_agree_is_named(q, kv, message):
    with pytest.raises(ValueError, match=message):
        ops.attend_one(mx.zeros(q), mx.zeros(kv), mx.array([0], mx.int32), 1.0)
