"""The gated unit of the MLP."""

from __future__ import annotations

from ..backend import mx
from .exponential import exp


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, with silu(x) = x / (1 + e^-x).

    gate, up: the same shape and dtype, which is returned. Rounding: silu is computed in float32 and rounded to the
    dtype, then multiplied, the order of transformers' Qwen2MLP. Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    if mx.default_device() != mx.cpu:
        return gate * mx.sigmoid(gate) * up
    wide = gate.astype(mx.float32)
    return (wide / (1 + exp(-wide))).astype(gate.dtype) * up
