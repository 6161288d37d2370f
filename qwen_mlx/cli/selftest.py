"""Runs every kernel on this machine's GPU and compares it with float64: `python -m qwen_mlx.selftest`.

Prints a table and writes a JSON file to attach to an issue. Exit status: 0 if every case is within its limit, 1 if not,
2 if there is no GPU to run on.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..backend import describe, mx
from . import selftest_decoding

EPS = 1e-6
LIMIT = 2.0  # units in the last place of the dtype, against float64
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

Arrays = Sequence[mx.array]
Exact = Sequence[np.ndarray]


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    compute: the operation's outputs; exact: the same in float64, NaN and infinities where torch has them; peer: MLX's
    own functions for the same result, whose error is shown beside.
    """

    name: str
    dtype: mx.Dtype
    compute: Callable[[], Arrays]
    exact: Callable[[], Exact]
    peer: Callable[[], Arrays] | None = None

    def error(self, outputs: Arrays) -> float:
        """The largest error in ulp; inf for a wrong shape, dtype, NaN or infinity."""
        exact = self.exact()
        if len(outputs) != len(exact):
            return float("inf")
        return max((ulp_error(got, want, self.dtype) for got, want in zip(outputs, exact)), default=0.0)


class _RotationCase(Case):
    """A case of rotated pairs, whose error is measured at the pair's length: two outputs, or one, are rotated; a third,
    v, is not."""

    def error(self, outputs: Arrays) -> float:
        exact = self.exact()
        if len(outputs) != len(exact):
            return float("inf")
        sizes = [*map(pair_lengths, exact[:2]), *exact[2:]]
        return max(ulp_error(got, want, self.dtype, size) for got, want, size in zip(outputs, exact, sizes))


class _SumCase(Case):
    """A case of long sums, whose error is measured at the largest element."""

    def error(self, outputs: Arrays) -> float:
        return selftest_decoding.error(outputs, self.exact(), self.dtype)


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
        yield from _norm_cases(random, dtype, small)
        yield from _swiglu_cases(random, dtype, small)
        yield from _rope_cases(random, dtype, small)
        yield from _gradient_cases(random, dtype)
        if not small:
            yield from decoding_cases(dtype)


def decoding_cases(dtype: mx.Dtype, small: bool = False) -> Iterator[Case]:
    """Every kernel that decoding one token launches, against plain MLX on the CPU."""

    def exact(call: Callable[[], Arrays]) -> Exact:
        with ops.forced("reference"), mx.stream(mx.cpu):
            return [to_float64(x) for x in call()]

    for name, call in selftest_decoding.calls(dtype, small):
        yield _SumCase(f"decoding: {name}", dtype, call, functools.partial(exact, call))


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
    x[len(kinds)] = 0.0
    x[len(kinds) + 1] = 1e-41
    x[len(kinds) + 2] = 1e38
    x[len(kinds) + 3] = -0.0
    return mx.array(x.astype(np.float32)).astype(random.dtype)


def _norm_cases(random: _Random, dtype: mx.Dtype, small: bool) -> Iterator[Case]:
    def pair(label: str, x: mx.array, residual: mx.array, weight: mx.array) -> Iterator[Case]:
        yield Case(
            f"rms_norm {label}",
            dtype,
            lambda: [ops.rms_norm(x, weight, EPS)],
            lambda: [exact_rms_norm(to_float64(x), to_float64(weight))],
            lambda: [mx.fast.rms_norm(x, weight, EPS)],
        )

        def exact() -> Exact:
            h = to_float64(_on_cpu(lambda: x + residual))
            return [h, exact_rms_norm(h, to_float64(weight))]

        def peer() -> Arrays:
            h = x + residual
            return [h, mx.fast.rms_norm(h, weight, EPS)]

        yield Case(f"add_rms_norm {label}", dtype, lambda: ops.add_rms_norm(x, residual, weight, EPS), exact, peer)

    for shape in ((1, 1, 896), (5, 897), (0, 8), (1, 1), (3, 7), (2, 3, 64), (2, 8192))[: _shapes(small, dtype)]:
        if not (small and shape[-1] > 4096):
            yield from pair(str(shape), random(*shape), random(*shape), random(shape[-1]))
    if not small:
        yield from pair("(1024, 3584)", random(1024, 3584), random(1024, 3584), random(3584))
    yield from pair("unaligned", random(4, 904)[1:, 3:899], random(3, 896), random(897)[1:])
    yield from pair("transposed", random(96, 5).T, random(96, 5).T, random(192)[::2])
    x = extremes(random, 12, 96)
    yield from pair("extremes", x, mx.zeros_like(x), random(96))


def _swiglu_cases(random: _Random, dtype: mx.Dtype, small: bool) -> Iterator[Case]:
    def pair(label: str, joined: mx.array, bias: mx.array | None) -> Iterator[Case]:
        def exact() -> Exact:
            total = joined if bias is None else _on_cpu(lambda: joined + bias)
            return [exact_swiglu(*np.split(to_float64(total), 2, axis=-1))]

        def peer() -> Arrays:
            gate, up = mx.split(joined if bias is None else joined + bias, 2, axis=-1)
            return [gate * mx.sigmoid(gate) * up]

        def separate() -> Arrays:
            biases = () if bias is None else mx.split(bias, 2)
            return [ops.swiglu(*mx.split(joined, 2, axis=-1), *biases)]

        yield Case(f"swiglu_joined {label}", dtype, lambda: [ops.swiglu_joined(joined, bias)], exact, peer)
        yield Case(f"swiglu {label}", dtype, separate, exact, peer)

    for shape in ((1, 1, 9728), (3, 14), (0, 8), (1, 2), (2, 3, 610))[: _shapes(small, dtype)]:
        yield from pair(str(shape), random(*shape, scale=2), None)
        yield from pair(f"{shape} biases", random(*shape, scale=2), random(shape[-1]))
    if not small:
        # No gate below -8, whose silu is subnormal in float16 and rounds to fewer digits.
        yield from pair("(512, 37888)", random(512, 37888), None)
    yield from pair("unaligned", random(4, 616)[1:, 1:609], random(609)[1:])
    x = extremes(random, 12, 64)
    yield from pair("extremes", mx.concatenate([x, mx.ones_like(x)], axis=-1), None)


def _rope_cases(random: _Random, dtype: mx.Dtype, small: bool) -> Iterator[Case]:
    plain = ops.Rotary.plain(64, 1e6)
    yarn = ops.Rotary.yarn(128, 1e6, 4.0, 32768)
    offsets = np.array([3, 70_000, 999_000])

    def one(label: str, x: mx.array, offset: int | np.ndarray, rotary: ops.Rotary, peer: bool = True) -> Case:
        def fast() -> Arrays:
            start = offset if isinstance(offset, int) else mx.array(offset.astype(np.int32))
            turned = mx.fast.rope(x.swapaxes(1, 2), x.shape[-1], traditional=False, base=1e6, scale=1.0, offset=start)
            return [turned.swapaxes(1, 2)]

        return _RotationCase(
            f"rope {label}",
            dtype,
            lambda: [ops.rope(x, rotary.table(offset, x.shape[1]))],
            lambda: [exact_rope(to_float64(x), offset, rotary)],
            fast if peer else None,
        )

    yield one("(0, 1, 2, 64)", random(0, 1, 2, 64), 5, plain, peer=False)
    yield one("(1, 1, 2, 64) at 0", random(1, 1, 2, 64), 0, plain)
    yield one("(1, 7, 2, 64) at 999_990", random(1, 7, 2, 64), 999_990, plain)
    yield one("(2, 3, 1, 6) at 5", random(2, 3, 1, 6), 5, ops.Rotary.plain(6, 1e6))
    yield one("(3, 4, 2, 64) by sequence", random(3, 4, 2, 64), offsets, plain)
    yield one("(1, 3, 5, 128) YaRN", random(1, 3, 5, 128), 100_000, yarn, peer=False)
    yield one("heads first, transposed", random(2, 2, 5, 64).swapaxes(1, 2), 17, plain)
    x = mx.concatenate([extremes(random, 12, 64)[None, None], mx.ones((1, 1, 12, 64), dtype)], axis=1)
    yield one("extremes", x, 0, plain, peer=False)
    yield one("(1, 1027, 1, 64) many tokens", random(1, 1027, 1, 64), 3, plain)
    if not small:
        yield one("(1, 2048, 16, 128) at 500_000", random(1, 2048, 16, 128), 500_000, ops.Rotary.plain(128, 1e6))

    def fused(
        label: str,
        x: mx.array,
        bias: mx.array | None,
        offset: int | np.ndarray,
        rotary: ops.Rotary,
        heads: int,
        kv: int,
    ) -> Case:
        def compute() -> Arrays:
            q, k_and_v = ops.qkv_rope(x, bias, rotary.table(offset, x.shape[1]), heads, kv)
            return [q, k_and_v[:, :, 0], k_and_v[:, :, 1]]

        def exact() -> Exact:
            total = to_float64(x if bias is None else _on_cpu(lambda: x + bias))
            split = total.reshape(*x.shape[:2], heads + 2 * kv, -1)
            turned = exact_rope(split[:, :, : heads + kv], offset, rotary)
            return [turned[:, :, :heads], turned[:, :, heads:], split[:, :, heads + kv :]]

        return _RotationCase(f"qkv_rope {label}", dtype, compute, exact)

    yield fused("(1, 1, 1152) 14 + 2 heads", random(1, 1, 1152), random(1152), 41, plain, 14, 2)
    yield fused("(3, 2, 256) by sequence", random(3, 2, 256), random(256), offsets, plain, 2, 1)
    yield fused("(2, 3, 1024) YaRN, no bias", random(2, 3, 1024), None, 5000, yarn, 4, 2)
    yield fused("unaligned", random(2, 4, 264)[:, 1:, 5:261], random(257)[1:], 9, plain, 2, 1)
    yield fused("(2, 513, 192) many tokens", random(2, 513, 192), None, np.array([7, 900]), plain, 1, 1)
    if not small:
        yield fused("(1, 1024, 4608) 28 + 4 heads", random(1, 1024, 4608), random(4608), 0, yarn, 28, 4)


def _gradient_cases(random: _Random, dtype: mx.Dtype) -> Iterator[Case]:
    table = ops.Rotary.plain(64, 1e6).table(7, 3)

    def one(name: str, function: Callable[..., mx.array | tuple[mx.array, ...]], *inputs: mx.array) -> Case:
        def gradients() -> Arrays:
            def as_list(*x: mx.array) -> list[mx.array]:
                y = function(*x)
                return [y] if isinstance(y, mx.array) else list(y)

            cotangents = [mx.cos(mx.arange(y.size)).reshape(y.shape).astype(dtype) for y in as_list(*inputs)]
            return mx.vjp(as_list, list(inputs), cotangents)[1]

        def reference() -> Exact:
            with ops.forced("reference"):
                return [to_float64(gradient) for gradient in gradients()]

        return Case(f"gradient of {name}", dtype, gradients, reference)

    x, y, weight = random(3, 128), random(3, 128), random(128)
    yield one("rms_norm", lambda x, w: ops.rms_norm(x, w, EPS), x, weight)
    yield one("add_rms_norm", lambda x, y, w: ops.add_rms_norm(x, y, w, EPS), x, y, weight)
    yield one("swiglu", ops.swiglu, x, y, weight, weight)
    yield one("swiglu_joined", ops.swiglu_joined, x, weight)
    yield one("rope", lambda x: ops.rope(x, table), random(1, 3, 2, 64))
    yield one("qkv_rope", lambda x, b: ops.qkv_rope(x, b, table, 2, 1), random(1, 3, 256), random(256))


def _shapes(small: bool, dtype: mx.Dtype) -> int | None:
    return 2 if small and dtype != mx.float32 else None


def _on_cpu(function: Callable[[], mx.array]) -> mx.array:
    with mx.stream(mx.cpu):
        return function()


def run(selected: Sequence[Case]) -> list[dict[str, Any]]:
    """Runs the cases where they are; each row has case, dtype, ulp, mlx_ulp (None without a peer), ok and error."""
    rows = []
    for case in selected:
        row: dict[str, Any] = {"case": case.name, "dtype": str(case.dtype).removeprefix("mlx.core.")}
        try:
            row["ulp"] = case.error(case.compute())
            row["mlx_ulp"] = None if case.peer is None else case.error(case.peer())
            row["ok"] = row["ulp"] <= LIMIT
        except Exception as error:  # a kernel that does not compile is a result too; where this package lies is not
            text = f"{type(error).__name__}: {error}".replace(f"{Path(__file__).parents[2]}{os.sep}", "")
            row.update(ulp=None, mlx_ulp=None, ok=False, error=text)
        rows.append(row)
    return rows


def _run_part(part: int, parts: int) -> list[dict[str, Any]]:
    return run(list(cases())[part::parts])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case, prints the table and writes the JSON; 0 if all passed, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m qwen_mlx.selftest", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("qwen_mlx_selftest.json"), help="where to write the results")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile kernels side by side (default 1)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, expected 1 or more")
    if not options.json.parent.is_dir() or options.json.is_dir():
        parser.error(f"--json is {options.json}, expected a file in a folder that exists")
    if ops.executor() == "reference":
        reason = ops.explain().splitlines()[0].rpartition("(")[2].rstrip(")")
        print(
            f"No kernel to test: {reason}. Run it on a Mac with an Apple GPU, or on an NVIDIA GPU with the extra "
            "cuda12 or cuda13.",
            file=sys.stderr,
        )
        return 2
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        parts = pool.map(_run_part, range(options.jobs), [options.jobs] * options.jobs)
        rows = [row for part in parts for row in part]
    for row in rows:
        ulp, peer = (_number(row[key]) for key in ("ulp", "mlx_ulp"))
        verdict = "ok" if row["ok"] else f"FAILED {row.get('error', '')}"
        print(f"{row['case']:44} {row['dtype']:9} {ulp:>9} ulp   mlx's own {peer:>9}   {verdict}")
    failed = sum(not row["ok"] for row in rows)
    summary = {
        "device": describe(),
        "executor": ops.executor(),
        "platform": platform.platform(),
        "mlx": mx.__version__,  # type: ignore[attr-defined]  # not in its stub
        "limit_ulp": LIMIT,
        "cases": len(rows),
        "failed": failed,
    }
    # JSON has no infinity; a case that is off by one is told by its "ok".
    rows = [{k: str(v) if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()} for row in rows]
    options.json.write_text(json.dumps({**summary, "results": rows}, indent=1))
    print(f"{len(rows) - failed} of {len(rows)} within {LIMIT:g} ulp of float64 on {describe()}; wrote {options.json}")
    return 1 if failed else 0


def _number(value: object) -> str:
    return "-" if value is None else f"{value:.3g}"
