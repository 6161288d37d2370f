"""Products of a matrix, dense or packed, with one vector, together with what stands before and after them in a layer.

One token's decoding is four such launches a layer. Each reads the matrix as it is stored, once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from ..backend import mx
from . import cpu, tunings
from .dispatch import (
    Kernel,
    executor,
    float_bits,
    on_cpu,
    on_gpu,
    require,
    require_float,
    require_like,
    require_position,
)
from .matrix import BLOCKS, Matrix
from .rms_norm import require_eps, rms_norm
from .rope import qkv_rope
from .swiglu import swiglu_joined, swiglu_joined_fallback
from .tunings import Tuning
from .unpack import array_names, reader, require_arrays, unpack_fallback

Norm = tuple[mx.array, float]  # weight (columns,) and eps of an RMSNorm

MAX_STAGED = 16384  # bytes of a normed vector in threadgroup memory
# Where codes of 4 and 6 bits are multiplied as tiles (metal/nvidia/tiles.h). Apple's GPUs have such instructions too,
# but there is none here to measure them on.
TILED_ON = ("cuda",)


@functools.cache
def _kernel(name: str, kinds: tuple[str, ...], tiled: bool, missing: tuple[str, ...] = ()) -> Kernel:
    """missing: inputs that a call does without; each that MLX is given costs it a microsecond at every launch."""
    last, outputs, headers = {
        "matvec": (("residual",), ("out",), ()),
        "matvec_swiglu": ((), ("out",), ("silu.h",)),
        "matvec_qkv": (("bias", "table", "recent_kv", "position"), ("q", "new_recent_kv"), ("rotary.h", "qkv.h")),
    }[name]
    packings = tuple(f"{kind}.h" for kind in dict.fromkeys(kinds))
    headers = ("rms.h", "rows.h", *packings, "matvec.h", *headers)
    if tiled:
        tiles = (f"nvidia/{kind}_tiles.h" for kind in dict.fromkeys(kinds))
        headers = ("nvidia/instructions.h", *headers, "nvidia/tiles.h", *tiles, "nvidia/tile_sums.h")
        name = f"nvidia/{name}"
    arrays = tuple(array for kind, number in zip(kinds, ("", "2")) for array in array_names(kind, number))
    definitions = [(f"matrix{number}", reader(kind, number, tiled)) for kind, number in zip(kinds, ("", "2"))]
    if name.endswith("qkv") and len(kinds) == 1:
        definitions.append(("matrix2", "matrix"))
    definitions += [(absent, "x") for absent in missing]  # named in the text, never read
    inputs = tuple(name for name in ("x", "weight", *arrays, *last) if name not in missing)
    variant = "_".join((*kinds, *["tiles"] * tiled))
    return Kernel(name, inputs, outputs, headers, variant, tuple(definitions), ("x", *arrays))


def matvec(x: mx.array, matrix: Matrix, norm: Norm | None = None, residual: mx.array | None = None) -> mx.array:
    """matrix @ norm(x) + residual for one vector.

    x: (..., columns) with one row; norm: weight (columns,) and eps of an RMSNorm before, or None; residual: (..., rows)
    or None. Returns (1, 1, rows). Rounding: as rms_norm's, the product is summed in float32 and rounded to x.dtype, the
    sum with the residual is rounded; with an adapter, as multiply's. Raises ValueError if shapes or dtypes disagree.
    """
    _require_product(x, matrix, norm)
    rows = matrix.rows
    if residual is not None:
        require_like("residual", residual.reshape(-1), (rows,), x.dtype)
    if _on_cpu(x, [matrix]):
        return cpu.matvec(x, matrix, norm, residual)
    if matrix.low_rank is not None:
        (a, b), row_scale = matrix.low_rank.factors, matrix.low_rank.row_scale
        if row_scale is None:
            y = matvec(x, matrix.base, norm, residual)
        else:
            y = matvec(x, matrix.base, norm) * row_scale
            y = y if residual is None else y + residual.reshape(y.shape)
        return matvec(matvec(x, a, norm), b, residual=y)
    if not _supports(x, matrix, norm):
        y = matvec_fallback(x, matrix, norm)
        return y if residual is None else y + residual.reshape(y.shape)
    tuning = _tuning("matvec", [matrix], x.dtype, norm is not None)
    template = (("ROWS", rows), ("NORM", norm is not None), ("ADD", residual is not None))
    units = -(-rows // tuning.rows)
    return _launch("matvec", x, [matrix], norm, (residual,), template, tuning, units, [(1, 1, rows)])[0]


def matvec_swiglu(x: mx.array, matrix: Matrix, norm: Norm) -> mx.array:
    """swiglu_joined(matrix @ norm(x)) for one vector: matrix (2 F, columns), gate's rows first; returns (1, 1, F).

    Rounding and errors as matvec's and swiglu's.
    """
    _require_product(x, matrix, norm, required=True)
    require(matrix.rows % 2 == 0, lambda: f"matrix has {matrix.rows} rows, expected gate's and up's.")
    if _on_cpu(x, [matrix]):
        return cpu.matvec_swiglu(x, matrix, norm)
    if matrix.low_rank is not None:
        return swiglu_joined(matvec(x, matrix, norm))
    if not _supports(x, matrix, norm):
        return swiglu_joined_fallback(matvec_fallback(x, matrix, norm))
    tuning = _tuning("matvec_swiglu", [matrix], x.dtype, True)
    width = matrix.rows // 2
    units = -(-width // (tuning.rows // 2))
    return _launch("matvec_swiglu", x, [matrix], norm, (), (("F", width),), tuning, units, [(1, 1, width)])[0]


def matvec_qkv(
    x: mx.array,
    matrices: Sequence[Matrix],
    bias: mx.array,
    norm: Norm,
    table: mx.array,
    recent_kv: mx.array,
    position: mx.array,
    n_heads: int,
) -> tuple[mx.array, mx.array]:
    """qkv_rope(matrix @ norm(x), bias) for one vector, its key and value put among those of the tokens before it.

    matrices: one or two, one above the other, ((n_heads + 2 n_kv_heads) head_dim, columns), the first one of full
    heads; bias: of all rows; table (head_dim / 2, 2): one position's of Rotary.table; recent_kv (1, 2 n_kv_heads,
    tokens, head_dim): keys, then values, of the newest tokens; position: int32 (2,), the token's and the number of
    tokens before recent_kv. Returns q (1, n_heads, 1, head_dim) and the new recent_kv. Rounding and errors as matvec's
    and qkv_rope's.
    """
    for matrix in matrices:
        _require_product(x, matrix, norm, required=True)
    require_like("table", table, ("head_dim / 2", 2), mx.float32)
    require(isinstance(n_heads, int) and n_heads > 0, lambda: f"n_heads is {n_heads!r}, expected a positive integer.")
    rows, head_dim = sum(matrix.rows for matrix in matrices), 2 * table.shape[0]
    require_like("recent_kv", recent_kv, (1, "2 n_kv_heads", "tokens", head_dim), x.dtype)
    heads = recent_kv.shape[1]
    require(
        heads % 2 == 0
        and recent_kv.size > 0
        and rows == (n_heads + heads) * head_dim
        and matrices[0].rows % head_dim == 0
        and len(matrices) < 3,
        lambda: (
            f"matrices have {[matrix.rows for matrix in matrices]} rows, expected one or two of full heads, "
            f"{n_heads} + {heads} of {head_dim}."
        ),
    )
    require_like("bias", bias, (rows,), x.dtype)
    require_position(position)
    shape = (1, n_heads, 1, head_dim)
    if _on_cpu(x, matrices):
        return cpu.matvec_qkv(x, matrices, bias, norm, table, recent_kv, position, n_heads)
    if any(matrix.low_rank is not None for matrix in matrices):
        y = mx.concatenate([matvec(x, matrix, norm) for matrix in matrices], axis=-1)
        q, kv = qkv_rope(y, bias, table[None, None], n_heads, heads // 2)
        return q.reshape(shape), put_recent(recent_kv, kv.reshape(1, heads, 1, head_dim), position)
    tuning = _tuning("matvec_qkv", matrices, x.dtype, True)
    if len(matrices) > 1 and tuning.split > 1:  # all units of a threadgroup must be of one matrix
        tuning = replace(tuning, threads=32 * tuning.split)
    if not all(_supports(x, matrix, norm) for matrix in matrices) or head_dim // 2 % (tuning.rows // 2):
        y = mx.concatenate([matvec_fallback(x, matrix, norm) for matrix in matrices], axis=-1)
        q, kv = qkv_rope(y, bias, table[None, None], n_heads, heads // 2)
        return q.reshape(shape), put_recent(recent_kv, kv.reshape(1, heads, 1, head_dim), position)
    units = -(-rows // tuning.rows)
    copiers = -(-recent_kv.nbytes // (16 * tuning.threads))  # threadgroups that copy recent_kv, 16 bytes a thread
    template = (
        *(("HEADS", n_heads), ("KV", heads // 2), ("HALF", head_dim // 2), ("SLOTS", recent_kv.shape[2])),
        *(("PAIRS1", matrices[0].rows // 2), ("COPIERS", copiers)),
    )
    extra, shapes = (bias, table, recent_kv, position), [shape, recent_kv.shape]
    q, kv = _launch("matvec_qkv", x, matrices, norm, extra, template, tuning, units, shapes, copiers)
    return q, kv


def put_recent(recent_kv: mx.array, kv: mx.array, position: mx.array) -> mx.array:
    """recent_kv (B, 2 n_kv_heads, tokens, head_dim) with kv (B, 2 n_kv_heads, 1, head_dim) at position[0] -
    position[1]."""
    if on_cpu("step", recent_kv.dtype):
        return cpu.put_recent(recent_kv, kv, position)
    here = mx.arange(recent_kv.shape[2]) == position[0] - position[1]
    return mx.where(here[:, None], kv, recent_kv)


def matvec_fallback(x: mx.array, matrix: Matrix, norm: Norm | None = None) -> mx.array:
    """matvec in MLX's own operations, without the residual."""
    y = x.reshape(1, 1, -1)
    if norm is not None:
        y = rms_norm(y, *norm)
    wide, packing = y.astype(mx.float32), matrix.packing
    if packing.kind != "affine":
        return (wide @ unpack_fallback(matrix, mx.float32).T).astype(x.dtype)
    codes, (scales, biases) = matrix.arrays[0], (array.astype(mx.float32) for array in matrix.arrays[1:])
    y = mx.quantized_matmul(wide, codes, scales, biases, group_size=packing.group_size, bits=packing.bits)
    return y.astype(x.dtype)


def _require_product(x: mx.array, matrix: Matrix, norm: Norm | None, required: bool = False) -> None:
    """Raises ValueError unless these can be multiplied. required: the norm may not be None."""
    require_float("x", x)
    require_arrays(matrix)
    require(x.size == matrix.columns, lambda: f"x has shape {x.shape}, expected one vector of {matrix.columns}.")
    require(norm is not None or not required, lambda: "norm is None, expected the norm's weight and eps.")
    if norm is not None:
        require_like("norm's weight", norm[0], (matrix.columns,), x.dtype)
        require_eps(norm[1])


def _on_cpu(x: mx.array, matrices: Sequence[Matrix]) -> bool:
    return on_cpu("matvec", x.dtype) and all(map(cpu.supports, matrices))


def _supports(x: mx.array, matrix: Matrix, norm: Norm | None) -> bool:
    return (
        on_gpu("matvec")
        and matrix.supported
        and (matrix.packing.kind != "dense" or matrix.arrays[0].dtype == x.dtype)
        and (norm is None or x.nbytes <= MAX_STAGED)
    )


def tiled(matrices: Sequence[Matrix], dtype: mx.Dtype) -> bool:
    """True if the products of these matrices with a vector of `dtype` are made as tiles."""
    return (
        executor("matvec") in TILED_ON
        and dtype != mx.float32
        and len({matrix.packing.kind in BLOCKS for matrix in matrices}) == 1  # one order of codes, see tiles.h
        and all(matrix.packing.kind in BLOCKS or _affine_tiles(matrix) for matrix in matrices)
    )


def _affine_tiles(matrix: Matrix) -> bool:
    packing = matrix.packing
    return (
        packing.kind == "affine"
        and packing.bits == 4
        and matrix.columns % packing.group_size == 0
        and matrix.arrays[1].dtype == matrix.arrays[2].dtype
    )


def _tuning(name: str, matrices: Sequence[Matrix], dtype: mx.Dtype, normed: bool) -> Tuning:
    device = executor("matvec")
    if tiled(matrices, dtype):
        return tunings.for_tiles(name, matrices, normed, device)
    return tunings.for_metal(name, matrices, dtype, normed) if device == "metal" else tunings.for_cuda(name, matrices)


def _launch(
    name: str,
    x: mx.array,
    matrices: Sequence[Matrix],
    norm: Norm | None,
    extra: tuple[mx.array | None, ...],
    template: tuple[tuple[str, object], ...],
    tuning: Tuning,
    units: int,
    shapes: Sequence[tuple[int, ...]],
    copiers: int = 0,
) -> list[mx.array]:
    weight, eps = (None, 0.0) if norm is None else norm
    as_tiles = tiled(matrices, x.dtype)
    groups = -(-units // (tuning.threads // 32 // tuning.split))
    groups = -(-groups // -(-groups // tuning.groups))  # as many rounds for each
    values = dict(template) | {"K": x.size, "SPLIT": tuning.split, "DEPTH": tuning.depth, "THREADS": tuning.threads}
    values |= {"EPS": float_bits(eps)}
    values |= {"RING": tuning.ring} if as_tiles else {"R": tuning.rows}
    if copiers and as_tiles:
        values |= {"GROUPS": groups}
    for matrix, number in zip(matrices, ("", "2")):
        values |= matrix.template(number, as_tiles)
    grid = ((groups + copiers) * tuning.threads, 1, 1)
    given = (x, weight, *(array for matrix in matrices for array in matrix.arrays), *extra)
    missing = ("weight",) * (weight is None) + ("residual",) * any(array is None for array in extra)
    kernel = _kernel(name, tuple(matrix.packing.kind for matrix in matrices), as_tiles, missing)
    inputs = [array for array in given if array is not None]
    return kernel(inputs, list(values.items()), grid, (tuning.threads, 1, 1), shapes)
