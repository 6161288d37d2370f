"""Attention of one token on a cache as it lies: a long buffer, and a short tail of the newest tokens."""

from __future__ import annotations

from ..backend import mx
from .attention import attention
from .dispatch import Kernel, executor, float_bits, require, require_float, require_place

# Tokens of room that one threadgroup a query head attends to. Beyond, each of several takes a part, for all heads that
# share a key/value head, so that it is read once.
SHORT = 2048
SPLIT = 64
MOST_SPLITS = 128  # of all key/value heads together
THREADS, DEPTH = 512, 4  # rows that a lane has under way
SPLIT_THREADS, SPLIT_DEPTH = 256, 4  # each of RATIO query heads holds registers

_INPUTS = ("q", "kv", "tail", "place")
_ATTEND = Kernel("attend", _INPUTS, ("out",), ("attend.h",))
_ATTEND_SPLIT = Kernel("attend_split", _INPUTS, ("sums", "stats"), ("attend.h",))
_COMBINE = Kernel("combine", ("sums", "stats"), ("out",))


def attend_one(
    q: mx.array, kv: mx.array, tail: mx.array, place: mx.array, scale: float, window: int | None = None
) -> mx.array:
    """softmax(scale q k^T) v for one token, each group of query heads on its key/value head.

    q: (1, n_heads, 1, D); kv: (1, 2 n_kv_heads, room, D), keys first, of which place[1] tokens count; tail: (1, 2
    n_kv_heads, tokens, D), those after them up to position place[0]; place: int32 (2,); window: how many of the newest
    keys are seen, None for all. Returns q's shape and dtype. Rounding: scores and softmax in float32, the result
    rounded once. Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("q", q)
    require(
        q.ndim == 4 and q.shape[0] == q.shape[2] == 1, lambda: f"q has shape {q.shape}, expected (1, n_heads, 1, D)."
    )
    n_heads, head_dim = q.shape[1], q.shape[3]

    def check(name: str, array: mx.array) -> None:
        require(
            array.ndim == 4
            and (array.shape[0], array.shape[3]) == (1, head_dim)
            and array.shape[1] % 2 == 0
            and n_heads % max(array.shape[1] // 2, 1) == 0
            and array.shape[1] == kv.shape[1]
            and array.dtype == q.dtype,
            lambda: (
                f"{name} has shape {array.shape} and dtype {array.dtype}, expected (1, 2 n_kv_heads, tokens, "
                f"{head_dim}) for {n_heads} query heads, and q's dtype, {q.dtype}."
            ),
        )

    check("kv", kv)
    check("tail", tail)
    require_place(place)
    row = head_dim * q.dtype.size
    if executor("attend") == "reference" or row not in (16, 32, 64, 128, 256, 512):
        return attend_one_reference(q, kv, tail, place, scale, window)
    n_kv_heads, room = kv.shape[1] // 2, kv.shape[2]
    ratio = n_heads // n_kv_heads
    template: list[tuple[str, object]] = [
        ("KV", n_kv_heads),
        ("RATIO", ratio),
        ("D", head_dim),
        ("WINDOW", window or 0),
    ]
    template += [("SCALE", float_bits(scale))]
    inputs = (q, kv, tail, place)
    if room <= SHORT:
        template += [("DEPTH", DEPTH), ("THREADS", THREADS)]
        return _ATTEND(inputs, template, (THREADS, n_heads, 1), (THREADS, 1, 1), [q.shape])[0]
    splits = min(max(1, MOST_SPLITS // n_kv_heads), -(-room // SPLIT))
    template += [("DEPTH", SPLIT_DEPTH), ("THREADS", SPLIT_THREADS), ("SPLITS", splits)]
    shapes, grid = [(n_heads, splits, head_dim), (n_heads, splits, 2)], (splits * SPLIT_THREADS, n_kv_heads, 1)
    parts = _ATTEND_SPLIT(inputs, template, grid, (SPLIT_THREADS, 1, 1), shapes, mx.float32)
    template = [("T", q.dtype), ("D", head_dim), ("SPLITS", splits)]
    return _COMBINE(parts, template, (head_dim, n_heads, 1), (head_dim, 1, 1), [q.shape], q.dtype)[0]


def attend_one_reference(
    q: mx.array, kv: mx.array, tail: mx.array, place: mx.array, scale: float, window: int | None = None
) -> mx.array:
    """attend_one in MLX's own operations."""
    n_kv_heads, position, filled = kv.shape[1] // 2, place[0], place[1]
    slots, newest = mx.arange(kv.shape[2]), mx.arange(tail.shape[2])
    # A token's distance from the newest; what is not filled lies after it.
    distance = mx.concatenate([mx.where(slots < filled, position - slots, -1), position - filled - newest])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    both = mx.concatenate([kv, tail], axis=2).astype(mx.float32)
    rows = q.swapaxes(1, 2).astype(mx.float32)
    out = attention(rows, both[:, :n_kv_heads], both[:, n_kv_heads:], scale, seen[None])
    return out.swapaxes(1, 2).astype(q.dtype)
