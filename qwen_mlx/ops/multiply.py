"""Products of any matrix, dense or packed, with any number of vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ..backend import mx
from . import cpu
from .dispatch import differentiable, executor, have_values, no_grad, on_cpu, on_gpu
from .matmul import matmul, matmul_packed, reads_packed
from .matrix import BLOCKS, Matrix, rows_of
from .matvec import matvec
from .unpack import unpack

TILE = 150_000_000  # elements of GGUF's blocks that are unpacked at a time
# Vectors that are multiplied by blocks one by one on a GPU. Unpacking moves 4.6 bytes a weight of Q4_K and 4.8 of Q6_K:
# read, written and read again; the blocks have 0.56 and 0.82.
FEW = 5


def multiply(x: mx.array, matrix: Matrix) -> mx.array:
    """x W^T for x (..., columns), in x.dtype.

    One vector or a few are multiplied by GGUF's blocks as they are, more by values unpacked, in tiles of rows.
    Rounding: summed in float32, rounded once; with an adapter, each of its two products and the sum are rounded, too.
    """
    if matrix.low_rank is not None:
        y, (a, b) = multiply(x, matrix.base), matrix.low_rank.factors
        y = y if matrix.low_rank.row_scale is None else y * matrix.low_rank.row_scale
        kept = x if matrix.low_rank.keep is None else x * matrix.low_rank.keep
        return y + multiply(multiply(kept, a), b)
    packing, arrays = matrix.packing, matrix.arrays
    if _on_cpu(x, [matrix]):
        return cpu.multiply_all(x, [matrix])
    if packing.kind == "dense":
        if x.dtype == arrays[0].dtype:
            return matmul(x, arrays[0])
        if x.dtype == mx.float32:
            return _with_gradient(x, matrix)
        return x @ arrays[0].T
    # MLX's own product of affine codes is slower on a CPU than unpacking them.
    if packing.kind == "affine" and executor("unpack") != "cpu":
        codes, scales, biases = arrays
        y = mx.quantized_matmul(x, codes, scales, biases, group_size=packing.group_size, bits=packing.bits)
        return y.astype(x.dtype)
    if _on_cpu_with_gradient(x, matrix):
        return _with_gradient(x, matrix)
    # Without its kernel on a GPU, one vector is multiplied as several are: matvec's own fallback is exact and slow.
    by_itself = on_gpu("matvec") or mx.default_device() == mx.cpu
    if x.size == matrix.columns and packing.kind != "affine" and by_itself:
        return matvec(x, matrix).reshape(*x.shape[:-1], matrix.rows)
    count = x.size // matrix.columns
    if reads_packed(matrix, count, x.dtype):
        return differentiable(lambda x: matmul_packed(x, matrix), lambda x: _unpacked(x, matrix), x)
    if _one_by_one(matrix, count):
        return differentiable(lambda x: _products(x, matrix), lambda x: _unpacked(x, matrix), x)
    return _unpacked(x, matrix)


def unpacks(matrix: Matrix, count: int, dtype: mx.Dtype) -> bool:
    """True if the values of the matrix are formed for its product with so many vectors of `dtype`."""
    own = matrix.packing.kind in ("dense", "affine")
    return not (own or reads_packed(matrix, count, dtype) or _one_by_one(matrix, count))


def _one_by_one(matrix: Matrix, count: int) -> bool:
    return on_gpu("matvec") and matrix.packing.kind in BLOCKS and matrix.supported and 1 < count <= FEW


def _products(x: mx.array, matrix: Matrix) -> mx.array:
    rows = [matvec(row, matrix) for row in x.reshape(-1, 1, matrix.columns)]
    return mx.concatenate(rows, axis=0).reshape(*x.shape[:-1], matrix.rows)


def _unpacked(x: mx.array, matrix: Matrix) -> mx.array:
    """multiply with the values of GGUF's blocks."""
    rows = max(1, TILE // matrix.columns // 256) * 256  # an odd number makes cuBLAS slow
    tiles = (rows_of(matrix, start, start + rows) for start in range(0, matrix.rows, rows))
    products = [_by_values(x, functools.partial(unpack, tile, x.dtype)) for tile in tiles]
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)


def multiply_all(x: mx.array, matrices: Sequence[Matrix]) -> mx.array:
    """x by several matrices: the products side by side, (..., rows of all)."""
    if all(matrix.low_rank is None for matrix in matrices) and _on_cpu(x, matrices):
        return cpu.multiply_all(x, matrices)
    products = [multiply(x, matrix) for matrix in matrices]
    return products[0] if len(products) == 1 else mx.concatenate(products, axis=-1)


def reshaped(x: mx.array, shape: Sequence[int]) -> mx.array:
    """x.reshape(shape), also where a CPU's calls are recorded."""
    return cpu.reshaped(x, shape) if on_cpu("step", x.dtype) else x.reshape(shape)


def _on_cpu(x: mx.array, matrices: Sequence[Matrix]) -> bool:
    # In this order: `supports` loads numba, which need not be there.
    return bool(x.size) and on_cpu("matmul", x.dtype) and all(map(cpu.supports, matrices))


def _on_cpu_with_gradient(x: mx.array, matrix: Matrix) -> bool:
    by_numba = executor("matmul") == "cpu" and x.dtype == mx.float32 and bool(x.size)
    return by_numba and cpu.supports(matrix) and have_values(x)


def _with_gradient(x: mx.array, matrix: Matrix, transposed: bool = False) -> mx.array:
    """x W^T, or x W, with a gradient, in float32: where it can, by the CPU's functions, which unpack W as they go."""

    def values() -> mx.array:
        w = unpack(matrix, mx.float32)
        return w.T if transposed else w

    if not _on_cpu_with_gradient(x, matrix):
        return _by_values(x, values)

    def product(x: mx.array) -> mx.array:
        return cpu.multiply_transposed(x, matrix) if transposed else cpu.multiply_all(x, [matrix])

    def plain(x: mx.array) -> mx.array:
        y: mx.array = x @ values().T
        return y

    def cotangent_of_x(_: object, cotangent: mx.array, __: object) -> mx.array:
        return _with_gradient(cotangent, matrix, not transposed)

    return differentiable(product, plain, x, vjp=cotangent_of_x)


def _by_values(x: mx.array, values: Callable[[], mx.array]) -> mx.array:
    """x W^T with the values of W, which the gradient forms once more: a graph that kept them until then would hold the
    model a second time, dense."""

    def product(x: mx.array) -> mx.array:
        return matmul(x, values())

    def unrecorded(x: mx.array) -> mx.array:
        with no_grad():  # or the inner product's graph would keep them
            return product(x)

    def cotangent_of_x(_: object, cotangent: mx.array, __: object) -> mx.array:
        return _by_values(cotangent, lambda: values().T)

    return differentiable(unrecorded, product, x, vjp=cotangent_of_x)
