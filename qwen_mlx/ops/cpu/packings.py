"""A matrix as the compiled functions see it: for each packing a type with its arrays, and how to read 32 weights.

`group(matrix, index)` gives the codes, the scale (or one for each half) and the minimum of the weights from 32 * index
on, counted through all rows: a weight is scale * code + minimum. Source: the block layouts of ggml's ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from .vectors import (
    bfloats32,
    bits,
    bytes16,
    bytes32,
    floats32,
    half,
    halves32,
    minus,
    nibbles,
    signed_bytes32,
    unpacked,
    with_high_bits,
    word,
)

Bytes = np.ndarray  # uint8, flat
_uint, _f32 = np.uintp, np.float32
_2, _3, _4, _5, _6, _8 = (unpacked(n_bits) for n_bits in (2, 3, 4, 5, 6, 8))


class Q40(NamedTuple):
    """GGUF's Q4_0."""

    blocks: Bytes


class Q41(NamedTuple):
    """GGUF's Q4_1."""

    blocks: Bytes


class Q50(NamedTuple):
    """GGUF's Q5_0."""

    blocks: Bytes


class Q51(NamedTuple):
    """GGUF's Q5_1."""

    blocks: Bytes


class Q80(NamedTuple):
    """GGUF's Q8_0."""

    blocks: Bytes


class Q4K(NamedTuple):
    """GGUF's Q4_K."""

    blocks: Bytes


class Q5K(NamedTuple):
    """GGUF's Q5_K."""

    blocks: Bytes


class Q6K(NamedTuple):
    """The fields of GGUF's Q6_K, as ops.Matrix has them."""

    low: Bytes
    high: Bytes
    scales: Bytes
    d: Bytes


class Floats(NamedTuple):
    """Dense float32."""

    values: np.ndarray


class Halves(NamedTuple):
    """Dense float16, as bytes."""

    values: Bytes


class BFloats(NamedTuple):
    """Dense bfloat16, as bytes."""

    values: Bytes


class Affine2(NamedTuple):
    """MLX's affine form; `groups` of 32 weights share a scale."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


class Affine3(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


class Affine4(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


class Affine5(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


class Affine6(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


class Affine8(NamedTuple):
    """As Affine2."""

    codes: Bytes
    scales: np.ndarray
    biases: np.ndarray
    groups: int


def group(matrix: Any, index: Any) -> Any:
    """See this module; only compiled functions call it."""
    raise NotImplementedError


@overload(group)
def _group(matrix: Any, index: Any) -> Callable[..., Any] | None:
    return _READERS.get(matrix.instance_class) if isinstance(matrix, types.NamedTuple | types.NamedUniTuple) else None


def _q4_0(matrix: Any, index: Any) -> Any:
    start = index * _uint(18)
    return minus(nibbles(bytes16(matrix.blocks, start + _uint(2))), 8), half(matrix.blocks, start), _f32(0)


def _q4_1(matrix: Any, index: Any) -> Any:
    start = index * _uint(20)
    codes = nibbles(bytes16(matrix.blocks, start + _uint(4)))
    return codes, half(matrix.blocks, start), half(matrix.blocks, start + _uint(2))


def _q5_0(matrix: Any, index: Any) -> Any:
    start = index * _uint(22)
    codes = with_high_bits(nibbles(bytes16(matrix.blocks, start + _uint(6))), word(matrix.blocks, start + _uint(2)))
    return minus(codes, 16), half(matrix.blocks, start), _f32(0)


def _q5_1(matrix: Any, index: Any) -> Any:
    start = index * _uint(24)
    codes = with_high_bits(nibbles(bytes16(matrix.blocks, start + _uint(8))), word(matrix.blocks, start + _uint(4)))
    return codes, half(matrix.blocks, start), half(matrix.blocks, start + _uint(2))


def _q8_0(matrix: Any, index: Any) -> Any:
    start = index * _uint(34)
    return signed_bytes32(matrix.blocks, start + _uint(2)), half(matrix.blocks, start), _f32(0)


def _scale_and_minimum(blocks: Any, start: Any, which: Any) -> Any:
    """The scale and the minimum of group `which` of eight in a block of Q4_K or Q5_K: six bits each. The last four
    groups' highest two bits are the first four's spare ones."""
    at = start + _uint(4) + (which & _uint(3))
    low, middle, high = blocks[at], blocks[at + _uint(4)], blocks[at + _uint(8)]
    if which < _uint(4):
        scale, minimum = low & 63, middle & 63
    else:
        scale, minimum = (high & 15) | ((low >> 6) << 4), (high >> 4) | ((middle >> 6) << 4)
    return half(blocks, start) * _f32(scale), -(half(blocks, start + _uint(2)) * _f32(minimum))


def _scale_and_minimum_stub(blocks: Any, start: Any, which: Any) -> Any:
    raise NotImplementedError


@overload(_scale_and_minimum_stub)
def _scale_and_minimum_impl(blocks: Any, start: Any, which: Any) -> Callable[..., Any]:
    return _scale_and_minimum


def _q4_k(matrix: Any, index: Any) -> Any:
    which, start = index & _uint(7), (index >> _uint(3)) * _uint(144)
    scale, minimum = _scale_and_minimum_stub(matrix.blocks, start, which)
    raw = bytes32(matrix.blocks, start + _uint(16) + (which >> _uint(1)) * _uint(32))
    return bits(raw, (which & _uint(1)) * _uint(4), 15), scale, minimum


def _q5_k(matrix: Any, index: Any) -> Any:
    which, start = index & _uint(7), (index >> _uint(3)) * _uint(176)
    scale, minimum = _scale_and_minimum_stub(matrix.blocks, start, which)
    raw = bytes32(matrix.blocks, start + _uint(48) + (which >> _uint(1)) * _uint(32))
    high = bits(bytes32(matrix.blocks, start + _uint(16)), which, 1)
    return with_high_bits(bits(raw, (which & _uint(1)) * _uint(4), 15), high), scale, minimum


def _q6_k(matrix: Any, index: Any) -> Any:
    part, quarter = index >> _uint(2), index & _uint(3)  # of 128 weights, which share 64 bytes and 32
    low = bytes32(matrix.low, part * _uint(64) + (quarter & _uint(1)) * _uint(32))
    high = bytes32(matrix.high, part * _uint(32))
    codes = with_high_bits(bits(low, (quarter >> _uint(1)) * _uint(4), 15), bits(high, quarter * _uint(2), 3))
    d = half(matrix.d, (index >> _uint(3)) * _uint(2))
    first, second = matrix.scales[_uint(2) * index], matrix.scales[_uint(2) * index + _uint(1)]
    return minus(codes, 32), (d * _f32(np.int8(first)), d * _f32(np.int8(second))), _f32(0)


def _floats(matrix: Any, index: Any) -> Any:
    return floats32(matrix.values, index * _uint(32)), _f32(1), _f32(0)


def _halves(matrix: Any, index: Any) -> Any:
    return halves32(matrix.values, index * _uint(64)), _f32(1), _f32(0)


def _bfloats(matrix: Any, index: Any) -> Any:
    return bfloats32(matrix.values, index * _uint(64)), _f32(1), _f32(0)


def _affine(load: Any, size: int) -> Callable[..., Any]:
    def read(matrix: Any, index: Any) -> Any:
        at = index // _uint(matrix.groups)
        return load(matrix.codes, index * _uint(size)), matrix.scales[at], matrix.biases[at]

    return read


_READERS: dict[type, Callable[..., Any]] = {
    Q40: _q4_0,
    Q41: _q4_1,
    Q50: _q5_0,
    Q51: _q5_1,
    Q80: _q8_0,
    Q4K: _q4_k,
    Q5K: _q5_k,
    Q6K: _q6_k,
    Floats: _floats,
    Halves: _halves,
    BFloats: _bfloats,
    Affine2: _affine(_2, 8),
    Affine3: _affine(_3, 12),
    Affine4: _affine(_4, 16),
    Affine5: _affine(_5, 20),
    Affine6: _affine(_6, 24),
    Affine8: _affine(_8, 32),
}
