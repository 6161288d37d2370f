"""Attention of one token, of each row, on a cache as it lies: a long buffer, and a short tail of the newest tokens."""

from __future__ import annotations

from ..backend import mx
from .attention import attention
from .dispatch import Kernel, executor, float_bits, require, require_float, require_like, require_place

# Tokens of room that one threadgroup a query head attends to. Beyond, each of several takes a part, for all heads that
# share a key/value head, so that it is read once.
SHORT = 2048
SPLIT = 64
MOST_SPLITS = 128  # of all key/value heads together
THREADS, DEPTH = 512, 4  # rows that a lane has under way
MANY_HEADS, MANY_THREADS = 132, 256  # of all rows: more than an H200's multiprocessors, each of which holds 512 threads
SPLIT_THREADS, SPLIT_DEPTH = 256, 4  # each of RATIO query heads holds registers


def _kernels(ragged: bool) -> tuple[Kernel, Kernel]:
    inputs = ("q", "kv", "tail", "place") + ("least",) * ragged
    variant, least = ("rows", "uint(least[batch])") if ragged else ("", "0u")
    return (
        Kernel("attend", inputs, ("out",), ("attend.h",), variant, (("LEAST", least),)),
        Kernel("attend_split", inputs, ("sums", "stats"), ("attend.h",), variant, (("LEAST", least),)),
    )


_ONE, _RAGGED = _kernels(False), _kernels(True)
_COMBINE = Kernel("combine", ("sums", "stats"), ("out",))


def decode_attention(
    q: mx.array,
    kv: mx.array,
    tail: mx.array,
    place: mx.array,
    scale: float,
    window: int | None = None,
    least: mx.array | None = None,
) -> mx.array:
    """softmax(scale q k^T) v for one token of each of B rows, each group of query heads on its key/value head.

    q: (B, n_heads, 1, D); kv: (B, 2 n_kv_heads, room, D), keys first, of which place[1] tokens count; tail: (B, 2
    n_kv_heads, tokens, D), those after them up to position place[0]; place: int32 (2,) or longer; window: how many of
    the newest keys are seen, None for all; least: int32 (B,), the first token that each row sees, None for all. Returns
    q's shape and dtype. place's values are not looked at: that would wait for them. Rounding: scores and softmax in
    float32, the result rounded once. Raises ValueError if shapes or dtypes do not agree.
    """
    require_float("q", q)
    require(
        q.ndim == 4 and q.shape[2] == 1 and q.shape[0] > 0,
        lambda: f"q has shape {q.shape}, expected (B, n_heads, 1, D).",
    )
    n_rows, n_heads, _, head_dim = q.shape

    def check(name: str, array: mx.array) -> None:
        require(
            array.ndim == 4
            and (array.shape[0], array.shape[3]) == (n_rows, head_dim)
            and array.shape[1] % 2 == 0
            and n_heads % max(array.shape[1] // 2, 1) == 0
            and array.shape[1] == kv.shape[1]
            and array.dtype == q.dtype,
            lambda: (
                f"{name} has shape {array.shape} and dtype {array.dtype}, expected ({n_rows}, 2 n_kv_heads, tokens, "
                f"{head_dim}) for {n_heads} query heads, and q's dtype, {q.dtype}."
            ),
        )

    check("kv", kv)
    check("tail", tail)
    require_place(place)
    require(kv.shape[1] > 0, lambda: f"kv has shape {kv.shape}, expected one key/value head or more.")
    require(window is None or window > 0, lambda: f"window is {window}, expected 1 or more, or None for all.")
    if least is not None:
        require_like("least", least, (n_rows,), mx.int32)
    row = head_dim * q.dtype.size
    if executor("attend") == "reference" or row not in (16, 32, 64, 128, 256, 512):
        return decode_attention_fallback(q, kv, tail, place, scale, window, least)
    n_kv_heads, room = kv.shape[1] // 2, kv.shape[2]
    ratio = n_heads // n_kv_heads
    template: list[tuple[str, object]] = [
        ("KV", n_kv_heads),
        ("RATIO", ratio),
        ("D", head_dim),
        ("WINDOW", window or 0),
    ]
    template += [("SCALE", float_bits(scale))]
    one, split = _ONE if least is None else _RAGGED
    inputs = (q, kv, tail, place) if least is None else (q, kv, tail, place, least)
    if room <= SHORT:
        n_threads = THREADS if n_rows * n_heads <= MANY_HEADS else MANY_THREADS
        template += [("DEPTH", DEPTH), ("THREADS", n_threads)]
        return one(inputs, template, (n_threads, n_rows * n_heads, 1), (n_threads, 1, 1), [q.shape])[0]
    splits = min(max(1, MOST_SPLITS // (n_rows * n_kv_heads)), -(-room // SPLIT))
    template += [("DEPTH", SPLIT_DEPTH), ("THREADS", SPLIT_THREADS), ("SPLITS", splits)]
    shapes = [(n_rows, n_heads, splits, head_dim), (n_rows, n_heads, splits, 2)]
    grid = (splits * SPLIT_THREADS, n_rows * n_kv_heads, 1)
    parts = split(inputs, template, grid, (SPLIT_THREADS, 1, 1), shapes, mx.float32)
    template = [("T", q.dtype), ("D", head_dim), ("SPLITS", splits)]
    return _COMBINE(parts, template, (head_dim, n_rows * n_heads, 1), (head_dim, 1, 1), [q.shape], q.dtype)[0]


def decode_attention_fallback(
    q: mx.array,
    kv: mx.array,
    tail: mx.array,
    place: mx.array,
    scale: float,
    window: int | None = None,
    least: mx.array | None = None,
) -> mx.array:
    """decode_attention in MLX's own operations."""
    n_kv_heads, position, filled = kv.shape[1] // 2, place[0], place[1]
    slots, newest = mx.arange(kv.shape[2]), mx.arange(tail.shape[2])
    # A token's distance from the newest; what is not filled lies after it.
    distance = mx.concatenate([mx.where(slots < filled, position - slots, -1), position - filled - newest])
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    if least is not None:
        seen = seen & (mx.concatenate([slots, filled + newest]) >= least[:, None, None, None])
    both = mx.concatenate([kv, tail], axis=2).astype(mx.float32)
    rows = q.swapaxes(1, 2).astype(mx.float32)
    out = attention(rows, both[:, :n_kv_heads], both[:, n_kv_heads:], scale, seen[None] if seen.ndim == 1 else seen)
    return out.swapaxes(1, 2).astype(q.dtype)
