"""Seeded defects of shipped kernels: each is one mistake, and the check that must see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

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
    "rms_norm without its barrier": Edit("rms_norm.metal", BARRIER, "", RACE),
    "add_rms_norm without its barrier": Edit("add_rms.h", BARRIER, "", RACE),
    "rope without its barrier": Edit("rope.metal", BARRIER, "", RACE),
    "qkv_rope without its barrier": Edit("qkv_rope.metal", BARRIER, "", RACE),
    "rms_norm: barrier for no memory": Edit(
        "rms_norm.metal", "mem_flags::mem_threadgroup", "mem_flags::mem_none", RACE
    ),
    "rope: barrier for the wrong memory": Edit(
        "rope.metal", "mem_flags::mem_threadgroup", "mem_flags::mem_device", RACE
    ),
    "rms_norm: barrier of a simdgroup only": Edit("rms_norm.metal", "threadgroup_barrier(", "simdgroup_barrier(", RACE),
    "rms_norm without its tail guard": Edit("rms_norm.metal", "if (i < uint(D)) {", "{", OutOfBounds),
    "swiglu without its tail guard": Edit("swiglu.metal", "if (column < uint(F)) {", "{", OutOfBounds),
    "rms_norm: guard off by one": Edit("rms_norm.metal", "if (i < uint(D)) {", "if (i <= uint(D)) {", OutOfBounds),
    "rms_norm: store off by one": Edit(
        "rms_norm.metal", "store<T>(out, row + i,", "store<T>(out, row + i + 1u,", OutOfBounds
    ),
    "add_rms_norm: sums not stored": Edit(
        "add_rms.h", "store_aligned<T>(sums, row + i, values[p]);", "", UnwrittenOutput
    ),
    "rope: second half not stored": Edit("heads.h", "store_aligned<T>(q, to + uint(HALF), b);", "", UnwrittenOutput),
    "qkv_rope: v stored over k": Edit(
        "heads.h", "head - uint(HEADS))", "(head - uint(HEADS)) % uint(KV))", (DataRace, UnwrittenOutput)
    ),
    "rms_norm: sum starts from nothing": Edit("rms_norm.metal", "float sum = 0.0f;", "float sum;", UninitialisedRead),
    "rms_norm: partial sums that nobody wrote": Edit(
        "rms_norm.metal",
        "if (lane == 0u) {",
        "if (lane == 0u && simdgroup_index_in_threadgroup > 0u) {",
        UninitialisedRead,
    ),
    "rms_norm: partial sums of simdgroups that are not there": Edit(
        "rms_norm.metal", "lane < uint(SIMDS) ?", "lane <= uint(SIMDS) ?", OutOfBounds
    ),
    "rms_norm: barrier on one lane only": Edit(
        "rms_norm.metal", BARRIER, f"if (lane == 0u) {{ {BARRIER} }}", (Divergence, *RACE)
    ),
    "rms_norm: simd_sum in a divergent branch": Edit(
        "rms_norm.metal", "sum += part;", "sum += part; sum = metal::simd_sum(sum);", Divergence
    ),
    "rms_norm: early return before the barrier": Edit(
        "rms_norm.metal", "float sum = 0.0f;", "if (first >= uint(D)) { return; } float sum = 0.0f;", Deadlock
    ),
    "rms_norm: input written": Edit(
        "rms_norm.metal", "sum += part;", "sum += part; const_cast<device T*>(x)[row + i] = T(0.0f);", ReadOnly
    ),
    "rms_norm: eps left out": Edit("rms_norm.metal", "float_of_bits(EPS)", "0.0f", WrongNumbers),
    "rms_norm: multiplied before rounding": Edit("rms.h", "float(T(normed))", "normed", WrongNumbers),
    "rms_norm: only the first simdgroup's sum": Edit(
        "rms_norm.metal", "lane < uint(SIMDS) ? partial[lane]", "lane < 1u ? partial[lane]", WrongNumbers
    ),
    "rope: turns the wrong way": Edit("heads.h", "a.v[k] = first_half;", "a.v[k] = -first_half;", WrongNumbers),
    "rope: pairs neighbours": Edit(
        "heads.h",
        "load_aligned<N, ALIGNED>(x, from + uint(HALF));",
        "load_aligned<N, ALIGNED>(x, from ^ 1u);",
        WrongNumbers,
    ),
    "rope: the first sequence's offset for all": Edit("heads.h", "? 0u : batch]", "? 0u : 0u]", WrongNumbers),
    "qkv_rope: v turned too": Edit("heads.h", "head < uint(HEADS + KV)", "head < ALL", WrongNumbers),
    "qkv_rope: bias of the first head for all": Edit(
        "heads.h",
        "beside = head * uint(2 * HALF) + column;",
        "beside = column;",
        WrongNumbers,
    ),
    "swiglu: silu not rounded": Edit("swiglu.metal", "float(T(activated))", "activated", WrongNumbers),
    "rope: octants swapped wrongly": Edit(
        "rotary.h", "((octant + 1u) & 2u) == 2u", "(octant & 2u) == 2u", WrongNumbers
    ),
    "rope: sine not scaled": Edit("rotary.h", "float(sine) * unit;", "float(sine) * unit / scale;", WrongNumbers),
    "rope: short cosine not scaled": Edit("rotary.h", "two(cos_sign * scale, ", "two(cos_sign, ", WrongNumbers),
    "rope: low parts left out": Edit(
        "rotary.h", "metal::fma(-b, r.sin_low, metal::fma(a, r.cos_low, sum))", "sum", WrongNumbers
    ),
    "rope: short quarters signed wrongly": Edit(
        "rotary.h", "quarter == 1u || quarter == 2u", "quarter == 1u", WrongNumbers
    ),
    "rope: tokens beyond the last": Edit(
        "rope.metal", "threadgroup_position_in_grid.x;", "threadgroup_position_in_grid.x + 1u;", OutOfBounds
    ),
    "rope: angles where they are not read": Edit(
        "heads.h", "table[slot<N, HALF>(i)]", "table[i]", (WrongNumbers, UninitialisedRead)
    ),
    "qkv_rope: one offset read for each sequence": Edit(
        "heads.h", "n_offsets == 1u ? 0u : batch", "batch", OutOfBounds
    ),
    "qkv_rope: the first half's bias for the second": Edit(
        "heads.h",
        "bias, beside + uint(HALF))",
        "bias, beside)",
        WrongNumbers,
    ),
    "rms_norm: eps added before the division": Edit(
        "rms.h", "const float x = mean + eps;", "const float x = (sum + eps) / count;", WrongNumbers
    ),
    "add_rms_norm: sums not rounded": Edit(
        "add_rms.h",
        "float(T(values[p].v[k] + more[p].v[k]))",
        "values[p].v[k] + more[p].v[k]",
        WrongNumbers,
    ),
    "swiglu: sum with the bias not rounded": Edit(
        "swiglu.metal", "float(T(g.v[k] + gb.v[k]))", "g.v[k] + gb.v[k]", WrongNumbers
    ),
    "swiglu: gate for up where they are joined": Edit(
        "swiglu.metal", "JOINED ? uint(F) + column : column", "column", WrongNumbers
    ),
    "swiglu: gate and up swapped": Edit(
        "swiglu.metal", "const float x = g.v[k];", "const float x = u.v[k]; u.v[k] = g.v[k];", WrongNumbers
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
    offsets = mx.array([3, 70_000], mx.int32)
    # So many tokens share threadgroups, whose last one is not full; YaRN scales cosine and sine.
    many, wide, yarn = random(1, 1031, 1, 64), random(1, 2, 4 * 64), ops.Rotary.yarn(64, 1e4, 4.0, 2048)
    return {
        "rms_norm": lambda: [ops.rms_norm(x * 1e-3, weight, 1e-6), ops.rms_norm(x[:, :31], weight[:31], 1e-6)],
        "add_rms_norm": lambda: list(ops.add_rms_norm(x, y, weight, 1e-6)),
        "swiglu": lambda: [ops.swiglu(gate, up, gate_bias, up_bias), ops.swiglu_joined(mx.concatenate([gate, up], -1))],
        "rope": lambda: [
            ops.rope(heads, offsets, rotary),
            ops.rope(many, 5, yarn),
            ops.rope(many[:, :9].astype(mx.float32), 5, yarn),
        ],
        "qkv_rope": lambda: [
            *ops.qkv_rope(qkv, bias, offsets, rotary, 2, 1, join_kv=True),
            *ops.qkv_rope(qkv, None, 7, rotary, 2, 1),
            *ops.qkv_rope(wide, wide[0, 0], 7, yarn, 2, 1),
        ],
    }
