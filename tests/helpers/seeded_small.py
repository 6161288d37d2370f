"""Small kernels with one defect each, the same without it, and the check that must see it."""

from __future__ import annotations

from dataclasses import dataclass, field

from reference.emulator import (
    DataRace,
    Deadlock,
    Divergence,
    EmulatorError,
    OutOfBounds,
    ReadOnly,
    Runaway,
    ThreadgroupMemory,
    UndefinedBehaviour,
    UninitialisedRead,
    UnwrittenOutput,
)

from .seeded import RACE


@dataclass(frozen=True)
class Small:
    """A kernel with a defect, the same without, and the check that must see the first and pass the second.

    x: the input, float32 0, 1, 2, ..., 64 of them unless `size` says otherwise; y: the output, float32.
    """

    wrong: str
    right: str
    caught_by: type[EmulatorError] | tuple[type[EmulatorError], ...]
    message: str
    grid: int = 64
    threadgroup: int = 64
    size: int = 64
    outputs: int = 64
    options: dict = field(default_factory=dict)


I = "uint i = thread_position_in_grid.x; "  # noqa: E741
SMALL = {
    "read past the end": Small(
        I + "y[i] = x[i + 1u];",
        I + "y[i] = x[i];",
        OutOfBounds,
        r"body line 1 .*thread \(63, 0, 0\) of threadgroup \(0, 0, 0\) reads x\[64\], which has 64 elements",
    ),
    "read before the start": Small(
        I + "y[i] = x[int(i) - 1];",
        I + "y[i] = x[max(int(i) - 1, 0)];",
        OutOfBounds,
        r"reads x\[-1\]",
    ),
    "vector across the end": Small(
        I + "float4 v = *(const device float4*)(x + i / 4u * 4u); y[i] = v[i % 4u];",
        I + "y[i] = x[i];",
        OutOfBounds,
        r"reads x\[60\], which has 62 elements",
        grid=62,
        size=62,
        outputs=62,
    ),
    "write far past the end": Small(
        I + "y[i * 1000000u] = x[i];", I + "y[i] = x[i];", OutOfBounds, r"writes y\[\d+000000\], which has 64"
    ),
    "index far beyond every buffer": Small(
        I + "y[i] = x[ulong(i) * 40000000000ul];",
        I + "y[i] = x[ulong(i)];",
        OutOfBounds,
        r"far outside every buffer|in no buffer",
    ),
    "edge threadgroup ignored": Small(
        "uint i = threadgroup_position_in_grid.x * threads_per_threadgroup.x + thread_position_in_threadgroup.x;"
        "y[i] = x[i];",
        "uint i = threadgroup_position_in_grid.x * 24u + thread_position_in_threadgroup.x; y[i] = x[i];",
        DataRace,
        r"which thread .* of threadgroup \(\d, 0, 0\) wrote",
        threadgroup=24,
    ),
    "array of a thread overrun": Small(
        I + "float v[4]; for (uint k = 0; k < 4; ++k) v[k] = x[i]; y[i] = v[i % 5u];",
        I + "float v[4]; for (uint k = 0; k < 4; ++k) v[k] = x[i]; y[i] = v[i % 4u];",
        OutOfBounds,
        r"body line 1 .*index outside the array",
    ),
    "threadgroup array overrun": Small(
        I + "threadgroup float s[64]; threadgroup float* p = s; p[i + 1u] = x[i]; y[i] = p[i + 1u];",
        I + "threadgroup float s[65]; threadgroup float* p = s; p[i + 1u] = x[i]; y[i] = p[i + 1u];",
        OutOfBounds,
        r"writes 4 bytes at byte 256 of a threadgroup variable",
    ),
    "histogram without atomics": Small(
        I + "y[i % 8u] += 1.0f;",
        I + "if (i < 8u) { float n = 0.0f; for (uint k = i; k < 64u; k += 8u) n += 1.0f; y[i] += n; }",
        DataRace,
        r"with no barrier for device memory between",
        outputs=8,
        options={"init_value": 0.0},
    ),
    "two threadgroups write one element": Small(
        I + "y[i / 2u] = x[i];",
        I + "if (i % 2u == 0u) y[i / 2u] = x[i];",
        DataRace,
        r"writes y\[\d+\], which thread .* wrote",
        threadgroup=1,
        outputs=32,
    ),
    "a threadgroup reads what another wrote": Small(
        I + "if (i == 0u) y[0] = x[0]; else y[i] = y[0] + x[i];",
        I + "y[i] = x[0] + x[i];",
        RACE,
        r"y\[0\], which",
        threadgroup=1,
    ),
    "threadgroup memory used again without a barrier": Small(
        I
        + "threadgroup float s[64]; s[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float a = s[63u - i];"
        "s[i] = a; threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63u - i];",
        I
        + "threadgroup float s[64]; s[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float a = s[63u - i];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); s[i] = a;"
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63u - i];",
        DataRace,
        r"4 bytes at byte \d+ of a threadgroup variable, which thread .* (read|wrote) at body line 1",
    ),
    "device memory behind a threadgroup memory barrier": Small(
        I + "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float a = y[63u - i];"
        "threadgroup_barrier(mem_flags::mem_device); y[i] = a;",
        I + "y[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); float a = y[63u - i];"
        "threadgroup_barrier(mem_flags::mem_device); y[i] = a;",
        DataRace,
        r"no barrier for device memory",
    ),
    "half words that share a word": Small(
        I + "threadgroup half s[64]; s[i] = half(x[i]); y[i] = float(s[i ^ 1u]);",
        I + "threadgroup half s[64]; s[i] = half(x[i]); y[i] = float(s[i]);",
        RACE,
        r"bytes at byte \d+ of a threadgroup variable",
    ),
    "bytes of one element": Small(
        I + "((device uchar*)y)[i ^ (i & 1u)] = uchar(i);",
        I + "((device uchar*)y)[i] = uchar(i);",
        DataRace,
        r"writes y\[\d+\]( \+ 2 bytes)?, which thread .* wrote",
        grid=256,
    ),
    "simdgroup_barrier across simdgroups": Small(
        I + "threadgroup float s[64]; s[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63u - i];",
        I + "threadgroup float s[64]; s[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[i ^ 31u];",
        RACE,
        r"threadgroup variable",
    ),
    "threadgroup memory of the group before": Small(
        I + "threadgroup float s[1]; if (i == 0u) s[0] = x[0];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[0];",
        I + "threadgroup float s[1]; if (i % 32u == 0u) s[0] = x[0];"
        "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[0];",
        UninitialisedRead,
        r"reads 4 bytes at byte 0 of a threadgroup variable, which nothing has written",
        threadgroup=32,
    ),
    "local variable never set": Small(
        I + "float a; y[i] = a + x[i];",
        I + "float a = 0.0f; y[i] = a + x[i];",
        UninitialisedRead,
        r"body line 1: 'a' is used",
    ),
    "output read before it is written": Small(
        I + "y[i] += x[i];",
        I + "y[i] = x[i]; y[i] += x[i];",
        UninitialisedRead,
        r"reads y\[\d+\], which nothing has written",
    ),
    "every other output": Small(
        I + "if (i % 2u == 0u) y[i] = x[i];",
        I + "y[i] = x[i];",
        UnwrittenOutput,
        r"no thread wrote y\[1\] \(32 of 64 elements are unwritten",
    ),
    "barriers of two branches": Small(
        I + "threadgroup float s[1];\nif (i < 32u) {\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n} else {\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n}\ny[i] = x[i];",
        I + "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = x[i];",
        Divergence,
        r"waits at a barrier at body line 3 .*waits at a barrier at body line 5",
    ),
    "a loop of unequal length around a barrier": Small(
        I + "for (uint k = 0; k <= i; ++k) threadgroup_barrier(mem_flags::mem_none); y[i] = x[i];",
        I + "for (uint k = 0; k <= 64u; ++k) threadgroup_barrier(mem_flags::mem_none); y[i] = x[i];",
        Deadlock,
        r"has returned",
    ),
    "two simd operations at once": Small(
        I + "if (i % 2u == 0u) {\ny[i] = simd_sum(x[i]);\n} else {\ny[i] = simd_max(x[i]);\n}",
        I + "y[i] = simd_sum(x[i]);",
        Divergence,
        r"waits at a simd operation at body line [24] .*waits at a simd operation at body line [24]",
    ),
    "input written": Small(
        I + "const_cast<device float*>(x)[i] = 0.0f; y[i] = x[i];",
        I + "y[i] = x[i];",
        ReadOnly,
        r"writes x\[\d+\], which is read-only",
    ),
    "shuffle from a lane that is not there": Small(
        I + "y[i] = simd_shuffle(x[i], 31);",
        I + "y[i] = simd_shuffle(x[i], 7);",
        Divergence,
        r"reads lane 31 of a simdgroup that has 8 threads",
        grid=40,
        threadgroup=40,
        outputs=40,
    ),
    "too much threadgroup memory": Small(
        I + "threadgroup float s[8193]; s[i] = x[i]; y[i] = s[i];",
        I + "threadgroup float s[8192]; s[i] = x[i]; y[i] = s[i];",
        ThreadgroupMemory,
        r"32784 bytes of threadgroup memory",
    ),
    "a loop that does not end": Small(
        I + "uint k = i; while (k < 1000u) { k = k / 2u; } y[i] = x[i] + float(k);",
        I + "uint k = i; while (k > 1000u) { k = k / 2u; } y[i] = x[i] + float(k);",
        Runaway,
        r"body line 1",
    ),
    "division by zero": Small(
        I + "int n = int(x[i]); y[i] = float(64 / n);",
        I + "int n = int(x[i]); y[i] = float(64 / (n + 1));",
        UndefinedBehaviour,
        r"division by zero",
    ),
    "signed overflow": Small(
        I + "int n = int(x[i]); y[i] = float(n * 2000000000);",
        I + "uint n = uint(x[i]); y[i] = float(n * 2000000000u);",
        UndefinedBehaviour,
        r"signed integer overflow in a multiplication",
    ),
    "shift too long": Small(
        I + "y[i] = float(1u << i);", I + "y[i] = float(1u << (i & 31u));", UndefinedBehaviour, r"shift by the width"
    ),
    "float that no integer holds": Small(
        I + "y[i] = float(int(x[i] * 1e9f));",
        I + "y[i] = float(int(x[i] * 1e7f));",
        UndefinedBehaviour,
        r"conversion of a float",
    ),
    "misaligned vector": Small(
        I + "float4 v = *(const device float4*)(x + i); y[i] = v.x;",
        I + "float4 v = *(const device float4*)(x + i / 4u * 4u); y[i] = v.x;",
        UndefinedBehaviour,
        r"misaligned pointer",
        grid=60,
        outputs=60,
    ),
    "pointer from nowhere": Small(
        I + "const device float* p = (const device float*)(16ul); y[i] = p[i] + x[i];",
        I + "const device float* p = x; y[i] = p[i];",
        OutOfBounds,
        r"reads address 0x[0-9a-f]+, which is in no buffer",
    ),
}
