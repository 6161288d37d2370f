"""Small calls of every kernel that decoding one token launches, for the lint and for seeded defects."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from qwen_mlx import ops
from qwen_mlx.selftest_decoding import EPS, FORMATS, matrix


def calls(dtype: mx.Dtype) -> dict[str, Callable[[], list[mx.array]]]:
    """name: call; among them rows that fill no whole unit, splits, heads in groups, a window, a cache not full."""
    mx.random.seed(11)

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    heads, kv_heads, head_dim, columns = 3, 1, 16, 512
    rows = (heads + 2 * kv_heads) * head_dim
    x, weight, bias, residual = random(1, 1, columns), random(columns), random(rows), random(37)
    tail, place = random(1, 2 * kv_heads, 4, head_dim), mx.array([100_000, 99_998], mx.int32)
    table = ops.rotation_table(place, ops.Rotary.plain(head_dim, 1e6))
    q, kv, new = random(1, 4, 1, 64), random(1, 4, 256, 64), random(1, 4, 16, 64)
    long, seen = random(1, 4, 2304, 64), mx.array([45, 40], mx.int32)
    wide = random(1, 1, 8192)
    found: dict[str, Callable[[], list[mx.array]]] = {
        "rotation": lambda: [ops.rotation_table(place, ops.Rotary.plain(head_dim, 1e6))],
        "attend": lambda: [ops.attend_one(q, kv, new, seen, 0.125, 42)],
        "attend_split": lambda: [ops.attend_one(q, long, new, seen, 0.125)],
        "matvec dense, split": lambda: [ops.matvec(wide, matrix("dense", 21, 8192, dtype))],
    }
    mixed = [matrix("affine5", rows - head_dim, columns, dtype), matrix("q6_k", head_dim, columns, dtype)]
    found["matvec_qkv mixed"] = lambda: list(ops.matvec_qkv(x, mixed, bias, (weight, EPS), table, tail, place, heads))
    for form in FORMATS:
        odd, qkv, ffn = (matrix(form, n, columns, dtype) for n in (37, rows, 38))
        found |= {
            f"matvec {form}": lambda odd=odd: [ops.matvec(x, odd, (weight, EPS), residual)],
            f"matvec_swiglu {form}": lambda ffn=ffn: [ops.matvec_swiglu(x, ffn, (weight, EPS))],
            f"matvec_qkv {form}": lambda qkv=qkv: list(
                ops.matvec_qkv(x, [qkv], bias, (weight, EPS), table, tail, place, heads)
            ),
        }
        if form in ("q4_k", "q6_k"):
            found[f"unpack {form}"] = lambda odd=odd: [ops.unpack(odd, dtype)]
            found[f"unpack_rows {form}"] = lambda odd=odd: [ops.unpack(odd, dtype, mx.array([[36, 0], [5, 5]]))]
    return found
