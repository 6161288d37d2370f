"""Root mean square normalisation."""

from __future__ import annotations

from ..backend import mx


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    x: (..., D), weight: (D,) in the same dtype; returns x's shape and dtype. Rounding: normalised in float32, rounded
    to x.dtype, then multiplied by weight, the order of transformers' Qwen2RMSNorm.
    Source: Zhang and Sennrich 2019, eq. 4.
    """
    return mx.fast.rms_norm(x, weight, eps)
