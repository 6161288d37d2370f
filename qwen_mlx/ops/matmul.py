"""Products of a dense matrix: on NVIDIA's GPUs with a few vectors, a batch's tokens or a draft's; on a CPU with any."""

from __future__ import annotations

from typing import Any

from ..backend import mx
from . import cpu
from .dispatch import Kernel, described, differentiable, executor, have_values, require, require_float

# cuBLAS's kernels are fast, but MLX looks for the right one and records its launch anew at every call, which takes the
# CPU longer than the GPU needs for few rows and a small matrix. On Apple's GPUs MLX has its own.
ON = ("cuda",)
MOST_ROWS, MOST_BYTES = 64, 64 << 20
FACTOR = 128  # rows or columns of a factor at most: the ranks of adapters
UNIT, STEP = 16, 32  # rows of the matrix a simdgroup multiplies at once, and elements of them

_HEADERS = ("nvidia/instructions.h", "rows.h", "nvidia/matmul.h")
_MATMUL = Kernel("nvidia/matmul", ("x", "w"), ("out",), _HEADERS, aligned=("x", "w"))


def matmul(x: mx.array, w: mx.array) -> mx.array:
    """x W^T.

    x: (..., K), w: (N, K) of the same dtype; returns (..., N). Rounding: summed in float32, rounded once. Raises
    ValueError if shapes or dtypes do not agree.
    """
    require_float("x", x)
    require(
        isinstance(w, mx.array) and w.ndim == 2 and x.ndim > 0 and w.dtype == x.dtype and w.shape[1] == x.shape[-1],
        lambda: f"x {described(x)}, w {described(w)}, expected (..., K) and (N, K) of one dtype.",
    )
    return differentiable(_launch, _fallback, x, w) if supports(x, w) else _fallback(x, w)


def _fallback(x: mx.array, w: mx.array) -> mx.array:
    # MLX's wheels for Linux compute products by the reference BLAS, some 50 times slower.
    by_numba = executor("matmul") == "cpu" and x.dtype == mx.float32 and x.size and w.size and w.shape[1] % 8 == 0
    if by_numba and have_values(x, w):
        return differentiable(lambda x, w: cpu.matmul(x, w), _plain, x, w, vjp=_cotangents)
    return _plain(x, w)


def _plain(x: mx.array, w: mx.array) -> mx.array:
    y: mx.array = x @ w.T
    return y


def _cotangents(primals: Any, cotangent: mx.array, _: object) -> tuple[mx.array, mx.array]:
    """Those of x and w. The one of w is MLX's own product, slow but lazy, for nobody asks for it where w is frozen; but
    not that of a factor of an adapter, which costs little."""
    x, w = primals
    rows, columns = cotangent.reshape(-1, w.shape[0]).T, x.reshape(-1, w.shape[1]).T
    return _fallback(cotangent, w.T), (_fallback if min(w.shape) <= FACTOR else _plain)(rows, columns)


def supports(x: mx.array, w: mx.array) -> bool:
    """True if the kernel computes this product."""
    rows, (outputs, columns) = x.size // max(x.shape[-1], 1), w.shape
    return (
        executor("matmul") in ON
        and x.dtype != mx.float32
        and 1 < rows <= MOST_ROWS
        and columns > 0
        and columns % STEP == 0
        and outputs > 0
        and w.nbytes <= MOST_BYTES
    )


def _launch(x: mx.array, w: mx.array) -> mx.array:
    outputs, columns = w.shape
    count = x.size // columns
    units, tiles = -(-outputs // UNIT), -(-count // 8)
    # About 2000 simdgroups, at most 16 to a threadgroup, whose sums fit its memory (32 KiB).
    split = max(1, min(round(2112 / units), 16, 64 // tiles, columns // STEP))
    per_group = max(1, min(4, 64 // tiles) // split)
    n_threads = 32 * split * per_group
    template = (
        ("K", columns),
        ("N", outputs),
        ("COUNT", count),
        ("SPLIT", split),
        ("DEPTH", 2),
        ("THREADS", n_threads),
    )
    grid = (-(-units // per_group) * n_threads, 1, 1)
    return _MATMUL([x, w], template, grid, (n_threads, 1, 1), [(*x.shape[:-1], outputs)])[0]
