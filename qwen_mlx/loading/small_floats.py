"""The values of floats of 4 and 8 bits by their bits, float32: the OCP Microscaling specification's, version 1.0."""

from __future__ import annotations

import math

import numpy as np


def _e4m3() -> np.ndarray:
    """4 bits of exponent with bias 7, 3 of mantissa; the last code is NaN, and there is no infinity."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, codes & 7
    values = np.where(exponents == 0, mantissas * 2.0**-9, (8 + mantissas) * 2.0 ** (exponents - 10.0))
    values[127] = math.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _e4m3()
E8M0 = np.concatenate([2.0 ** (np.arange(255) - 127.0), [math.nan]]).astype(np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
