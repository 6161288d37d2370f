"""The meaning of a launch: arrays, sizes, attributes, simd operations, rounding, atomics."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops
from reference.emulator import (
    DataRace,
    InvalidLaunch,
    OutOfBounds,
    Unavailable,
    UninitialisedRead,
    emulate,
    metal_kernel,
    source,
)
from tests.helpers.cases import each
from tests.helpers.launching import I, run


@each("dtype", [dtype for dtype in source.TYPES if dtype != mx.float64], ids=str)
def test_every_dtype_goes_in_and_out_unchanged(dtype):
    x = mx.array(np.arange(-6, 7)).astype(dtype)
    y = run(I + "y[i] = x[i];", {"x": x}, {"y": ((13,), dtype)}, (13, 1, 1), (4, 1, 1))
    assert y.dtype == dtype
    assert mx.array_equal(x, y)


def test_scalars_have_no_axis_and_few_elements_are_constant():
    body = "y[0] = a + b + (c ? 1.0f : 0.0f) + d[2]; y[1] = float(d_shape[0] * 10 + d_ndim) + float(d_strides[0]);"
    inputs = {"a": mx.array(0.25), "b": 3, "c": True, "d": mx.array([1.0, 2.0, 3.0])}
    assert run(body, inputs, {"y": ((2,), mx.float32)}).tolist() == [7.25, 32.0]


@each("contiguous", [True, False])
@each("kind", ["transposed", "strided", "reversed", "broadcast", "sliced"])
def test_arrays_that_are_not_contiguous(kind, contiguous):
    base = mx.arange(48, dtype=mx.float32).reshape(6, 8)
    x = {
        "transposed": lambda: base.T,
        "strided": lambda: base[::2, 1::3],
        "reversed": lambda: base[::-1, ::-2],
        "broadcast": lambda: mx.broadcast_to(base[0], (3, 8)),
        "sliced": lambda: base[2:5],
    }[kind]()
    body = "uint2 p = thread_position_in_grid.xy; y[p.y * uint(x_shape[1]) + p.x] = "
    body += "x[int(p.y) * int(x_strides[0]) + int(p.x) * int(x_strides[1])]; "
    y = run(
        body,
        {"x": x},
        {"y": (x.shape, mx.float32)},
        (x.shape[1], x.shape[0], 1),
        (3, 2, 1),
        ensure_row_contiguous=contiguous,
    )
    assert mx.array_equal(x, y)


def test_what_lies_beyond_a_strided_array_is_out_of_bounds():
    base = mx.arange(48, dtype=mx.float32).reshape(6, 8)
    with pytest.raises(OutOfBounds, match=r"reads x\[28\]"):
        run("y[0] = x[28];", {"x": base[1:5, 2:6]}, {"y": ((1,), mx.float32)}, ensure_row_contiguous=False)
    assert run("y[0] = x[27];", {"x": base[1:5, 2:6]}, {"y": ((1,), mx.float32)}, ensure_row_contiguous=False) == 37


def test_outputs_without_elements_and_inputs_without():
    y, z = run("z[0] = 1.0f;", {"x": mx.zeros((0, 3))}, {"y": ((0, 2), mx.float32), "z": ((1,), mx.float32)})
    assert y.shape == (0, 2)
    assert z.item() == 1


def test_init_value_fills_what_no_thread_writes():
    y = run("y[1] = 5;", {"x": mx.zeros((1,))}, {"y": ((3,), mx.int16)}, init_value=-2)
    assert y.tolist() == [-2, 5, -2]


def test_attributes():
    """A grid of 7 x 5 x 3 in threadgroups of 4 x 3 x 2, whose edge groups are smaller, as Metal dispatches threads."""
    names = list(source.ATTRIBUTES)
    body = "uint3 g = thread_position_in_grid; uint at = ((g.z * 5u + g.y) * 7u + g.x) * 60u;"
    for index, name in enumerate(names):
        for axis, member in enumerate("xyz"):
            value = f"{name}.{member}" if source.ATTRIBUTES[name] == "uint3" else f"{name} + {axis}u"
            body += f" y[at + {3 * index + axis}u] = {value};"
    y = np.array(run(body, {"x": mx.zeros((1,))}, {"y": ((3, 5, 7, 20, 3), mx.uint32)}, (7, 5, 3), (4, 3, 2)))
    values = {name: y[..., index, :] for index, name in enumerate(names)}
    grid, group = np.array([7, 5, 3]), np.array([4, 3, 2])
    z, yy, x = np.meshgrid(range(3), range(5), range(7), indexing="ij")
    position = np.stack([x, yy, z], axis=-1)
    size = np.minimum(group, grid - position // group * group)
    inside = position % group
    index = inside[..., 0] + size[..., 0] * (inside[..., 1] + size[..., 1] * inside[..., 2])
    full = np.broadcast_to(24, index.shape)
    threads = size.prod(axis=-1)
    want = {
        "dispatch_quadgroups_per_threadgroup": full // 4,
        "dispatch_simdgroups_per_threadgroup": (full + 31) // 32,
        "dispatch_threads_per_threadgroup": np.broadcast_to(group, position.shape),
        "grid_origin": np.zeros_like(position),
        "grid_size": np.broadcast_to(grid, position.shape),
        "quadgroup_index_in_threadgroup": index // 4,
        "quadgroups_per_threadgroup": (threads + 3) // 4,
        "simdgroup_index_in_threadgroup": index // 32,
        "simdgroups_per_threadgroup": (threads + 31) // 32,
        "thread_execution_width": full * 0 + 32,
        "thread_index_in_quadgroup": index % 4,
        "thread_index_in_simdgroup": index % 32,
        "thread_index_in_threadgroup": index,
        "thread_position_in_grid": position,
        "thread_position_in_threadgroup": inside,
        "threadgroup_position_in_grid": position // group,
        "threadgroups_per_grid": np.broadcast_to([2, 2, 2], position.shape),
        "threads_per_grid": np.broadcast_to(grid, position.shape),
        "threads_per_simdgroup": full * 0 + 32,
        "threads_per_threadgroup": size,
    }
    for name in names:
        expected = want[name] if want[name].ndim == 4 else want[name][..., None] + np.arange(3)
        np.testing.assert_array_equal(values[name], expected, err_msg=name)


def test_simd_operations():
    """On 70 threads: two whole simdgroups and one of 6."""
    x = np.random.default_rng(0).integers(1, 9, 70).astype(np.int32)
    lane, group = np.arange(70) % 32, np.arange(70) // 32
    width = np.where(group < 2, 32, 6)
    groups = [x[group == g] for g in range(3)]
    operations = {
        "simd_sum(v)": lambda g: np.full_like(g, g.sum()),
        "simd_max(v)": lambda g: np.full_like(g, g.max()),
        "simd_min(v)": lambda g: np.full_like(g, g.min()),
        "simd_and(v)": lambda g: np.full_like(g, np.bitwise_and.reduce(g)),
        "simd_or(v)": lambda g: np.full_like(g, np.bitwise_or.reduce(g)),
        "simd_xor(v)": lambda g: np.full_like(g, np.bitwise_xor.reduce(g)),
        "simd_prefix_inclusive_sum(v)": np.cumsum,
        "simd_prefix_exclusive_sum(v)": lambda g: np.cumsum(g) - g,
        "simd_broadcast(v, 3)": lambda g: np.full_like(g, g[3]),
        "simd_broadcast_first(v)": lambda g: np.full_like(g, g[0]),
        "simd_shuffle(v, ushort(lane ^ 1u))": lambda g: g[np.arange(len(g)) ^ 1],
        "simd_shuffle_xor(v, 1)": lambda g: g[np.arange(len(g)) ^ 1],
        "simd_shuffle_up(v, 2)": lambda g: np.concatenate([g[:2], g[:-2]]),
        "quad_sum(int(lane & 3u))": lambda g: np.where(np.arange(len(g)) < len(g) // 4 * 4, 6, 1),
        "int(simd_all(v > 0)) * 2 + int(simd_any(v > 100))": lambda g: np.full_like(g, 2),
        "int(ulong(simd_ballot(lane % 2u == 1u)) & 0xful)": lambda g: np.full_like(g, 10),
    }
    body = I + "uint lane = thread_index_in_simdgroup; int v = x[i];"
    for index, expression in enumerate(operations):
        body += f"\ny[{index}u * 70u + i] = {expression};"
    y = run(body, {"x": mx.array(x)}, {"y": ((len(operations), 70), mx.int32)}, (70, 1, 1), (70, 1, 1))
    for row, (expression, numpy) in zip(np.array(y), operations.items()):
        np.testing.assert_array_equal(row, np.concatenate([numpy(g) for g in groups]), err_msg=expression)
    assert width.max() == 32
    body = I + "y[i] = simd_shuffle_down(x[i], 3); y[32u + i] = simd_shuffle_rotate_down(x[i], 3);"
    body += "y[64u + i] = simd_shuffle_rotate_up(x[i], 3); y[96u + i] = simd_shuffle_and_fill_up(x[i], -x[i], 3);"
    body += "y[128u + i] = simd_shuffle_and_fill_down(x[i], -x[i], 3, 8);"
    y = np.array(run(body, {"x": mx.array(x[:32])}, {"y": ((5, 32), mx.int32)}, (32, 1, 1), (32, 1, 1)))
    first = x[:32]
    np.testing.assert_array_equal(y[0], np.concatenate([first[3:], first[-3:]]))
    np.testing.assert_array_equal(y[1], np.roll(first, -3))
    np.testing.assert_array_equal(y[2], np.roll(first, 3))
    np.testing.assert_array_equal(y[3], np.concatenate([-first[-3:], first[:-3]]))
    blocks = first.reshape(4, 8)
    np.testing.assert_array_equal(y[4].reshape(4, 8), np.concatenate([blocks[:, 3:], -blocks[:, :3]], axis=1))
    assert lane.max() == 31


def test_simd_sum_is_the_tree_of_five_shuffles():
    x = mx.random.normal((32,)) * mx.exp(mx.random.normal((32,)) * 5)
    body = I + "float v = x[i]; y[i] = simd_sum(v); for (ushort k = 1; k < 32; k *= 2) v += simd_shuffle_xor(v, k);"
    y = run(body + "y[32u + i] = v;", {"x": x}, {"y": ((2, 32), mx.float32)}, (32, 1, 1), (32, 1, 1))
    assert mx.array_equal(y[0], y[1])
    assert len(set(y[0].tolist())) == 1


def some_floats() -> np.ndarray:
    """Random bit patterns: every exponent, subnormal numbers, NaN and infinities, and ties of each rounding."""
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:50_000] = bits[:50_000] & 0xFFFF0000 | 0x8000  # half way between two bfloat16
    bits[50_000:100_000] = bits[50_000:100_000] & 0xFFFFE000 | 0x1000  # and two float16
    bits[100_000:150_000] = bits[100_000:150_000] & 0x8FFFFFFF | 0x30000000  # within the range of float16
    return bits.view(np.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rounding_and_arithmetic_of_small_floats_are_mlx_s(dtype):
    x = mx.array(some_floats())
    n = x.size
    rounded = run(
        I + "y[i] = T(x[i]);", {"x": x}, {"y": ((n,), dtype)}, (n, 1, 1), (256, 1, 1), [("T", dtype)], checked=False
    )
    expected = x.astype(dtype)
    same = (rounded == expected) | (mx.isnan(rounded) & mx.isnan(expected))
    assert mx.all(same).item()
    a, b = expected[: n // 2], expected[n // 2 :]
    body = I + "y[i] = a[i] + b[i]; z[i] = a[i] * b[i]; w[i] = a[i] / b[i]; v[i] = T(metal::sqrt(a[i]));"
    outputs = dict.fromkeys("yzwv", (a.shape, dtype))
    got = run(body, {"a": a, "b": b}, outputs, (n // 2, 1, 1), (256, 1, 1), [("T", dtype)], checked=False)
    for y, want in zip(got, (a + b, a * b, a / b, mx.sqrt(a))):
        assert mx.all((y == want) | (mx.isnan(y) & mx.isnan(want))).item()


def test_mathematics_is_float64_rounded():
    x = np.random.default_rng(2).uniform(0.01, 0.99, 4096).astype(np.float32)
    functions = [
        "exp",
        "exp2",
        "log",
        "log2",
        "log10",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
    ]
    functions += ["sqrt", "rsqrt", "sinpi", "exp10", "acosh", "asinh", "atanh"]
    exact = {
        "rsqrt": lambda v: 1 / np.sqrt(v),
        "sinpi": lambda v: np.sin(np.pi * v),
        "exp10": lambda v: 10**v,
    }
    exact |= {name: getattr(np, f"arc{name[1:]}") for name in functions if name.startswith("a")}
    body = I
    for index, name in enumerate(functions):
        body += f"\ny[{index * 4096}u + i] = metal::precise::{name}(x[i]{' + 1.0f' if name == 'acosh' else ''});"
    y = np.array(run(body, {"x": mx.array(x)}, {"y": ((len(functions), 4096), mx.float32)}, (4096, 1, 1), (256, 1, 1)))
    for row, name in zip(y, functions):
        wide = (x + np.float32(1) if name == "acosh" else x).astype(np.float64)
        want = exact[name](wide) if name in exact else getattr(np, name)(wide)
        assert np.max(np.abs(row - want) / np.spacing(np.abs(want).astype(np.float32))) < 0.51, name


def test_vectors():
    body = """
    float4 v = *(const device float4*)(x);
    float3 w = v.xyz * 2.0f + float3(1.0f, 2.0f, 3.0f);
    v.zw = w.xy;
    half2 h = half2(0.5h, 1.5h);
    uint3 u = uint3(1u, 2u, 3u);
    y[0] = w.x; y[1] = w.z; y[2] = v.w; y[3] = dot(v, float4(1.0f)); y[4] = float((h + h).y); y[5] = float((u << 1u).z);
    y[6] = all(v > float4(0.0f)) ? 1.0f : 0.0f; y[7] = max(w, float3(4.0f)).x;
    """
    y = run(body, {"x": mx.arange(1, 9, dtype=mx.float32)}, {"y": ((8,), mx.float32)})
    assert y.tolist() == [3, 9, 6, 12, 3, 6, 1, 4]


def test_swizzles_and_packed_vectors():
    body = """
    half4 h = *(const device half4*)(x);
    h.xy *= 2.0h;
    h = h.wzyx;
    h.bg += 1.0h;
    float3 v = ((const device packed_float3*)p)[1];
    float3 normal = cross(v.xyz, float3(1.0f, 0.0f, 0.0f));
    packed_float3 w = packed_float3(v.zzx);
    ((device packed_float3*)z)[1] = w;
    ((device packed_float3*)z)[0] = packed_float3(dot(v.xyz, v.zyx), length(v.xz), normal.z);
    for (int i = 0; i < 4; ++i) y[i] = h[i];
    """
    x, p = mx.array([1, 2, 3, 4] * 2, mx.float16), mx.array([0, 0, 0, 3, 5, 4, 0, 0, 0], mx.float32)
    y, z = run(body, {"x": x, "p": p}, {"y": ((4,), mx.float16), "z": ((6,), mx.float32)})
    assert y.tolist() == [4, 4, 5, 2]
    assert z.tolist() == [49, 5, -5, 4, 4, 3]


def test_votes():
    body = I + "y[i] = popcount(uint((simd_vote::vote_t)(simd_ballot(i % 3u == 0u))));"
    assert run(body, {"x": mx.zeros((1,))}, {"y": ((32,), mx.int32)}, (32, 1, 1), (32, 1, 1)).tolist() == [11] * 32


def test_many_threadgroup_variables():
    def body(n: int) -> str:
        return " ".join(f"threadgroup float s{k}[1]; s{k}[0] = 1.0f;" for k in range(n)) + "y[0] = s7[0];"

    call = ({"x": mx.zeros((1,))}, {"y": ((1,), mx.float32)})
    assert run(body(96), *call).item() == 1
    with pytest.raises(Unavailable, match="more threadgroup variables than the 96"):
        run(body(97), *call)


@each("size", ["N > 7 ? N : 7", "(N < 7) ? 7 : N", "twice<20, (N > 7)>()", "N >> 0"])
def test_sizes_of_threadgroup_arrays_that_look_like_templates(size):
    body = I + "constexpr int N = 40; " + f"threadgroup float s[{size}], t[1]; s[i] = x[i]; "
    body += "threadgroup_barrier(mem_flags::mem_threadgroup); t[0] = 0.0f; y[i] = s[39u - i];"
    header = "template <int N, bool B> constexpr int twice() { return 2 * N; }"
    x = mx.arange(40, dtype=mx.float32)
    with pytest.raises(DataRace, match="t"):
        run(body, {"x": x}, {"y": ((40,), mx.float32)}, (40, 1, 1), (40, 1, 1), header=header)
    y = run(
        body.replace("t[0] = 0.0f;", ""), {"x": x}, {"y": ((40,), mx.float32)}, (40, 1, 1), (40, 1, 1), header=header
    )
    assert y.tolist() == x[::-1].tolist()


def test_atomics():
    body = I + "atomic_fetch_add_explicit(&y[i % 4u], x[i], memory_order_relaxed);"
    body += "atomic_fetch_max_explicit(&z[0], int(i), memory_order_relaxed);"
    y, z = run(
        body,
        {"x": mx.arange(100, dtype=mx.int32)},
        {"y": ((4,), mx.int32), "z": ((1,), mx.int32)},
        (100, 1, 1),
        (32, 1, 1),
        atomic_outputs=True,
        init_value=0,
    )
    assert y.tolist() == [sum(range(k, 100, 4)) for k in range(4)]
    assert z.item() == 99


def test_a_plain_read_beside_atomics_is_a_race():
    atomic = "atomic_fetch_add_explicit(&y[0], 1, memory_order_relaxed); "
    read = "if (i >= 32u) { y[i].value = y[0].value; }"
    barrier = "threadgroup_barrier(mem_flags::mem_device);"
    call = ({"x": mx.zeros((1,))}, {"y": ((64,), mx.int32)}, (64, 1, 1))
    options = {"atomic_outputs": True, "init_value": 0, "order": "forward"}
    assert run(I + atomic + barrier + read, *call, (64, 1, 1), **options)[32:].tolist() == [64] * 32
    message = "reads y\\[0\\], which thread .* wrote .* no barrier for device memory"
    # The last of the threads reads right after its own addition: the others' are not ordered before it.
    alone = read.replace("i >= 32u", "i == 63u")
    with pytest.raises(DataRace, match=message):
        run(I + atomic + alone, *call, (64, 1, 1), **options)
    # A barrier waits for one's own threadgroup only.
    with pytest.raises(DataRace, match=message):
        run(I + atomic + barrier + read, *call, (32, 1, 1), **options)


SHIFT = (
    "threadgroup float s[65]; s[i] = x[i]; if (i == 0u) { s[64] = 0.0f; }"
    "threadgroup_barrier(mem_flags::mem_threadgroup); float a = NEXT; s[i] = a;"
    "threadgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[i];"
)
SHIFTED = (
    r"thread \(1, 0, 0\) .* writes 4 bytes at byte 4 of a threadgroup variable, which thread \(0, 0, 0\) .* read at"
)
WRITE_AFTER_READ = {
    "the latest reader": (SHIFT.replace("NEXT", "s[i + 1u]"), 64, SHIFTED),
    "the reader before the writer itself": (SHIFT.replace("NEXT", "s[i + 1u] + s[i]"), 64, SHIFTED),
    "a reader of an earlier threadgroup": (
        "float a = y[40]; threadgroup_barrier(mem_flags::mem_device); if (i == 40u) { y[40] = x[i] + a; }",
        32,
        r"thread \(8, 0, 0\) of threadgroup \(1, 0, 0\) writes y\[40\], which .* of threadgroup \(0, 0, 0\) read",
    ),
}


@pytest.mark.parametrize("name", WRITE_AFTER_READ)
def test_a_write_after_a_read(name):
    """In forward order no thread reads what another wrote too late: these writes are all there is to see."""
    body, threadgroup, message = WRITE_AFTER_READ[name]
    body = I + body
    with pytest.raises(DataRace, match=message):
        run(
            body,
            {"x": mx.ones((64,))},
            {"y": ((64,), mx.float32)},
            (64, 1, 1),
            (threadgroup, 1, 1),
            order="forward",
            init_value=0,
        )


def test_contraction_changes_results_only_when_asked():
    a = mx.array([1 + 2**-12, 1.0])
    body = I + "float p = x[i] * x[i]; y[i] = p - x[2u + i];"
    x = mx.concatenate([a, a * a])
    launch = ({"x": x}, {"y": ((2,), mx.float32)}, (2, 1, 1), (2, 1, 1))
    assert run(body, *launch).tolist() == [0, 0]
    assert run(body, *launch, contract=True).tolist() == [2**-24, 0]


def test_a_variable_that_may_be_unset_is_an_error_where_it_is():
    """The compiler cannot tell: running with another value in the variable does."""
    body = I + "float a; for (int k = 0; k < n; ++k) { a = x[i] + float(k); } y[i] = m > 0 ? a : 0.0f;"

    def call(n: int, m: int) -> mx.array:
        inputs = {"x": mx.ones((64,)), "n": mx.array(n), "m": mx.array(m)}
        return run(body, inputs, {"y": ((64,), mx.float32)}, (64, 1, 1), (32, 1, 1))

    assert call(3, 1).tolist() == [3] * 64
    assert call(0, 0).tolist() == [0] * 64
    with pytest.raises(UninitialisedRead, match="body line 1: 'a' may be used uninitialized, and the result depends"):
        call(0, 1)


def test_orders_are_what_they_say():
    """Threads note when they ran, by an atomic counter."""
    body = I + "y[i + 1u].value = atomic_fetch_add_explicit(&y[0], 1, memory_order_relaxed);"
    call = ({"x": mx.zeros((1,))}, {"y": ((13,), mx.int32)}, (12, 1, 1), (4, 1, 1))
    turns = {
        (order, seed): run(body, *call, atomic_outputs=True, init_value=0, order=order, seed=seed)[1:].tolist()
        for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))
    }
    assert turns["forward", 0] == list(range(12))
    assert turns["reverse", 0] == list(range(12))[::-1]
    assert sorted(turns["random", 1]) == list(range(12))
    assert len({tuple(turn) for turn in turns.values()}) == 4


def test_results_do_not_depend_on_order_and_seed():
    x = mx.random.normal((3, 200))
    results = []
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with emulate(order=order, seed=seed):
            results.append(ops.rms_norm(x, mx.ones((200,)), 1e-6))
    assert all(mx.array_equal(results[0], y) for y in results[1:])


def test_without_checks_a_wild_access_is_an_error_still():
    with pytest.raises(OutOfBounds, match="touches memory that no buffer has"):
        run("y[0] = x[-(1l << 38)];", {"x": mx.zeros((1,))}, {"y": ((1,), mx.float32)}, checked=False)
    body = "thread float v[100000]; for (int k = 0; k < 100000; ++k) v[k] = x[k & 1]; y[0] = v[int(x[0]) + 5];"
    with pytest.raises(OutOfBounds, match="256 KiB of stack"):
        run(body, {"x": mx.zeros((2,))}, {"y": ((1,), mx.float32)}, checked=False)
    assert run("y[0] = x[0];", {"x": mx.ones((1,))}, {"y": ((1,), mx.float32)}, checked=False).item() == 1


def test_what_emulate_changes_it_changes_back():
    before, own = (mx.fast.metal_kernel, mx.metal.is_available), ops.executor()
    with emulate():
        assert mx.fast.metal_kernel is metal_kernel
        assert mx.metal.is_available()
        assert ops.executor() == "metal"
        with emulate(checked=False):
            assert ops.executor() == "metal"
        assert mx.fast.metal_kernel is metal_kernel
    assert (mx.fast.metal_kernel, mx.metal.is_available) == before
    assert ops.executor() == own


def test_threads_of_python_take_turns():
    results: list[bool] = []

    def one(seed: int) -> None:
        x = mx.array(np.random.default_rng(seed).standard_normal(500).astype(np.float32))
        y = kernel(
            inputs=[x], grid=(500, 1, 1), threadgroup=(50, 1, 1), output_shapes=[(500,)], output_dtypes=[mx.float32]
        )[0]
        results.append(np.array_equal(np.array(y), np.array(x) * 2))

    with emulate():
        kernel = metal_kernel("k", ["x"], ["y"], I + "y[i] = x[i] * 2.0f;")
        one(0)
        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 9


def test_subnormal_numbers_are_flushed_only_when_asked():
    x = mx.array([1e-41, 1.0, 2.0**-126], mx.float32)
    body = I + "y[i] = x[i] * 1000.0f; z[i] = x[i] * 0.5f;"
    launch = ({"x": x}, {"y": ((3,), mx.float32), "z": ((3,), mx.float32)}, (3, 1, 1), (3, 1, 1))
    kept, halves = run(body, *launch)
    assert kept[0].item() > 9e-39
    assert halves[2].item() == 2.0**-127
    for checked in (True, False):
        flushed, halves = run(body, *launch, flush=True, checked=checked)
        assert flushed.tolist() == [0, 1000, 1000 * 2.0**-126], "an operand"
        assert halves.tolist() == [0, 0.5, 0], "a result"
    assert (mx.array([1e-41]) * 1000).item() > 0, "Python's own arithmetic is as it was"


def test_subnormal_numbers_of_half_are_kept():
    x = mx.array([2.0**-20, 2.0**-24], mx.float16)
    body = I + "y[i] = half(float(x[i]) * 0.5f + float(x[i]) * 0.5f);"
    assert mx.array_equal(x, run(body, {"x": x}, {"y": ((2,), mx.float16)}, (2, 1, 1), (2, 1, 1), flush=True))


def test_more_threads_than_a_kernel_may_have_are_refused():
    launch = ({"x": mx.zeros((512,))}, {"y": ((512,), mx.float32)}, (512, 1, 1), (512, 1, 1))
    run(I + "y[i] = x[i];", *launch)
    with pytest.raises(InvalidLaunch, match="has 512 threads, Metal allows at most 384"):
        run(I + "y[i] = x[i];", *launch, max_threads=384)
