"""Packed matrices, GGUF's Q4_K and Q6_K blocks as they are in the file among them: how they lie, and their values."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from ..backend import mx
from ..gguf.packing import Packing
from .dispatch import Kernel, described, executor, require, threads

RAW = ("q4_k", "q6_k")
# What the kernels call a matrix's arrays, see each format's header in qwen_mlx/metal.
ARRAYS = {
    "dense": ("w",),
    "affine": ("w", "scales", "biases"),
    "q4_k": ("w",),
    "q6_k": ("w", "high", "scales", "factors"),
}


_TAGS = {"dense": "Dense", "affine": "Affine", "q4_k": "Q4K", "q6_k": "Q6K"}


def array_names(kind: str, number: str = "") -> tuple[str, ...]:
    """What a kernel calls the arrays of its matrix, or of its matrix `number`."""
    return tuple(f"{name}{number}" for name in ARRAYS[kind])


def format_macros(kind: str, number: str = "", tiled: bool = False) -> tuple[tuple[str, str], ...]:
    """FORMAT and MATRIX of such a matrix."""
    tag = f"Tiles<{_TAGS[kind]}>" if tiled else _TAGS[kind]
    return (f"FORMAT{number}", tag), (f"MATRIX{number}", ", ".join(array_names(kind, number)))


class Matrix(NamedTuple):
    """A matrix (rows, columns): how it is packed, and the arrays that hold it.

    dense: (w,); affine: (codes, scales, biases) as mx.quantize makes them; q4_k: (blocks,), GGUF's bytes as uint32
    (rows, columns / 256, 36); q6_k: (low, high, scales, d), the fields of GGUF's blocks each in an array of its own,
    uint32 (rows, columns / 8), (rows, columns / 16) and (rows, columns / 64), float16 (rows, columns / 256).
    """

    packing: Packing
    rows: int
    columns: int
    arrays: tuple[mx.array, ...]

    @property
    def supported(self) -> bool:
        """True if the matrix-vector kernels read it."""
        if self.packing.kind == "affine":
            return self.packing.bits in (2, 3, 4, 5, 6, 8) and self.columns % 32 == 0
        return self.columns % (256 if self.packing.kind in RAW else 16) == 0


def require_arrays(matrix: Matrix) -> None:
    """Raises ValueError unless the arrays have the shapes that the format says."""
    require(isinstance(matrix, Matrix), lambda: f"matrix {described(matrix)}, expected an ops.Matrix.")
    form, rows, columns = matrix.packing, matrix.rows, matrix.columns
    require(rows > 0 and columns > 0, lambda: f"The format has {rows} rows and {columns} columns, expected some.")
    shapes: tuple[tuple[int, ...], ...]
    if form.kind == "affine":
        require(form.group_size > 0, lambda: f"The format's group_size is {form.group_size}, expected 32, 64 or 128.")
        groups = (rows, columns // form.group_size)
        shapes = ((rows, columns * form.bits // 32), groups, groups)
    elif form.kind == "q4_k":
        shapes = ((rows, columns // 256, 36),)
    elif form.kind == "q6_k":
        shapes = tuple((rows, columns // share) for share in (8, 16, 64, 256))
    else:
        shapes = ((rows, columns),)
    found = tuple(array.shape for array in matrix.arrays)
    require(
        found == shapes,
        lambda: f"The matrix's arrays have shapes {found}, expected {shapes} for {form}.",
    )


@functools.cache
def _kernel(kind: str, chosen: bool) -> Kernel:
    inputs = (*ARRAYS[kind], "ids") if chosen else ARRAYS[kind]
    name, headers = "unpack_rows" if chosen else "unpack", ("rows.h", f"{kind}.h")
    return Kernel(name, inputs, ("out",), headers, kind, format_macros(kind))


def unpack(matrix: Matrix, dtype: mx.Dtype, ids: mx.array | None = None) -> mx.array:
    """The values of a matrix, or of its rows `ids` (...): (rows, columns) or (..., columns) in dtype.

    Rounding: formed in float32 as gguf-py does, then rounded.
    """
    require_arrays(matrix)
    require(
        ids is None or (isinstance(ids, mx.array) and mx.issubdtype(ids.dtype, mx.integer)),
        lambda: f"ids {described(ids)}, expected integers, each below {matrix.rows}.",
    )
    form = matrix.packing
    if executor("unpack") == "reference" or form.kind == "dense" or not matrix.supported:
        return unpack_reference(matrix, dtype, ids)
    rows = matrix.rows if ids is None else ids.size
    shape = (matrix.rows,) if ids is None else ids.shape
    packs = matrix.columns // 8
    n_threads = threads(packs, 128)
    grid = (-(-packs // n_threads) * n_threads, rows, 1)
    template = [("T", dtype), ("K", matrix.columns), ("BITS", form.bits or 4), ("GROUP", form.group_size or 32)]
    inputs = (*matrix.arrays, *(() if ids is None else (ids,)))
    return _kernel(form.kind, ids is not None)(
        inputs, template, grid, (n_threads, 1, 1), [(*shape, matrix.columns)], dtype
    )[0]


def unpack_reference(matrix: Matrix, dtype: mx.Dtype, ids: mx.array | None = None) -> mx.array:
    """unpack in plain MLX."""
    form = matrix.packing
    arrays = matrix.arrays if ids is None else tuple(array[ids] for array in matrix.arrays)
    shape = (*((matrix.rows,) if ids is None else ids.shape), matrix.columns)
    if form.kind == "dense":
        return arrays[0].astype(dtype)
    if form.kind == "affine":
        scales, biases = (array.astype(mx.float32) for array in arrays[1:])
        return mx.dequantize(arrays[0], scales, biases, form.group_size, form.bits).astype(dtype)
    return (_q4_k if form.kind == "q4_k" else _q6_k)(*arrays).reshape(shape).astype(dtype)


def _bytes(words: mx.array, shape: tuple[int, ...]) -> mx.array:
    return words.view(mx.uint8).reshape(shape)


def _q4_k(blocks: mx.array) -> mx.array:
    raw = _bytes(blocks, (-1, 144))
    d, dmin = (raw[:, i : i + 2].view(mx.float16).astype(mx.float32) for i in (0, 2))
    low, middle, high = (raw[:, i : i + 4] for i in (4, 8, 12))
    scales = mx.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    minima = mx.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1)
    codes = raw[:, 16:].reshape(-1, 4, 1, 32)
    codes = mx.concatenate([codes & 15, codes >> 4], axis=2).reshape(-1, 8, 32).astype(mx.float32)
    scale, minimum = ((f * s.astype(mx.float32))[..., None] for f, s in ((d, scales), (dmin, minima)))
    return scale * codes - minimum


def _q6_k(low: mx.array, high: mx.array, scales: mx.array, d: mx.array) -> mx.array:
    low, high = _bytes(low, (-1, 2, 1, 64)), _bytes(high, (-1, 2, 1, 32))
    bottom = mx.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    top = mx.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2)
    codes = (bottom | (top << 4)).astype(mx.float32) - 32
    signed = scales.view(mx.int8).reshape(-1, 16).astype(mx.float32)
    scale = d.reshape(-1, 1).astype(mx.float32) * signed
    return scale[..., None] * codes.reshape(-1, 16, 16)


def raw_matrix(raw: np.ndarray, kind: str) -> Matrix:
    """A GGUF tensor's bytes, uint8 (rows, bytes of a row), in format "q4_k" or "q6_k"."""
    rows = raw.shape[0]
    size = {"q4_k": 144, "q6_k": 210}[kind]
    columns = raw.shape[1] // size * 256
    blocks = raw.reshape(rows, -1, size)
    if kind == "q4_k":
        arrays: tuple[mx.array, ...] = (mx.array(blocks.view(np.uint32)),)
    else:
        parts = [
            np.ascontiguousarray(blocks[..., a:b]).reshape(rows, -1) for a, b in ((0, 128), (128, 192), (192, 208))
        ]
        d = np.ascontiguousarray(blocks[..., 208:]).view(np.float16).reshape(rows, -1)
        arrays = (*(mx.array(part.view(np.uint32)) for part in parts), mx.array(d))
    return Matrix(Packing(kind), rows, columns, arrays)
