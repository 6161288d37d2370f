"""Seeded defects of shipped kernels: each is one mistake, and the check that must see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from qwen_mlx import ops
from reference.emulator import (
    DataRace,
    Deadlock,
    Divergence,
    OutOfBounds,
    ReadOnly,
    UninitialisedRead,
    UnwrittenOutput,
)

# Without a barrier a thread reads before another has written, or at the same time: the order decides which is seen.
RACE = (DataRace, UninitialisedRead)
SQUARES = "sum += sum_of_squares(values[p]);"
BARRIER = "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Edit:
    """A change of a shipped kernel. caught_by: an error, or WrongNumbers: the result differs from plain MLX."""

    file: str
    old: str
    new: str
    caught_by: type[Exception] | tuple[type[Exception], ...]


class WrongNumbers(Exception):
    """The comparison with plain MLX failed."""


EDITS = {
    "rms_norm without its barrier": Edit("rms.h", BARRIER, "", RACE),
    "add_rms_norm without its barrier": Edit("rms.h", BARRIER, "", RACE),
    "rms_norm: barrier for no memory": Edit("rms.h", "mem_flags::mem_threadgroup", "mem_flags::mem_none", RACE),
    "rms_norm: barrier for the wrong memory": Edit(
        "rms.h", "mem_flags::mem_threadgroup", "mem_flags::mem_device", RACE
    ),
    "rms_norm: barrier of a simdgroup only": Edit("rms.h", "threadgroup_barrier(", "simdgroup_barrier(", RACE),
    "rms_norm without its tail guard": Edit("rms_norm.metal", "if (i < uint(D)) {", "{", OutOfBounds),
    "swiglu without its tail guard": Edit("swiglu.metal", "if (column < uint(F)) {", "{", OutOfBounds),
    "rms_norm: guard off by one": Edit("rms_norm.metal", "if (i < uint(D)) {", "if (i <= uint(D)) {", OutOfBounds),
    "rms_norm: store off by one": Edit(
        "rms_norm.metal", "store<T>(out, row + i,", "store<T>(out, row + i + 1u,", OutOfBounds
    ),
    "add_rms_norm: sums not stored": Edit(
        "add_rms_norm.metal", "store<T>(sums, row + i, values[p]);", "", UnwrittenOutput
    ),
    "rope: second half not stored": Edit("heads.h", "store<T>(q, to + uint(HALF), b);", "", UnwrittenOutput),
    "rope without its tail guard": Edit(
        "rope.metal", "if (item < uint(x_shape[0] * x_shape[1] * HEADS * (HALF / N))) {", "{", OutOfBounds
    ),
    "qkv_rope without its tail guard": Edit(
        "qkv_rope.metal",
        "if (item < uint(qkv_shape[0] * qkv_shape[1] * (HEADS + 2 * KV) * (HALF / N))) {",
        "{",
        OutOfBounds,
    ),
    "qkv_rope: v stored over k": Edit(
        "heads.h", "head - uint(HEADS))", "(head - uint(HEADS)) % uint(KV))", (DataRace, UnwrittenOutput)
    ),
    "rms_norm: sum starts from nothing": Edit("rms_norm.metal", "float sum = 0.0f;", "float sum;", UninitialisedRead),
    "rms_norm: partial sums that nobody wrote": Edit(
        "rms.h",
        "if (lane == 0u) {",
        "if (lane == 0u && simd > 0u) {",
        UninitialisedRead,
    ),
    "rms_norm: partial sums of simdgroups that are not there": Edit(
        "rms.h", "lane < uint(SIMDS) ?", "lane <= uint(SIMDS) ?", OutOfBounds
    ),
    "rms_norm: barrier on one lane only": Edit(
        "rms.h", BARRIER, f"if (lane == 0u) {{ {BARRIER} }}", (Divergence, *RACE)
    ),
    "rms_norm: simd_sum in a divergent branch": Edit(
        "rms_norm.metal", SQUARES, f"{SQUARES} sum = metal::simd_sum(sum);", Divergence
    ),
    "rms_norm: early return before the barrier": Edit(
        "rms_norm.metal", "float sum = 0.0f;", "if (first >= uint(D)) { return; } float sum = 0.0f;", Deadlock
    ),
    "rms_norm: input written": Edit(
        "rms_norm.metal", SQUARES, f"{SQUARES} const_cast<device T*>(x)[row + i] = T(0.0f);", ReadOnly
    ),
    "rms_norm: eps left out": Edit("rms_norm.metal", "as_type<float>(EPS)", "0.0f", WrongNumbers),
    "rms_norm: multiplied before rounding": Edit("rms.h", "float(T(normed))", "normed", WrongNumbers),
    "rms_norm: only the first simdgroup's sum": Edit(
        "rms.h", "lane < uint(SIMDS) ? partial[lane]", "lane < 1u ? partial[lane]", WrongNumbers
    ),
    "rope: turns the wrong way": Edit("heads.h", "a.v[k + i] = first_half;", "a.v[k + i] = -first_half;", WrongNumbers),
    "rope: pairs neighbours": Edit(
        "heads.h",
        "load<N>(x, from + uint(HALF));",
        "load<N>(x, from ^ 1u);",
        WrongNumbers,
    ),
    "rope: the first sequence's angles for all": Edit(
        "rope.metal", "table_shape[0] * table_shape[1]", "table_shape[1]", WrongNumbers
    ),
    "qkv_rope: v rotated too": Edit("heads.h", "head < uint(HEADS + KV)", "head < ALL", WrongNumbers),
    "qkv_rope: bias of the first head for all": Edit(
        "heads.h",
        "load<N>(bias, head * uint(2 * HALF) + column);",
        "load<N>(bias, column);",
        WrongNumbers,
    ),
    "swiglu: silu not rounded": Edit("silu.h", "float(T(activated))", "activated", WrongNumbers),
    "rope: cosine and sine exchanged": Edit(
        "rotary.h", "metal::fma(a, cosine, -(b * sine))", "metal::fma(a, sine, -(b * cosine))", WrongNumbers
    ),
    "rope: the first pair's angle for two": Edit(
        "heads.h", "-a.v[k + i], turn.v[2 * i], turn.v[2 * i + 1])", "-a.v[k + i], turn.v[0], turn.v[1])", WrongNumbers
    ),
    "rope: angles of the next pair": Edit(
        "heads.h",
        "uint(HALF) + column;\n    UNROLL",
        "uint(HALF) + column + 1u;\n    UNROLL",
        (WrongNumbers, OutOfBounds),
    ),
    "rope: tokens beyond the last": Edit(
        "rope.metal", "item = thread_position_in_grid.x;", "item = thread_position_in_grid.x + 1u;", UnwrittenOutput
    ),
    "qkv_rope: angles of one sequence read for each": Edit("heads.h", "token % rows", "token", OutOfBounds),
    "qkv_rope: the first half's bias for the second": Edit(
        "heads.h",
        "load<N>(bias, head * uint(2 * HALF) + column + uint(HALF));",
        "load<N>(bias, head * uint(2 * HALF) + column);",
        WrongNumbers,
    ),
    "qkv_rope: sum with the bias not rounded": Edit(
        "heads.h", "float(T(b.v[k] + b_bias.v[k]))", "b.v[k] + b_bias.v[k]", WrongNumbers
    ),
    "rms_norm: eps added before the division": Edit(
        "rms.h", "const float x = mean + eps;", "const float x = (sum + eps) / count;", WrongNumbers
    ),
    "add_rms_norm: sums not rounded": Edit(
        "add_rms_norm.metal",
        "float(T(values[p].v[k] + residuals[p].v[k]))",
        "values[p].v[k] + residuals[p].v[k]",
        WrongNumbers,
    ),
    "swiglu: sum with the bias not rounded": Edit(
        "swiglu.metal", "float(T(g.v[k] + gb.v[k]))", "g.v[k] + gb.v[k]", WrongNumbers
    ),
    "swiglu: gate for up where they are joined": Edit(
        "swiglu.metal", "JOINED ? uint(F) + column : column", "column", WrongNumbers
    ),
    "swiglu: gate and up swapped": Edit(
        "swiglu.metal", "swiglu<T>(g.v[k], u.v[k])", "swiglu<T>(u.v[k], g.v[k])", WrongNumbers
    ),
}


def case_inputs() -> dict[str, Callable[[], list[mx.array]]]:
    """A call of each shipped kernel whose tails, batches and biases all matter; results as a list."""
    mx.random.seed(3)
    rotary = ops.Rotary.plain(16, 1e4)

    def random(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    # 2054 elements are more than one round of 1024 packs of two, and the last round is not full.
    x, y, weight = random(2, 2054), random(2, 2054), random(2054)
    gate, up, gate_bias, up_bias = random(3, 70), random(3, 70), random(70), random(70)
    heads, qkv, bias = random(2, 3, 3, 16), random(2, 3, 4 * 16), random(4 * 16)
    by_row = rotary.table(np.array([3, 70_000]), 3)
    # The last threadgroup is not full; YaRN scales cosine and sine.
    many, wide, yarn = random(1, 1031, 1, 64), random(1, 2, 4 * 64), ops.Rotary.yarn(64, 1e4, 4.0, 2048)
    return {
        "rms_norm": lambda: [ops.rms_norm(x * 1e-3, weight, 1e-6), ops.rms_norm(x[:, :31], weight[:31], 1e-6)],
        "add_rms_norm": lambda: list(ops.add_rms_norm(x, y, weight, 1e-6)),
        "swiglu": lambda: [ops.swiglu(gate, up, gate_bias, up_bias), ops.swiglu_joined(mx.concatenate([gate, up], -1))],
        "rope": lambda: [
            ops.rope(heads, by_row),
            ops.rope(many, yarn.table(5, 1031)),
            ops.rope(many[:, :9].astype(mx.float32), yarn.table(5, 9)),
        ],
        "qkv_rope": lambda: [
            *ops.qkv_rope(qkv, bias, by_row, 2, 1),
            *ops.qkv_rope(qkv, None, rotary.table(7, 3), 2, 1),
            *ops.qkv_rope(wide, wide[0, 0], yarn.table(7, 2), 2, 1),
        ],
    }
