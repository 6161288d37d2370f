"""Packed matrices, GGUF's Q4_K and Q6_K blocks as they are in the file among them: how they lie, and their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np

from ..backend import mx
from ..gguf.blocks import BY_KIND, dequantize
from ..gguf.packing import BLOCK_SIZES, DENSE, Packing
from . import cpu
from .dispatch import Kernel, described, executor, on_gpu, require, threads
from .matrix import BLOCKS, Matrix, template_names

# The names that the kernels give a matrix's arrays; each packing's header in qwen_mlx/metal describes them.
ARRAYS = {
    "dense": ("w",),
    "affine": ("w", "scales", "biases"),
    "q4_k": ("w",),
    "q6_k": ("w", "high", "scales", "factors"),
}


def array_names(kind: str, number: str = "") -> tuple[str, ...]:
    """The kernels' names for the arrays of their matrix, or of their matrix `number`."""
    return tuple(f"{name}{number}" for name in ARRAYS[kind])


def reader(kind: str, number: str = "", tiled: bool = False) -> str:
    """The expression that makes a matrix's reader in a kernel, "affine<T, K, R, BITS, GROUP>(w, scales, biases)"."""
    values = ["T", "K", *(() if tiled else ("R",)), *template_names(kind, number, tiled)]
    return f"{kind}{'_tiles' * tiled}<{', '.join(values)}>({', '.join(array_names(kind, number))})"


def require_arrays(matrix: Matrix) -> None:
    """Raises ValueError unless the arrays have the shapes that the packing says."""
    require(isinstance(matrix, Matrix), lambda: f"matrix {described(matrix)}, expected an ops.Matrix.")
    packing, rows, columns, arrays = matrix.packing, matrix.rows, matrix.columns, matrix.arrays
    require(rows > 0 and columns > 0, lambda: f"matrix has {rows} rows and {columns} columns, expected some.")
    size = packing.group_size
    require(packing.kind != "affine" or size > 0, lambda: f"group_size is {size}, expected 32, 64 or 128.")
    shapes: tuple[tuple[int, ...], ...] = {
        "affine": ((rows, columns * packing.bits // 32), *[(rows, columns // (size or 1))] * 2),
        "q4_k": ((rows, columns // 256, 36),),
        "q6_k": tuple((rows, columns // share) for share in (8, 16, 64, 256)),
    }.get(packing.kind, ((rows, columns),))
    if packing.kind in BLOCK_SIZES and packing.kind not in BLOCKS:
        shapes = ((rows, columns // packing.block_size * BY_KIND[packing.kind].type_size),)
    found = tuple(array.shape for array in arrays)
    require(found == shapes, lambda: f"matrix's arrays have shapes {found}, expected {shapes} for {packing}.")


@functools.cache
def _kernel(kind: str, by_ids: bool) -> Kernel:
    inputs = (*ARRAYS[kind], "ids") if by_ids else ARRAYS[kind]
    name, headers = "unpack_rows" if by_ids else "unpack", ("rows.h", f"{kind}.h")
    aligned = ("w",) * (kind == "q4_k")  # the only one that reads 16 bytes at once
    return Kernel(name, inputs, ("out",), headers, kind, (("matrix", reader(kind)),), aligned)


def unpack(matrix: Matrix, dtype: mx.Dtype, ids: mx.array | None = None) -> mx.array:
    """The values of a matrix, or of its rows `ids` (...): (rows, columns) or (..., columns) in dtype.

    Rounding: formed in float32 as gguf-py does, then rounded; what an adapter adds is rounded by itself.
    """
    require_arrays(matrix)
    require(
        ids is None or (isinstance(ids, mx.array) and mx.issubdtype(ids.dtype, mx.integer)),
        lambda: f"ids {described(ids)}, expected integers, each below {matrix.rows}.",
    )
    if matrix.low_rank is not None:
        a, b, row_scale, _ = matrix.low_rank
        values = unpack(matrix.base, dtype, ids)
        if row_scale is not None:
            values = values * (row_scale if ids is None else row_scale[ids])[..., None]
        return (values + (b if ids is None else b[ids]) @ a).astype(dtype)
    kind = matrix.packing.kind
    on_cpu = executor("unpack") == "cpu" and dtype == mx.float32 and cpu.supports(matrix)
    if on_cpu and (kind != "dense" or (ids is not None and matrix.arrays[0].dtype == dtype)):
        try:  # a packed matrix has no gradient
            return cpu.unpack(matrix, ids)
        except ValueError:  # the ids have no values yet: within mx.compile, mx.vmap or mx.export_function
            return cpu.unpack(matrix, None)[ids]
    if not on_gpu("unpack") or kind == "dense" or not matrix.supported:
        return unpack_fallback(matrix, dtype, ids)
    rows, shape = (matrix.rows, (matrix.rows,)) if ids is None else (ids.size, ids.shape)
    packs = matrix.columns // 8
    n_threads = threads(packs, 128)
    grid = (-(-packs // n_threads) * n_threads, rows, 1)
    template = [("T", dtype), ("K", matrix.columns), ("R", 1), *matrix.template().items()]
    inputs = matrix.arrays if ids is None else (*matrix.arrays, ids)
    kernel, out = _kernel(kind, ids is not None), (*shape, matrix.columns)
    return kernel(inputs, template, grid, (n_threads, 1, 1), [out], dtype)[0]


def unpack_fallback(matrix: Matrix, dtype: mx.Dtype, ids: mx.array | None = None) -> mx.array:
    """unpack in plain MLX."""
    packing = matrix.packing
    arrays = matrix.arrays if ids is None else tuple(array[ids] for array in matrix.arrays)
    shape = (*((matrix.rows,) if ids is None else ids.shape), matrix.columns)
    if packing.kind == "dense":
        return arrays[0].astype(dtype)
    if packing.kind == "affine":
        scales, biases = (array.astype(mx.float32) for array in arrays[1:])
        return mx.dequantize(arrays[0], scales, biases, packing.group_size, packing.bits).astype(dtype)
    if packing.kind not in BLOCKS:
        raw = np.asarray(arrays[0]).reshape(-1, arrays[0].shape[-1])
        return mx.array(dequantize(raw, BY_KIND[packing.kind])).reshape(shape).astype(dtype)
    return (_q4_k if packing.kind == "q4_k" else _q6_k)(*arrays).reshape(shape).astype(dtype)


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


def computes_on_cpu(dtype: mx.Dtype) -> bool:
    """True if activations of `dtype` go through the CPU's own functions, which read matrices as they are stored."""
    return dtype == mx.float32 and executor() == "cpu"


def packing_kinds(dtype: mx.Dtype) -> frozenset[str]:
    """The kinds of packed matrices that are multiplied as they are, by activations of `dtype`."""
    return frozenset(("affine", *(BLOCK_SIZES if computes_on_cpu(dtype) else BLOCKS)))


def raw_matrix(raw: np.ndarray | mx.array, kind: str) -> Matrix:
    """The matrix of a GGUF tensor's bytes, uint8 (rows, bytes of a row), packed as `kind`, "q4_k" for example. Where it
    can, it shares the memory of an array of MLX's."""
    rows, size = raw.shape[0], BY_KIND[kind].type_size
    columns = raw.shape[1] // size * BLOCK_SIZES[kind]
    if kind != "q6_k":
        array = raw if isinstance(raw, mx.array) else mx.array(raw)
        if kind == "q4_k":
            array = array.reshape(rows, -1, size).view(mx.uint32)
        return Matrix(Packing(kind), rows, columns, (array,))
    blocks = np.array(raw, copy=False).reshape(rows, -1, size)
    fields = ((0, 128, np.uint32), (128, 192, np.uint32), (192, 208, np.uint32), (208, 210, np.float16))
    parts = (np.ascontiguousarray(blocks[..., a:b]).view(dtype).reshape(rows, -1) for a, b, dtype in fields)
    return Matrix(Packing(kind), rows, columns, tuple(map(mx.array, parts)))


def compile_ahead(packings: Iterable[Packing], dense: Iterable[mx.Dtype], dtype: mx.Dtype) -> Callable[[], None]:
    """Starts to compile, in a thread, what a CPU needs for activations of `dtype`, matrices of these packings and dense
    ones of these dtypes. Returns a function that waits for it. Nothing is done where something else computes."""
    if not computes_on_cpu(dtype):
        return lambda: None
    kinds = [(packing, dtype) for packing in packings if packing != DENSE]
    return cpu.compile_ahead([*kinds, *((DENSE, kind) for kind in dense)])
