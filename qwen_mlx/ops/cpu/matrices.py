"""Products with a matrix, dense or packed, and the values of its rows, on NumPy's arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...backend import mx
from ..matrix import Matrix
from . import kernels, packings
from .arrays import as_bytes, elements

STRIP = 64  # columns, or a block of more, that a thread takes in a product with the transpose
_NOTHING = np.empty(0, np.float32)
_BLOCKS: dict[str, Any] = {
    "q4_0": packings.Q40,
    "q4_1": packings.Q41,
    "q5_0": packings.Q50,
    "q5_1": packings.Q51,
    "q8_0": packings.Q80,
    "q4_k": packings.Q4K,
    "q5_k": packings.Q5K,
    "q6_k": packings.Q6K,
}
_AFFINE: dict[int, Any] = {
    2: packings.Affine2,
    3: packings.Affine3,
    4: packings.Affine4,
    5: packings.Affine5,
    6: packings.Affine6,
    8: packings.Affine8,
}
_HALVES: dict[mx.Dtype, Any] = {mx.float16: packings.Halves, mx.bfloat16: packings.BFloats}


def supports(matrix: Matrix) -> bool:
    """True if this matrix is multiplied here."""
    packing, arrays = matrix.packing, matrix.arrays
    if matrix.columns % 32:
        return False
    if packing.kind == "affine":
        return packing.bits in _AFFINE and all(array.dtype == mx.float32 for array in arrays[1:])
    return packing.kind in ("dense", *_BLOCKS)


def products(x: np.ndarray, matrix: Matrix, out: np.ndarray, start: int) -> Callable[[], None]:
    """The call that makes the columns of out (B, width) from `start` on x W^T, for x (B, columns)."""
    packed, columns, rows = _compiled_form(matrix), matrix.columns, matrix.rows
    if len(x) == 1:
        return one_product(x[0], matrix, (_NOTHING, 0.0), _NOTHING, out[0, start : start + rows])
    vectors, to = x.reshape(-1), (out.reshape(-1), start, out.shape[1])
    if isinstance(packed, packings.Floats):
        return partial(kernels.multiply, packed.values, vectors, columns, *to)
    return partial(kernels.multiply_packed, packed, rows, _blocks(packed, columns), vectors, columns, *to)


def transposed_product(y: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
    """out (B, columns) = y W for y (B, rows)."""
    packed = _compiled_form(matrix)
    blocks = _blocks(packed, matrix.columns)
    strip = max(1, STRIP * blocks // matrix.columns)
    flat = y.reshape(-1), strip, out.reshape(-1)
    kernels.multiply_transposed(packed, matrix.rows, blocks, matrix.columns, *flat)


def one_product(
    x: np.ndarray, matrix: Matrix, norm: tuple[np.ndarray, float], residual: np.ndarray, out: np.ndarray
) -> Callable[[], None]:
    """The call that makes out (rows,) = W norm(x) + residual; x and the norm's weight (columns,), residual (rows,);
    empty ones are none."""
    packed = _compiled_form(matrix)
    form = packed, packings.groups_of(packed), packings.by_words(packed)
    return partial(kernels.multiply_one, *form, x, *norm, residual, out)


def unpack(matrix: Matrix, rows: np.ndarray, out: np.ndarray) -> None:
    """out (len(rows), columns): the values of some rows of a matrix."""
    packed = _compiled_form(matrix)
    if isinstance(packed, packings.Floats):
        out[...] = packed.values.reshape(-1, matrix.columns)[rows]
    else:
        kernels.unpack(packed, _blocks(packed, matrix.columns), rows, out.reshape(-1))


def _blocks(packed: Any, columns: int) -> int:
    return columns // (32 * packings.groups_of(packed))


def _compiled_form(matrix: Matrix) -> Any:
    """The packing's type in packings.py, of the matrix's own memory."""
    packing, arrays = matrix.packing, matrix.arrays
    if packing.kind == "dense":
        if arrays[0].dtype == mx.float32:
            return packings.Floats(elements(arrays[0]).reshape(-1))
        return _HALVES[arrays[0].dtype](as_bytes(arrays[0].view(mx.uint16)))
    if packing.kind != "affine":
        return _BLOCKS[packing.kind](*map(as_bytes, arrays))
    scales, biases = (elements(array).reshape(-1) for array in arrays[1:])
    return _AFFINE[packing.bits](as_bytes(arrays[0]), scales, biases, packing.group_size.bit_length() - 6)
