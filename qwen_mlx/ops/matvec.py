"""Products of a matrix, dense or packed, with one vector, together with what stands before and after them in a layer.

One token's decoding is four such launches a layer. Each reads the matrix as it is stored, once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..backend import mx
from .dispatch import Kernel, described, executor, float_bits, require, require_float, require_like, require_place
from .rms_norm import require_eps, rms_norm
from .rope import qkv_rope
from .swiglu import swiglu_joined_reference
from .unpack import RAW, Matrix, array_names, format_macros, require_arrays, unpack_reference

MAX_STAGED = 16384  # bytes of a normed vector in threadgroup memory
# Where codes of 4 and 6 bits are multiplied as tiles (see metal/tiles.h). Apple's GPUs have such instructions too, but
# there is none here to measure them on.
TILED_ON = ("cuda",)
TILE_ROWS = 16
# Bytes of threadgroup memory: what a CUDA kernel can declare, and Apple's limit.
THREADGROUP_MEMORY = {"cuda": 48 << 10, "metal": 32 << 10}


@dataclass(frozen=True)
class Tuning:
    """How work is cut: `rows` a unit, `split` simdgroups a unit, `depth` chunks a lane loads at once (tiles: stages
    that there is room for), `threads` a threadgroup, and at most `groups` threadgroups, which take several units in
    turn where there are more. ring: words that a stage of a simdgroup takes in threadgroup memory."""

    rows: int
    split: int
    depth: int
    threads: int = 256
    groups: int = 1056
    ring: int = 0


@functools.cache
def _kernel(name: str, kinds: tuple[str, ...], tiled: bool, missing: tuple[str, ...] = ()) -> Kernel:
    """missing: inputs that a call does without; each that MLX is given costs it a microsecond at every launch."""
    last, outputs, headers = {
        "matvec": (("residual",), ("out",), ()),
        "matvec_swiglu": ((), ("out",), ("silu.h",)),
        "matvec_qkv": (("bias", "table", "tail", "place"), ("q", "new_tail"), ("rotary.h",)),
    }[name]
    headers = ("rms.h", "rows.h", *dict.fromkeys(f"{kind}.h" for kind in kinds), "matvec.h", *headers)
    if tiled:
        headers += ("tiles.h", *dict.fromkeys(f"{kind}_tiles.h" for kind in kinds), "tile_sums.h")
    numbered = list(zip(kinds, ("", "2")))
    arrays = [array for kind, number in numbered for array in array_names(kind, number)]
    macros = tuple(macro for kind, number in numbered for macro in format_macros(kind, number, tiled))
    macros += tuple((absent, "x") for absent in missing)  # named in the text, never read
    inputs = tuple(name for name in ("x", "weight", *arrays, *last) if name not in missing)
    return Kernel(name, inputs, outputs, headers, "_".join((*kinds, *["tiles"] * tiled)), macros)


def matvec(
    x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None = None, residual: mx.array | None = None
) -> mx.array:
    """matrix @ norm(x) + residual for one vector.

    x: (..., columns) with one row; norm: weight (columns,) and eps of an RMSNorm before, or None; residual: (..., rows)
    or None. Returns (1, 1, rows). Rounding: as rms_norm's, the product is summed in float32 and rounded to x.dtype, the
    sum with the residual is rounded. Raises ValueError if shapes or dtypes do not agree.
    """
    _check(x, matrix, norm)
    rows = matrix.rows
    if residual is not None:
        require(
            residual.size == rows and residual.dtype == x.dtype,
            lambda: (
                f"residual has shape {residual.shape} and dtype {residual.dtype}, expected {(rows,)} and {x.dtype}."
            ),
        )
    if not _on_kernel(x, matrix, norm):
        y = matvec_reference(x, matrix, norm)
        return y if residual is None else y + residual.reshape(y.shape)
    tuning = _tuning("matvec", [matrix], x.dtype, norm is not None)
    template = (("ROWS", rows), ("NORM", norm is not None), ("ADD", residual is not None))
    units = -(-rows // tuning.rows)
    return _launch("matvec", x, [matrix], norm, (residual,), template, tuning, units, [(1, 1, rows)])[0]


def matvec_swiglu(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float]) -> mx.array:
    """swiglu_joined(matrix @ norm(x)) for one vector: matrix (2 F, columns), gate's rows first; returns (1, 1, F).

    Rounding and errors as matvec's and swiglu's.
    """
    _check(x, matrix, _required(norm))
    require(matrix.rows % 2 == 0, lambda: f"matrix has {matrix.rows} rows, expected gate's and up's.")
    if not _on_kernel(x, matrix, norm):
        return swiglu_joined_reference(matvec_reference(x, matrix, norm))
    tuning = _tuning("matvec_swiglu", [matrix], x.dtype, True)
    width = matrix.rows // 2
    units = -(-width // (tuning.rows // 2))
    return _launch("matvec_swiglu", x, [matrix], norm, (), (("F", width),), tuning, units, [(1, 1, width)])[0]


def matvec_qkv(
    x: mx.array,
    parts: Sequence[Matrix],
    bias: mx.array,
    norm: tuple[mx.array, float],
    table: mx.array,
    tail: mx.array,
    place: mx.array,
    n_heads: int,
) -> tuple[mx.array, mx.array]:
    """qkv_rope(matrix @ norm(x), bias) for one vector, its key and value put among those of the tokens before it.

    parts: one or two matrices, one above the other, ((n_heads + 2 n_kv_heads) head_dim, columns); the first one's rows
    are whole heads; bias: of all rows; table (head_dim / 2, 2): one position's of Rotary.table;
    tail (1, 2 n_kv_heads, tokens, head_dim): keys, then values, of the newest tokens; place: int32 (2,), the token's
    position and the tail's. Returns q (1, n_heads, 1, head_dim) and the new tail. Rounding and errors as matvec's and
    qkv_rope's.
    """
    for part in parts:
        _check(x, part, _required(norm))
    require_like("table", table, (table.shape[0] if isinstance(table, mx.array) and table.ndim else 1, 2), mx.float32)
    require(isinstance(n_heads, int) and n_heads > 0, lambda: f"n_heads is {n_heads!r}, expected a positive integer.")
    rows, half = sum(part.rows for part in parts), table.shape[0]
    require(
        isinstance(tail, mx.array)
        and (tail.ndim == 4 and tail.shape[0] == 1 and tail.size > 0 and tail.shape[3] == 2 * half)
        and (tail.shape[1] % 2 == 0 and tail.dtype == x.dtype),
        lambda: f"tail {described(tail)}, expected (1, 2 n_kv_heads, tokens, {2 * half}) and {x.dtype}.",
    )
    require(
        rows == (n_heads + tail.shape[1]) * 2 * half and parts[0].rows % (2 * half) == 0 and len(parts) < 3,
        lambda: (
            f"parts have {[part.rows for part in parts]} rows, expected one or two matrices of whole heads, "
            f"{n_heads} + {tail.shape[1]} of {2 * half}."
        ),
    )
    require_like("bias", bias, (rows,), x.dtype)
    require_place(place)
    shape = (1, n_heads, 1, 2 * half)
    tuning = _tuning("matvec_qkv", parts, x.dtype, True)
    if len(parts) > 1 and tuning.split > 1:  # all units of a threadgroup must be of one matrix
        tuning = replace(tuning, threads=32 * tuning.split)
    if not all(_on_kernel(x, part, norm) for part in parts) or half % (tuning.rows // 2):
        y = mx.concatenate([matvec_reference(x, part, norm) for part in parts], axis=-1)
        q, kv = qkv_rope(y, bias, table[None, None], n_heads, tail.shape[1] // 2)
        return q.reshape(shape), put_recent(tail, kv.reshape(1, tail.shape[1], 1, 2 * half), place)
    units = -(-rows // tuning.rows)
    shapes = (("HEADS", n_heads), ("KV", tail.shape[1] // 2), ("HALF", half), ("TAIL", tail.shape[2]))
    copiers = -(-tail.nbytes // (16 * tuning.threads))  # threadgroups that copy the tail, 16 bytes a thread
    template = (*shapes, ("PAIRS1", parts[0].rows // 2), ("COPIERS", copiers))
    extra = (bias, table, tail, place)
    q, kv = _launch("matvec_qkv", x, parts, norm, extra, template, tuning, units, [shape, tail.shape], copiers)
    return q, kv


def put_recent(tail: mx.array, kv: mx.array, place: mx.array) -> mx.array:
    """tail with kv (1, 2 n_kv_heads, 1, head_dim) at place[0] - place[1]."""
    here = mx.arange(tail.shape[2]) == place[0] - place[1]
    return mx.where(here[:, None], kv, tail)


def matvec_reference(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None = None) -> mx.array:
    """matvec in MLX's own operations, without the residual."""
    y = x.reshape(1, 1, -1)
    if norm is not None:
        y = rms_norm(y, *norm)
    form = matrix.packing
    if form.kind == "affine":
        scales, biases = (array.astype(mx.float32) for array in matrix.arrays[1:])
        wide = y.astype(mx.float32)
        return mx.quantized_matmul(
            wide, matrix.arrays[0], scales, biases, group_size=form.group_size, bits=form.bits
        ).astype(x.dtype)
    return (y.astype(mx.float32) @ unpack_reference(matrix, mx.float32).T).astype(x.dtype)


def _required(norm: tuple[mx.array, float]) -> tuple[mx.array, float]:
    require(norm is not None, lambda: "norm is None, expected the norm's weight and eps.")
    return norm


def _check(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None) -> None:
    require_float("x", x)
    require_arrays(matrix)
    columns = matrix.columns
    require(x.size == columns, lambda: f"x has shape {x.shape}, expected one vector of {columns}.")
    if norm is not None:
        require_like("norm's weight", norm[0], (columns,), x.dtype)
        require_eps(norm[1])


def _on_kernel(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None) -> bool:
    if executor("matvec") == "reference" or not matrix.supported:
        return False
    dense = matrix.packing.kind != "dense" or matrix.arrays[0].dtype == x.dtype
    return dense and (norm is None or x.nbytes <= MAX_STAGED)


def tiled(parts: Sequence[Matrix], dtype: mx.Dtype) -> bool:
    """Whether the products of these matrices with a vector of `dtype` are made as tiles."""
    # Of one order of codes: see the kernels' staged_element.
    in_one_order = len({part.packing.kind in RAW for part in parts}) == 1
    return (
        in_one_order
        and executor("matvec") in TILED_ON
        and dtype != mx.float32
        and all(part.packing.kind != "affine" or part.arrays[1].dtype == part.arrays[2].dtype for part in parts)
        and all(part.packing.kind in RAW or _affine_tiles(part) for part in parts)
    )


def _affine_tiles(matrix: Matrix) -> bool:
    packing = matrix.packing
    return packing.kind == "affine" and packing.bits == 4 and matrix.columns % packing.group_size == 0


def _tuning(name: str, parts: Sequence[Matrix], dtype: mx.Dtype, normed: bool) -> Tuning:
    """Measured on an H200 (benchmarks/results/matvec_h200.json): packed rows share the vector's elements, so more of
    them at once; a long row is shared by simdgroups."""
    matrix = parts[0]
    if tiled(parts, dtype):
        return _tile_tuning(name, parts, normed)
    if matrix.packing.kind == "dense":
        if name == "matvec":
            split = 8 if matrix.columns >= 16384 else 2 if matrix.columns >= 4096 else 1
            return Tuning(1, split, 4)
        wide = matrix.columns > 1024
        return Tuning(2, 2 if wide and name == "matvec_qkv" else 1, 2 if wide else 4, groups=528 if wide else 264)
    if name == "matvec_swiglu":
        return Tuning(4, 1, 1, groups=396)
    return Tuning(2, 4 if matrix.columns >= 8192 else 1, 1)


def _tile_tuning(name: str, parts: Sequence[Matrix], normed: bool) -> Tuning:
    """About 2000 simdgroups, each with as many of a row's stages, two at least where the vector is normed, which every
    threadgroup does anew; up to eight simdgroups to a threadgroup, as there is room. A third stage under way made
    most products slower."""
    matrix = parts[0]
    stages = -(-matrix.columns // 256)
    rounds = max(1 + normed, round(stages * matrix.rows / TILE_ROWS / 2000), -(-stages // 8))
    split = -(-stages // min(rounds, stages))
    ring, depth = max(map(_stage_words, parts)) + (0 if normed else 128), 2
    # Besides: the vector with its gaps, sums of each 16 of its elements, and what the simdgroups' sums meet in.
    room = THREADGROUP_MEMORY[executor("matvec")] - (matrix.columns * 5 // 2 if normed else 0) - 1024
    most = max(1, room // (4 * ring * depth))
    split = min(split, most)
    units = 1 if split > 2 else min(most // split, 6 if name == "matvec_swiglu" and split == 1 else 4 // split)
    return Tuning(TILE_ROWS, split, depth, 32 * split * units, groups=1 << 20, ring=ring)


def _stage_words(matrix: Matrix) -> int:
    """Words of codes and scales that a simdgroup copies in a stage; see the formats' headers for tiles."""
    form = matrix.packing
    return {"q4_k": 576, "q6_k": 848}.get(form.kind) or 512 + 8 * (256 // form.group_size) * matrix.arrays[1].dtype.size


def _launch(
    name: str,
    x: mx.array,
    parts: Sequence[Matrix],
    norm: tuple[mx.array, float] | None,
    extra: tuple[mx.array | None, ...],
    template: tuple[tuple[str, object], ...],
    tuning: Tuning,
    units: int,
    shapes: Sequence[tuple[int, ...]],
    copiers: int = 0,
) -> list[mx.array]:
    weight, eps = (None, 0.0) if norm is None else norm
    groups = -(-units // (tuning.threads // 32 // tuning.split))
    groups = -(-groups // -(-groups // tuning.groups))  # as many rounds for each
    template = (
        *template,
        *(("K", x.size), ("R", tuning.rows), ("SPLIT", tuning.split), ("DEPTH", tuning.depth), ("RING", tuning.ring)),
        *(("THREADS", tuning.threads), ("GROUPS", groups), ("EPS", float_bits(eps))),
    )
    for part, number in zip(parts, ("", "2")):
        template += ((f"BITS{number}", part.packing.bits or 4), (f"GROUP{number}", part.packing.group_size or 32))
    grid = ((groups + copiers) * tuning.threads, 1, 1)
    given = (x, weight, *(array for part in parts for array in part.arrays), *extra)
    missing = ("weight",) * (weight is None) + ("residual",) * any(array is None for array in extra)
    kernel = _kernel(name, tuple(part.packing.kind for part in parts), tiled(parts, x.dtype), missing)
    inputs = [array for array in given if array is not None]
    return kernel(inputs, template, grid, (tuning.threads, 1, 1), shapes)
