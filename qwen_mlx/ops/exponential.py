"""e^x for the CPU, where MLX's own exp is scalar code: 2.5 times faster through powf, and closer to exact."""

from __future__ import annotations

from ..backend import mx

# The power e^(+-2^n) that float32 holds best for its size: 3.02e-8 off, of which e^x sees |x| / 64.
_ROOT = -64.0
_BASE = 1.6038109389511792e-28


def exp(x: mx.array) -> mx.array:
    """e^x of float32 x, within 1.2 ulp on (-87, 88); 0 below -104, inf above 89. NaN stays NaN."""
    return mx.power(_BASE, mx.clip(x, -104.0, 89.0) * (1 / _ROOT))


def exp_of_negative(x: mx.array) -> mx.array:
    """e^-x of float32 x, in three passes less than exp(-x): inf below -88.7, for few x, as powf is slow there."""
    return mx.power(_BASE, x * (-1 / _ROOT))
