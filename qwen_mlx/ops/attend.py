"""Attention of one token on a cache's whole buffer, of which it reads what is filled: nothing is sliced."""

from __future__ import annotations

from ..backend import mx
from .attention import attention
from .dispatch import Kernel, executor, float_bits, require, require_float

MAX_SPLITS = 128

_ATTEND = Kernel("attend", ("q", "kv", "offset"), ("sums", "stats"))
_COMBINE = Kernel("combine", ("sums", "stats"), ("out",))


def attend_one(q: mx.array, kv: mx.array, offset: mx.array, scale: float, window: int | None = None) -> mx.array:
    """softmax(scale q k^T) v for one token, each group of query heads on its key/value head.

    q: (1, n_heads, 1, D); kv: (1, 2 n_kv_heads, room, D), keys first, in q.dtype; offset: int32 (1,), where the newest
    key lies; window: how many of the newest keys are seen, None for all. Returns q's shape and dtype. Rounding: scores
    and softmax in float32, the result rounded once. Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("q", q)
    n_heads, head_dim = q.shape[1], q.shape[-1]
    require(
        q.shape == (1, n_heads, 1, head_dim),
        lambda: f"q has shape {q.shape}, expected (1, n_heads, 1, head_dim).",
    )
    n_kv_heads = kv.shape[1] // 2
    require(
        kv.ndim == 4 and kv.shape[0] == 1 and kv.shape[3] == head_dim and n_heads % max(n_kv_heads, 1) == 0,
        lambda: f"kv has shape {kv.shape}, expected (1, 2 n_kv_heads, room, {head_dim}) for {n_heads} query heads.",
    )
    require(kv.dtype == q.dtype, lambda: f"kv has dtype {kv.dtype}, expected q's, {q.dtype}.")
    if executor() == "reference" or head_dim % 32 or head_dim // 32 * q.dtype.size not in (4, 8, 16):
        return attend_one_reference(q, kv, offset, scale, window)
    room = kv.shape[2]
    group = n_heads // n_kv_heads
    splits = min(MAX_SPLITS, -(-room // 32))
    template = [("KV", n_kv_heads), ("GROUP", group), ("D", head_dim), ("SPLITS", splits)]
    template += [("WINDOW", window or 0), ("SCALE", float_bits(scale))]
    shapes = [(n_heads, splits, head_dim), (n_heads, splits, 2)]
    sums, stats = _ATTEND((q, kv, offset), template, (splits * 32, n_kv_heads, 1), (32, 1, 1), shapes, mx.float32)
    grid = (head_dim, n_heads, 1)
    template = [("T", q.dtype), ("D", head_dim), ("SPLITS", splits)]
    return _COMBINE((sums, stats), template, grid, (head_dim, 1, 1), [q.shape], q.dtype)[0]


def attend_one_reference(
    q: mx.array, kv: mx.array, offset: mx.array, scale: float, window: int | None = None
) -> mx.array:
    """attend_one in MLX's own operations."""
    n_kv_heads = kv.shape[1] // 2
    distance = offset - mx.arange(kv.shape[2])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    wide = kv.astype(mx.float32)
    rows = q.swapaxes(1, 2).astype(mx.float32)
    out = attention(rows, wide[:, :n_kv_heads], wide[:, n_kv_heads:], scale, seen[None])
    return out.swapaxes(1, 2).astype(q.dtype)
