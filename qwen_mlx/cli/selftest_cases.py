"""The self-test's cases: every kernel, compared with float64."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..backend import mx
from . import selftest_decoding

EPS = 1e-6
LIMIT = 2.0  # units in the last place of the dtype, against float64
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

Arrays = Sequence[mx.array]
Exact = Sequence[np.ndarray]
Operation = tuple[Callable[..., Arrays], Callable[..., Exact], Callable[..., Arrays]]


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    operation, exact and peer take the inputs and return a list: the operation's outputs; the same in float64, NaN and
    infinities where torch has them; MLX's own functions for it, whose error is shown beside. measured_at: "element";
    "pair", the length of a rotated pair, in the first two outputs; "largest", the largest element, for long sums.
    """

    name: str
    dtype: mx.Dtype
    operation: Callable[..., Arrays]
    exact: Callable[..., Exact]
    peer: Callable[..., Arrays] | None
    inputs: tuple[mx.array, ...] = ()
    measured_at: str = "element"

    def compute(self) -> Arrays:
        """The operation's outputs."""
        return self.operation(*self.inputs)

    def error(self, outputs: Arrays) -> float:
        """The largest error in ulp; inf for a wrong number of outputs, shape, dtype, NaN or infinity."""
        exact = self.exact(*self.inputs)
        if len(outputs) != len(exact):
            return float("inf")
        if self.measured_at == "largest":
            return max(sum_error(got, want, self.dtype) for got, want in zip(outputs, exact))
        sizes = [*map(pair_lengths, exact[:2]), *exact[2:]] if self.measured_at == "pair" else exact
        return max(ulp_error(got, want, self.dtype, size) for got, want, size in zip(outputs, exact, sizes))


def ulp_error(got: mx.array, want: np.ndarray, dtype: mx.Dtype, size: np.ndarray | None = None) -> float:
    """The largest difference, in units of dtype's last place at `size` (None: at want); inf where only one is NaN or
    infinite."""
    if got.shape != want.shape or got.dtype != dtype:
        return float("inf")
    if not got.size:
        return 0.0
    precision, smallest, largest = {
        mx.float32: (24, -126, 3.4028235677973366e38),
        mx.float16: (11, -14, 65520.0),
        mx.bfloat16: (8, -126, 3.3961775292304957e38),
    }[dtype]
    values = to_float64(got)
    size = want if size is None else size
    want = np.where(np.abs(want) >= largest, np.copysign(np.inf, want), want)  # rounds to infinity
    with np.errstate(invalid="ignore"):
        exponent = np.where((size == 0) | ~np.isfinite(size), smallest, np.frexp(size)[1] - 1)
        unit = 2.0 ** (np.maximum(exponent, smallest) - precision + 1)
        error = np.abs(values - want) / unit
    same = (np.isnan(values) & np.isnan(want)) | (values == want)
    if sys.platform == "darwin":  # Apple's GPUs may flush subnormal numbers to zero
        same |= (values == 0) & (np.abs(want) < 2.0**smallest)
    return float(np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf)).max())


def sum_error(got: mx.array, want: np.ndarray, dtype: mx.Dtype) -> float:
    """The largest difference in units of dtype's last place, and at least of 2^-19, at the largest element: a sum's
    error is that of its largest terms. inf for a wrong shape or dtype and for NaN."""
    if got.shape != want.shape or got.dtype != dtype:
        return float("inf")
    unit = max({mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}[dtype], 2**-19)
    difference = np.abs(to_float64(got) - want).max() / (np.abs(want).max() * unit)
    return float(difference) if np.isfinite(difference) else float("inf")


def pair_lengths(x: np.ndarray) -> np.ndarray:
    """sqrt(a^2 + b^2) of the pair that each element of the heads x (..., head_dim) belongs to, in x's shape.

    RoPE's error is judged against it: |error| / ulp(dtype, sqrt(a^2 + b^2)). Attention sees products of whole pairs; an
    element alone may cancel to almost nothing, where its own last place says nothing about the result.
    """
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([np.hypot(a, b)] * 2, axis=-1)


def to_float64(x: mx.array) -> np.ndarray:
    """The values of x, exactly."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def cases(small: bool = False) -> Iterator[Case]:
    """Every kernel, dtype and kind of input; `small` leaves out large ones, and most shapes in 16 bits."""
    for index, dtype in enumerate(DTYPES):
        random = _Random(index, dtype)
        few = 2 if small and dtype != mx.float32 else None
        yield from _norm_cases(random, small, few)
        yield from _swiglu_cases(random, small, few)
        yield from _rope_cases(random, small)
        yield from _gradient_cases(random)
        if not small:
            yield from decoding_cases(dtype)


def decoding_cases(dtype: mx.Dtype, small: bool = False) -> Iterator[Case]:
    """Every kernel that decoding one token launches, against plain MLX on the CPU."""

    def exact(call: Callable[[], Arrays]) -> Exact:
        with ops.forced("reference"), mx.stream(mx.cpu):
            return [to_float64(x) for x in call()]

    for name, call in selftest_decoding.calls(dtype, small):
        yield Case(f"decoding: {name}", dtype, call, functools.partial(exact, call), None, measured_at="largest")


class _Random:
    """Normal deviates of one dtype."""

    def __init__(self, seed: int, dtype: mx.Dtype):
        self.generator, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> mx.array:
        return mx.array((self.generator.standard_normal(shape) * scale).astype(np.float32)).astype(self.dtype)


def exact_rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """rms_norm in float64, with the squares of float32 overflowing as torch's do."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        squares = np.square(x.astype(np.float32)).astype(np.float64)
        normed: np.ndarray = x * (1 / np.sqrt(squares.mean(axis=-1, keepdims=True) + EPS)) * weight
    return normed


def exact_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """swiglu in float64; silu(-inf) is NaN, as torch's."""
    with np.errstate(over="ignore", invalid="ignore"):
        product: np.ndarray = gate / (1 + np.exp(-gate)) * up
    return product


def exact_rope(x: np.ndarray, offset: int | np.ndarray, rotary: ops.Rotary) -> np.ndarray:
    """rope in float64: integer positions times float32 frequencies are exact there."""
    positions = np.atleast_1d(offset)[:, None] + np.arange(x.shape[1])
    angles = positions[:, :, None, None] * np.array(rotary.inv_freq)
    cos, sin = np.cos(angles) * rotary.attention_factor, np.sin(angles) * rotary.attention_factor
    a, b = np.split(x, 2, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def extremes(random: _Random, rows: int, width: int) -> mx.array:
    """Random rows; then NaN, +-inf, huge and subnormal values, zeros and one huge value, a row each."""
    x = to_float64(random(rows, width))
    kinds = (np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-40)
    x[: len(kinds), 1] = kinds
    tiny = 1e-35 if sys.platform == "darwin" else 1e-41  # the norm of a flushed row would be 0, not a subnormal number
    for row, value in enumerate((0.0, tiny, 1e38, -0.0), len(kinds)):
        x[row] = value
    return mx.array(x.astype(np.float32)).astype(random.dtype)


# name: the operation, the same in float64, and MLX's own functions for it.
NORMS: dict[str, Operation] = {
    "rms_norm": (
        lambda x, _, weight: [ops.rms_norm(x, weight, EPS)],
        lambda x, _, weight: [exact_rms_norm(to_float64(x), to_float64(weight))],
        lambda x, _, weight: [mx.fast.rms_norm(x, weight, EPS)],
    ),
    "add_rms_norm": (
        lambda x, residual, weight: ops.add_rms_norm(x, residual, weight, EPS),
        lambda x, residual, weight: [
            to_float64(_sum(x, residual)),
            exact_rms_norm(to_float64(_sum(x, residual)), to_float64(weight)),
        ],
        lambda x, residual, weight: [x + residual, mx.fast.rms_norm(x + residual, weight, EPS)],
    ),
}
GATES: dict[str, Operation] = {
    "swiglu_joined": (
        lambda gate_up, *bias: [ops.swiglu_joined(gate_up, *bias)],
        lambda gate_up, *bias: [exact_swiglu(*np.split(to_float64(_sum(gate_up, *bias)), 2, axis=-1))],
        lambda gate_up, *bias: [_mlx_swiglu(*mx.split(sum(bias, start=gate_up), 2, axis=-1))],
    )
}
GATES["swiglu"] = (
    lambda *arrays: [ops.swiglu(*(half for array in arrays for half in mx.split(array, 2, axis=-1)))],
    *GATES["swiglu_joined"][1:],
)


def _mlx_swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _norm_cases(random: _Random, small: bool, few: int | None) -> Iterator[Case]:
    shapes: list[tuple[int, ...]] = [(1, 1, 896), (5, 897), (0, 8), (1, 1), (3, 7), (2, 3, 64), (2, 8192)]
    shapes = [shape for shape in shapes[:few] if not (small and shape[-1] > 4096)]
    shapes += [(1024, 3584)] * (not small)
    table = {str(shape): (random(*shape), random(*shape), random(shape[-1])) for shape in shapes}
    table["unaligned"] = random(4, 904)[1:, 3:899], random(3, 896), random(897)[1:]
    table["transposed"] = random(96, 5).T, random(96, 5).T, random(192)[::2]
    x = extremes(random, 12, 96)
    table["extremes"] = x, mx.zeros_like(x), random(96)
    for label, inputs in table.items():
        for name, operation in NORMS.items():
            yield Case(f"{name} {label}", random.dtype, *operation, inputs)


def _swiglu_cases(random: _Random, small: bool, few: int | None) -> Iterator[Case]:
    table: dict[str, tuple[mx.array, ...]] = {}
    shapes: list[tuple[int, ...]] = [(1, 1, 9728), (3, 14), (0, 8), (1, 2), (2, 3, 610)]
    for shape in shapes[:few]:
        table[str(shape)] = (random(*shape, scale=2),)
        table[f"{shape} biases"] = random(*shape, scale=2), random(shape[-1])
    if not small:
        # No gate below -8, whose silu is subnormal in float16 and rounds to fewer digits.
        table["(512, 37888)"] = (random(512, 37888),)
    table["unaligned"] = random(4, 616)[1:, 1:609], random(609)[1:]
    x = extremes(random, 12, 64)
    table["extremes"] = (mx.concatenate([x, mx.ones_like(x)], axis=-1),)
    for label, inputs in table.items():
        for name, operation in GATES.items():
            yield Case(f"{name} {label}", random.dtype, *operation, inputs)


def _rope_cases(random: _Random, small: bool) -> Iterator[Case]:
    plain, yarn, wide = ops.Rotary.plain(64, 1e6), ops.Rotary.yarn(128, 1e6, 4.0, 32768), ops.Rotary.plain(128, 1e6)
    rows = np.array([3, 70_000, 999_000])
    strange = mx.concatenate([extremes(random, 12, 64)[None, None], mx.ones((1, 1, 12, 64), random.dtype)], axis=1)
    # label, x, first position, rotary
    table: list[tuple[str, mx.array, int | np.ndarray, ops.Rotary]] = [
        ("(0, 1, 2, 64)", random(0, 1, 2, 64), 5, plain),
        ("(1, 1, 2, 64) at 0", random(1, 1, 2, 64), 0, plain),
        ("(1, 7, 2, 64) at 999_990", random(1, 7, 2, 64), 999_990, plain),
        ("(2, 3, 1, 6) at 5", random(2, 3, 1, 6), 5, ops.Rotary.plain(6, 1e6)),
        ("(3, 4, 2, 64) by sequence", random(3, 4, 2, 64), rows, plain),
        ("(1, 3, 5, 128) YaRN", random(1, 3, 5, 128), 100_000, yarn),
        ("heads first, transposed", random(2, 2, 5, 64).swapaxes(1, 2), 17, plain),
        ("extremes", strange, 0, plain),
        ("(1, 1027, 1, 64) many tokens", random(1, 1027, 1, 64), 3, plain),
    ]
    if not small:
        table.append(("(1, 2048, 16, 128) at 500_000", random(1, 2048, 16, 128), 500_000, wide))
    for label, x, start, rotary in table:
        operation: Operation = (
            lambda x, p=start, r=rotary: [ops.rope(x, r.table(p, x.shape[1]))],
            lambda x, p=start, r=rotary: [exact_rope(to_float64(x), p, r)],
            lambda x, p=start: [_mlx_rope(x, p)],
        )
        peer = None if x.size == 0 or label == "extremes" or rotary is yarn else operation[2]
        yield Case(f"rope {label}", random.dtype, *operation[:2], peer, (x,), "pair")
    # label, qkv and its bias, first position, rotary, query heads, key/value heads
    joined: list[tuple[str, tuple[mx.array, ...], int | np.ndarray, ops.Rotary, int, int]] = [
        ("(1, 1, 1152) 14 + 2 heads", (random(1, 1, 1152), random(1152)), 41, plain, 14, 2),
        ("(3, 2, 256) by sequence", (random(3, 2, 256), random(256)), rows, plain, 2, 1),
        ("(2, 3, 1024) YaRN, no bias", (random(2, 3, 1024),), 5000, yarn, 4, 2),
        ("unaligned", (random(2, 4, 264)[:, 1:, 5:261], random(257)[1:]), 9, plain, 2, 1),
        ("(2, 513, 192) many tokens", (random(2, 513, 192),), np.array([7, 900]), plain, 1, 1),
    ]
    if not small:
        joined.append(("(1, 1024, 4608) 28 + 4 heads", (random(1, 1024, 4608), random(4608)), 0, yarn, 28, 4))
    for label, inputs, start, rotary, heads, kv in joined:
        yield _qkv_case(label, inputs, start, rotary, heads, kv)


def _mlx_rope(x: mx.array, offset: int | np.ndarray) -> mx.array:
    start = offset if isinstance(offset, int) else mx.array(offset.astype(np.int32))
    heads = x.swapaxes(1, 2)
    return mx.fast.rope(heads, x.shape[-1], traditional=False, base=1e6, scale=1.0, offset=start).swapaxes(1, 2)


def _qkv_case(
    label: str, inputs: tuple[mx.array, ...], offset: int | np.ndarray, rotary: ops.Rotary, heads: int, kv: int
) -> Case:
    def qkv_rope(x: mx.array, bias: mx.array | None = None) -> Arrays:
        q, k_and_v = ops.qkv_rope(x, bias, rotary.table(offset, x.shape[1]), heads, kv)
        return [q, k_and_v[:, :, 0], k_and_v[:, :, 1]]

    def exact(x: mx.array, *bias: mx.array) -> Exact:
        split = to_float64(_sum(x, *bias)).reshape(*x.shape[:2], heads + 2 * kv, -1)
        rotated = exact_rope(split[:, :, : heads + kv], offset, rotary)
        return [rotated[:, :, :heads], rotated[:, :, heads:], split[:, :, heads + kv :]]

    return Case(f"qkv_rope {label}", inputs[0].dtype, qkv_rope, exact, None, inputs, "pair")


def _gradient_cases(random: _Random) -> Iterator[Case]:
    table = ops.Rotary.plain(64, 1e6).table(7, 3)

    def one(name: str, function: Callable[..., mx.array | tuple[mx.array, ...]], *inputs: mx.array) -> Case:
        def gradients(*inputs: mx.array) -> Arrays:
            def as_list(*x: mx.array) -> list[mx.array]:
                y = function(*x)
                return [y] if isinstance(y, mx.array) else list(y)

            cotangents = [mx.cos(mx.arange(y.size)).reshape(y.shape).astype(y.dtype) for y in as_list(*inputs)]
            return mx.vjp(as_list, list(inputs), cotangents)[1]

        def exact(*inputs: mx.array) -> Exact:
            with ops.forced("reference"):
                return [to_float64(gradient) for gradient in gradients(*inputs)]

        return Case(f"gradient of {name}", random.dtype, gradients, exact, None, inputs)

    x, y, weight = random(3, 128), random(3, 128), random(128)
    yield one("rms_norm", lambda x, w: ops.rms_norm(x, w, EPS), x, weight)
    yield one("add_rms_norm", lambda x, y, w: ops.add_rms_norm(x, y, w, EPS), x, y, weight)
    yield one("swiglu", ops.swiglu, x, y, weight, weight)
    yield one("swiglu_joined", ops.swiglu_joined, x, weight)
    yield one("rope", lambda x: ops.rope(x, table), random(1, 3, 2, 64))
    yield one("qkv_rope", lambda x, b: ops.qkv_rope(x, b, table, 2, 1), random(1, 3, 256), random(256))


def _sum(x: mx.array, *others: mx.array) -> mx.array:
    with mx.stream(mx.cpu):
        return sum(others, start=x)


def run(selected: Sequence[Case]) -> list[dict[str, Any]]:
    """Runs the cases where they are; each row has case, dtype, ulp, mlx_ulp (None without a peer), ok and error."""
    rows = []
    for case in selected:
        row: dict[str, Any] = {"case": case.name, "dtype": str(case.dtype).removeprefix("mlx.core.")}
        try:
            row["ulp"] = case.error(case.compute())
            row["mlx_ulp"] = None if case.peer is None else case.error(case.peer(*case.inputs))
            row["ok"] = row["ulp"] <= LIMIT
        except Exception as error:  # a kernel that does not compile is a result too; where this package lies is not
            text = f"{type(error).__name__}: {error}".replace(f"{Path(__file__).parents[2]}{os.sep}", "")
            row.update(ulp=None, mlx_ulp=None, ok=False, error=text)
        rows.append(row)
        if _done is not None:
            with _done.get_lock():
                _done.value += 1
    return rows


_done: Any = None  # numbers that processes share: cases that were run, and all
_total: Any = None


def share_progress(done: Any, total: Any) -> None:
    """Lets this process count what it does in two numbers of multiprocessing's."""
    global _done, _total
    _done, _total = done, total


def run_part(part: int, parts: int) -> list[dict[str, Any]]:
    """Runs every `parts`-th of all cases, from `part` on."""
    all_cases = list(cases())
    if _total is not None:
        _total.value = len(all_cases)
    return run(all_cases[part::parts])
