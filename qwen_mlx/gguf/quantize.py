"""Float32 values become GGUF blocks: by gguf-py's quantizers, and by our own for the K-quants, which it lacks.

A K-quant's group of values x has codes q, a scale s and a minimum m such that the sum of w (s q + m - x)^2 is least, w
being each value's importance. Rounding x to codes needs s and m, and least squares gives s and m for known codes. So a
few steps between codes are tried: one somewhat smaller than the group's range asks for, which clips its ends, up to one
somewhat larger. Each gives codes, these give s and m, and the best of them counts. At that optimum the sum is that of
w x^2 less s (sum of w q x) + m (sum of w x), which is how the steps are compared. The scales of a block are then
rounded to multiples of one fp16 number, and the codes are chosen again for the rounded scales.
Source of w and of the range of steps: ggml's reference quantizers (ggml-quants.c).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType

import numpy as np

from ..errors import GGUFError
from .blocks import BlockType
from .pack import affine_k_blocks, q6_k_blocks

# Differences to the codes that the range of a group is divided into. More of them gain less than 0.4 % of the error.
STEPS = (-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9)
CHUNK = 1 << 18  # weights: the arrays of a chunk stay in the processor's cache
_F32 = np.float32


def quantize(values: np.ndarray, kind: BlockType) -> np.ndarray:
    """Rows of blocks, uint8 (rows, bytes of a row), for finite float32 values (rows, columns) of whole blocks.

    Blocks of values that the type's fp16 scales cannot hold stand for infinity or NaN. Raises GGUFError for a type for
    which there is no quantizer.
    """
    values = np.require(values, np.float32, ["C", "W"])
    with np.errstate(all="ignore"):
        if kind.name in _K_TYPES:
            blocks = values.reshape(-1, 256)
            chunks = [blocks[start : start + CHUNK // 256] for start in range(0, len(blocks), CHUNK // 256)]
            raw = np.concatenate([_K_TYPES[kind.name](chunk) for chunk in chunks]).reshape(len(values), -1)
        else:
            from gguf import GGMLQuantizationType, quants  # 0.1 s to import

            try:
                raw = np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType(kind.type_id))).view(np.uint8)
            except NotImplementedError:
                raise GGUFError(f"{kind.name} has no quantizer; choose another type.") from None
    return raw


def _affine_k(values: np.ndarray, bits: int) -> np.ndarray:
    """Q4_K or Q5_K blocks of values (n, 256)."""
    groups = values.reshape(-1, 32)
    scales, minima = (array.reshape(-1, 8) for array in affine_steps(groups, 2**bits - 1))
    d, scales_q = _six_bits(scales)
    d_min, minima_q = _six_bits(-minima)
    scale = d[:, None].astype(np.float32) * scales_q
    above = groups.reshape(-1, 8, 32) + (d_min[:, None].astype(np.float32) * minima_q)[..., None]
    above /= np.where(scale == 0, _F32(np.inf), scale)[..., None]
    codes = _rounded(above, 0, 2**bits - 1).astype(np.uint8).reshape(-1, 256)
    return affine_k_blocks(bits, codes, d, d_min, scales_q, minima_q)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An fp16 number a block and multiples of it, uint8 below 64, for values (n, 8) that are not negative."""
    largest = values.max(1)
    multiples = np.where(largest > 0, _F32(63) / largest, _F32(0))[:, None] * values
    return (largest / _F32(63)).astype(np.float16), _rounded(multiples, 0, 63).astype(np.uint8)


def _q6_k(values: np.ndarray) -> np.ndarray:
    """Q6_K blocks of values (n, 256)."""
    groups = values.reshape(-1, 16)
    scales = symmetric_steps(groups, 32).reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)[:, 0]
    d = (largest / _F32(-128)).astype(np.float16)
    multiples = np.where(largest == 0, _F32(0), _F32(-128) / largest)[:, None] * scales
    scales_q = _rounded(multiples, -128, 127).astype(np.int8)
    scale = d[:, None].astype(np.float32) * scales_q
    codes = groups.reshape(-1, 16, 16) / np.where(scale == 0, _F32(np.inf), scale)[..., None]
    whole = (_rounded(codes, -32, 31) + 32).astype(np.uint8).reshape(-1, 256)
    return q6_k_blocks(whole, d, scales_q)


@functools.cache
def _numbas() -> ModuleType | None:
    """compiled_steps, six times as fast as NumPy, where numba is installed and QWEN_MLX_KERNELS is not off."""
    if os.environ.get("QWEN_MLX_KERNELS") == "off":
        return None
    try:
        from . import compiled_steps
    except Exception:  # numba has errors of its own, and NumPy gives the same
        return None
    return compiled_steps


def affine_steps(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima (n,) for codes 0 to `top` of groups x (n, size), float32; no minimum is above zero.

    A weight's square counts in proportion to its magnitude plus the group's root mean square.
    """
    compiled = _numbas()
    if compiled is None:
        return _affine_steps(x, top)
    scales, minima = np.empty((2, len(x)), np.float32)
    compiled.affine_steps(x, _F32(top), np.array(STEPS, np.float32), scales, minima)
    return scales, minima


def _affine_steps(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.ascontiguousarray(x.T)  # sums over a group's weights are then sums of rows
    weights = np.abs(x)
    weights += np.sqrt(np.einsum("ij,ij->j", x, x) / _F32(len(x)))
    weighted = weights * x
    sum_w, sum_x = weights.sum(0), weighted.sum(0)
    low = np.minimum(x.min(0), 0)
    span = x.max(0) - low
    from_low = x - low
    scales, minima, best = span / _F32(top), low.copy(), np.full_like(low, -np.inf)
    for step in STEPS:
        codes = _rounded(from_low * (_F32(top + step) / span), 0, top)
        sum_qx = np.einsum("ij,ij->j", weighted, codes)
        weighted_codes = weights * codes
        sum_q, sum_qq = weighted_codes.sum(0), np.einsum("ij,ij->j", weighted_codes, codes)
        determinant = sum_w * sum_qq - sum_q * sum_q
        scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        minimum = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        above = minimum > 0
        scale, minimum = np.where(above, sum_qx / sum_qq, scale), np.where(above, 0, minimum)
        gain = scale * sum_qx + minimum * sum_x
        better = (gain > best) & (determinant > 0) & (scale > 0)
        for array, new in ((scales, scale), (minima, minimum), (best, gain)):
            np.copyto(array, new, where=better)
    return scales, minima


def symmetric_steps(x: np.ndarray, top: int) -> np.ndarray:
    """Scales (n,) for codes -`top` to `top` - 1 of groups x (n, size), float32: the weight of the largest magnitude has
    the code near -`top`, so a scale can be negative. A weight's square counts in proportion to its own square."""
    compiled = _numbas()
    if compiled is None:
        return _symmetric_steps(x, top)
    scales = np.empty(len(x), np.float32)
    compiled.symmetric_steps(x, _F32(top), np.array(STEPS, np.float32), scales)
    return scales


def _symmetric_steps(x: np.ndarray, top: int) -> np.ndarray:
    x = np.ascontiguousarray(x.T)
    peak = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    weights = x * x
    weighted = weights * x
    scales, best = np.zeros_like(peak), np.full_like(peak, -np.inf)
    for step in STEPS:
        codes = _rounded(x * (_F32(-top - step) / peak), -top, top - 1)
        sum_qx = np.einsum("ij,ij->j", weighted, codes)
        codes *= codes
        scale = sum_qx / np.einsum("ij,ij->j", weights, codes)
        gain = scale * sum_qx
        better = gain > best
        np.copyto(scales, scale, where=better)
        np.copyto(best, gain, where=better)
    # Squares of the smallest numbers vanish; the group's range is then as good.
    steps: np.ndarray = np.where(np.isfinite(best) & (best > 0), scales, peak / _F32(-top))
    return steps


def _rounded(values: np.ndarray, low: int, high: int) -> np.ndarray:
    """`values`, rounded in place to whole numbers from low to high; NaN becomes low."""
    np.rint(values, out=values)
    np.fmax(values, _F32(low), out=values)
    np.minimum(values, _F32(high), out=values)
    return values


_K_TYPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Q4_K": functools.partial(_affine_k, bits=4),
    "Q5_K": functools.partial(_affine_k, bits=5),
    "Q6_K": _q6_k,
}
