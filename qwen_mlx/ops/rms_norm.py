"""Root mean square normalisation, alone and after the residual addition before it."""

from __future__ import annotations

import functools

from ..backend import mx
from . import cpu
from .dispatch import (
    MAX_ELEMENTS,
    Kernel,
    differentiable,
    executor,
    float_bits,
    on_cpu,
    on_gpu,
    pack_size,
    require,
    require_float,
    require_like,
    threads,
)

MAX_WIDTH = 16384  # a row stays in the registers of one threadgroup
MOST_THREADS = {"cuda": 1024, "metal": 384}  # 384 are legal on Apple's GPUs whatever registers a kernel takes
_ADDED = ("x", "residual", "weight", "sums", "out")

_RMS_NORM = Kernel("rms_norm", ("x", "weight"), ("out",), ("rms.h",))
_ADD_RMS_NORM = Kernel("add_rms_norm", ("x", "residual", "weight"), ("sums", "out"), ("rms.h",), aligned=_ADDED)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: (..., D), weight: (D,) in the same dtype; returns x's shape and dtype. Rounding: normalised in float32, rounded
    to x.dtype, then multiplied by weight, the order of transformers' Qwen2RMSNorm. Source: Zhang and Sennrich 2019,
    eq. 4. Raises ValueError if the shapes or dtypes do not agree, or eps is negative.
    """
    _require_norm(x, weight, eps)
    if x.size and on_cpu("rms_norm", x.dtype):
        return cpu.rms_norm(x, weight, eps)
    if not on_gpu("rms_norm") or not supports(x):
        return rms_norm_fallback(x, weight, eps)
    kernel, fallback = functools.partial(_launch, _RMS_NORM, eps), functools.partial(rms_norm_fallback, eps=eps)
    return differentiable(lambda *inputs: kernel(*inputs)[0], fallback, x, weight)


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Residual addition and RMSNorm in one pass.

    x, residual: (..., D), weight: (D,), all of one dtype. Returns (h, y), both of x's shape and dtype: h = x + residual
    and y = rms_norm(h, weight, eps). Rounding: h is rounded to x.dtype, y as rms_norm's.
    Raises ValueError if the shapes or dtypes do not agree.
    """
    _require_norm(x, weight, eps)
    require_like("residual", residual, x.shape, x.dtype)
    if x.size and on_cpu("rms_norm", x.dtype):
        return cpu.add_rms_norm(x, residual, weight, eps)
    if not on_gpu("rms_norm") or not supports(x):
        return add_rms_norm_fallback(x, residual, weight, eps)
    kernel, fallback = functools.partial(_launch, _ADD_RMS_NORM, eps), functools.partial(add_rms_norm_fallback, eps=eps)
    h, y = differentiable(kernel, fallback, x, residual, weight)
    return h, y


def rms_norm_fallback(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """rms_norm in plain MLX."""
    if mx.default_device() != mx.cpu:
        return mx.fast.rms_norm(x, weight, eps)
    # MLX's own is up to 30 ulp off on a CPU; summing in float64 takes as long for one row and leaves 1.5.
    squares = mx.square(x.astype(mx.float32)).astype(mx.float64)
    normed = x * mx.rsqrt(mx.mean(squares, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight


def add_rms_norm_fallback(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """add_rms_norm in plain MLX."""
    h = x + residual
    return h, rms_norm_fallback(h, weight, eps)


def supports(x: mx.array) -> bool:
    """True if the kernels take rows of this size; others are computed in plain MLX."""
    return x.shape[-1] <= MAX_WIDTH and x.size <= MAX_ELEMENTS


def require_eps(eps: float) -> None:
    """Raises ValueError unless eps is a number from 0 to 3e38."""
    require(
        isinstance(eps, float | int) and 0 <= eps < 3e38, lambda: f"eps is {eps!r}, expected a number from 0 to 3e38."
    )


def _require_norm(x: mx.array, weight: mx.array, eps: float) -> None:
    require_float("x", x)
    require(x.ndim > 0, lambda: "x has shape (), expected (..., D).")
    require_eps(eps)
    require_like("weight", weight, (x.shape[-1],), x.dtype)


def _launch(kernel: Kernel, eps: float, *inputs: mx.array) -> tuple[mx.array, ...]:
    x = inputs[0]
    template, n_threads = _plan(x.shape[-1], x.dtype, eps, MOST_THREADS[executor("rms_norm")])
    rows = x.size // max(x.shape[-1], 1)
    shapes = [x.shape] * len(kernel.outputs)
    return tuple(kernel(inputs, template, (rows * n_threads, 1, 1), (n_threads, 1, 1), shapes))


@functools.lru_cache(maxsize=64)
def _plan(width: int, dtype: mx.Dtype, eps: float, most: int) -> tuple[tuple[tuple[str, int], ...], int]:
    pack = pack_size(width, dtype)
    n_threads = threads(max(-(-width // pack), 1), most)
    return (("D", width), ("N", pack), ("THREADS", n_threads), ("EPS", float_bits(eps))), n_threads
