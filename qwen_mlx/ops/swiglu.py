"""The gated unit of the MLP."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import mx
from . import cpu
from .dispatch import (
    MAX_ELEMENTS,
    Kernel,
    differentiable,
    have_values,
    on_cpu,
    on_gpu,
    pack_size,
    recording,
    require,
    require_float,
    require_like,
    threads,
)
from .exponential import exp_of_negative

_BLOCK = 1 << 15  # float64 numbers that stay in a core's cache
_LARGEST = float(np.finfo(np.float32).max)
_SWIGLU = Kernel("swiglu", ("gate", "up", "gate_bias", "up_bias"), ("out",), ("silu.h",))


def swiglu(
    gate: mx.array, up: mx.array, gate_bias: mx.array | None = None, up_bias: mx.array | None = None
) -> mx.array:
    """silu(gate + gate_bias) * (up + up_bias), with silu(x) = x / (1 + e^-x).

    gate, up: (..., F); biases: (F,), both or none; all of one dtype, which is returned. Rounding: the sums with
    biases are rounded to the dtype, silu is computed in float32 and rounded, then multiplied, the order of
    transformers' Qwen2MLP. Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    Raises ValueError if the shapes or dtypes do not agree.
    """
    require_float("gate", gate)
    require(gate.ndim > 0, lambda: "gate has shape (), expected (..., F).")
    require_like("up", up, gate.shape, gate.dtype)
    require((gate_bias is None) == (up_bias is None), lambda: "gate_bias and up_bias: give both or none.")
    biases = [bias for bias in (gate_bias, up_bias) if bias is not None]
    for name, bias in zip(("gate_bias", "up_bias"), biases):
        require_like(name, bias, gate.shape[-1:], gate.dtype)
    if gate.size and not biases and on_cpu("swiglu", gate.dtype):
        return cpu.swiglu(gate, up)
    if not on_gpu("swiglu") or gate.size > MAX_ELEMENTS:
        return swiglu_fallback(gate, up, *biases)
    return differentiable(_launch, swiglu_fallback, gate, up, *biases)


def swiglu_joined(gate_up: mx.array, bias: mx.array | None = None) -> mx.array:
    """swiglu of the two halves of the last axis, as one projection returns them: gate first.

    gate_up: (..., 2 F), bias: (2 F,) of the same dtype or None. Returns (..., F). Rounding and errors as swiglu's.
    """
    require_float("gate_up", gate_up)
    width = gate_up.shape[-1] if gate_up.ndim else 1
    require(width % 2 == 0, lambda: f"gate_up has shape {gate_up.shape}, expected an even last axis: gate, then up.")
    if bias is not None:
        require_like("bias", bias, (width,), gate_up.dtype)
    arrays = (gate_up,) if bias is None else (gate_up, bias)
    if gate_up.size and bias is None and on_cpu("swiglu", gate_up.dtype):
        return cpu.swiglu_joined(gate_up)
    if not on_gpu("swiglu") or gate_up.size > MAX_ELEMENTS:
        return swiglu_joined_fallback(*arrays)
    return differentiable(_launch_joined, swiglu_joined_fallback, *arrays)


def swiglu_fallback(
    gate: mx.array, up: mx.array, gate_bias: mx.array | None = None, up_bias: mx.array | None = None
) -> mx.array:
    """swiglu without kernels: within 2 ulp on the CPU, with silu from NumPy. On a GPU, and where MLX traces, each step
    rounds: 3.1 ulp in float32, as torch. Below -88.7 e^-gate overflows float32 and the result is -0, as torch's."""
    if gate_bias is not None and up_bias is not None:
        gate, up = gate + gate_bias, up + up_bias
    if not recording() and mx.default_device() != mx.cpu:
        return _swiglu_on_gpu(gate, up)
    return _silu(gate.astype(mx.float32)).astype(gate.dtype) * up


def _silu(x: mx.array) -> mx.array:
    if mx.default_device() == mx.cpu and have_values(x):
        return (_silu_of_values if recording() else _silu_by_numpy)(x)
    return (_traced_silu if recording() else _plain_silu)(x)


def _silu_by_numpy(x: mx.array) -> mx.array:
    """In float64, with vector instructions, where MLX calls the C library for each e^x: half the time."""
    out = mx.empty(x.shape, mx.float32)
    mx.eval(out)
    if x.size == 0:
        return out
    gates, silus = (np.array(y, copy=False).reshape(-1, x.shape[-1]) for y in (x, out))
    rows = max(1, _BLOCK // gates.shape[1])
    with np.errstate(all="ignore"):
        for start in range(0, len(gates), rows):
            block = gates[start : start + rows]
            power = np.negative(block, dtype=np.float64)
            np.exp(power, out=power)
            power[power > _LARGEST] = np.inf
            power += 1
            np.divide(block, power, out=power)
            silus[start : start + rows] = power
    return out


@mx.compile
def _swiglu_on_gpu(gate: mx.array, up: mx.array) -> mx.array:
    return _plain_silu(gate.astype(mx.float32)).astype(gate.dtype) * up


def _plain_silu(x: mx.array) -> mx.array:
    return x / (1 + _power(x))


def _power(x: mx.array) -> mx.array:
    return exp_of_negative(x) if mx.default_device() == mx.cpu else mx.exp(-x)


def _slope(x: mx.array) -> mx.array:
    """silu's, as torch's: MLX's own would square 1 + e^-x, which overflows below -44."""
    sigmoid = 1 / (1 + _power(x))
    return sigmoid * (1 + x * (1 - sigmoid))


# MLX does not see what numpy does, and would square 1 + e^-x: these bring the derivatives. (Objects, to their stub.)
_silu_of_values: Any = mx.custom_function(_silu_by_numpy)
_traced_silu: Any = mx.custom_function(_plain_silu)
for _function in (_silu_of_values, _traced_silu):
    _function.vjp(lambda x, cotangent, _: cotangent * _slope(x))
    _function.jvp(lambda x, tangent: tangent * _slope(x))


def swiglu_joined_fallback(gate_up: mx.array, bias: mx.array | None = None) -> mx.array:
    """swiglu_joined in plain MLX."""
    return swiglu_fallback(*mx.split(gate_up if bias is None else gate_up + bias, 2, axis=-1))


def _launch(gate: mx.array, up: mx.array, *biases: mx.array, joined: bool = False) -> mx.array:
    shape = (*gate.shape[:-1], gate.shape[-1] // (1 + joined))
    width, rows = shape[-1], math.prod(shape[:-1])
    pack = pack_size(width, gate.dtype)
    packs = width // pack
    n_threads = threads(packs, 256) if packs else 32
    template = [("F", width), ("N", pack), ("JOINED", joined), ("BIAS", bool(biases))]
    grid = (rows, -(-packs // n_threads) * n_threads, 1)
    return _SWIGLU((gate, up, *(biases or (gate, up))), template, grid, (1, n_threads, 1), [shape])[0]


def _launch_joined(gate_up: mx.array, *bias: mx.array) -> mx.array:
    return _launch(gate_up, gate_up, *(bias * 2), joined=True)
