"""The steps of quantize.py, compiled by numba where it is installed: the same sums, a group at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

# Sums may be taken in any order, so that they run on vector registers; NaN and infinity stay what they are.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}
_f32 = np.float32


def _compiled(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Compiles a function at once, or reads it from numba's cache on disk where there is a place for one."""

    def compile_now(function: Callable[..., None]) -> Any:
        try:
            return njit(signature, cache=True, **_OPTIONS)(function)
        except RuntimeError:  # neither this folder nor the user's is writable
            return njit(signature, **_OPTIONS)(function)

    return compile_now


@_compiled("void(f4[:, ::1], f4, f4[::1], f4[::1], f4[::1])")
def affine_steps(
    groups: np.ndarray, top: np.float32, steps: np.ndarray, scales: np.ndarray, minima: np.ndarray
) -> None:
    """quantize.affine_steps() into scales and minima (n,)."""
    size = groups.shape[1]
    x, weights = np.empty(size, np.float32), np.empty(size, np.float32)
    for group in range(len(groups)):
        low, high, squares = _f32(0), groups[group, 0], _f32(0)
        for i in range(size):
            value = groups[group, i]
            low, high = min(low, value), max(high, value)
            squares += value * value
        root, sum_w, sum_x = math.sqrt(squares / _f32(size)), _f32(0), _f32(0)
        for i in range(size):
            value = groups[group, i]
            x[i], weights[i] = value, root + abs(value)
            sum_w += weights[i]
            sum_x += weights[i] * value
        span, best = high - low, _f32(-np.inf)
        scales[group], minima[group] = span / top, low
        for step in steps:
            factor = (top + step) / span
            sum_q, sum_qq, sum_qx = _f32(0), _f32(0), _f32(0)
            for i in range(size):
                code = min(np.rint((x[i] - low) * factor), top)
                weighted = weights[i] * code
                sum_q += weighted
                sum_qq += weighted * code
                sum_qx += weighted * x[i]
            determinant = sum_w * sum_qq - sum_q * sum_q
            scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
            minimum = (sum_qq * sum_x - sum_q * sum_qx) / determinant
            if minimum > 0:
                scale, minimum = sum_qx / sum_qq, _f32(0)
            gain = scale * sum_qx + minimum * sum_x
            if gain > best and determinant > 0 and scale > 0:
                best, scales[group], minima[group] = gain, scale, minimum


@_compiled("void(f4[:, ::1], f4, f4[::1], f4[::1])")
def symmetric_steps(groups: np.ndarray, top: np.float32, steps: np.ndarray, scales: np.ndarray) -> None:
    """quantize.symmetric_steps() into scales (n,)."""
    size = groups.shape[1]
    x, weights = np.empty(size, np.float32), np.empty(size, np.float32)
    for group in range(len(groups)):
        peak = _f32(0)
        for i in range(size):
            value = groups[group, i]
            x[i], weights[i] = value, value * value
            if abs(value) > abs(peak):
                peak = value
        best, scales[group] = _f32(0), -peak / top
        for step in steps:
            factor = -(top + step) / peak
            sum_qx, sum_qq = _f32(0), _f32(0)
            for i in range(size):
                code = max(min(np.rint(x[i] * factor), top - _f32(1)), -top)
                weighted = weights[i] * code
                sum_qx += weighted * x[i]
                sum_qq += weighted * code
            scale = sum_qx / sum_qq
            gain = scale * sum_qx
            if gain > best and gain < np.inf:
                best, scales[group] = gain, scale
