"""Products of a matrix, dense or packed, with one vector, together with what stands before and after them in a layer.

One token's decoding is four such launches a layer. Each reads the matrix as it is stored, once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..backend import mx
from .dispatch import Kernel, executor, float_bits, require, require_float, require_like
from .rms_norm import rms_norm
from .rope import Rotary, scale_template, turns_of
from .swiglu import swiglu_joined_reference
from .unpack import Format, Matrix, array_names, format_macros, unpack_reference

MAX_STAGED = 16384  # bytes of a normed vector in threadgroup memory


@dataclass(frozen=True)
class Tuning:
    """How work is cut: `rows` a unit, `split` simdgroups a unit, `depth` chunks a lane has under way, `threads`, and
    at most `groups` threadgroups, which take several units in turn where there are more."""

    rows: int
    split: int
    depth: int
    threads: int = 256
    groups: int = 1056


_ROTATION = Kernel("rotation", ("turns", "offset"), ("out",), ("rotary.h",))


@functools.cache
def _kernel(name: str, kinds: tuple[str, ...]) -> Kernel:
    last, outputs, headers = {
        "matvec": (("residual",), ("out",), ()),
        "matvec_swiglu": ((), ("out",), ("silu.h",)),
        "matvec_qkv": (("bias", "table", "tail", "place"), ("q", "new_tail"), ("rotary.h",)),
    }[name]
    headers = ("rms.h", "rows.h", *dict.fromkeys(f"{kind}.h" for kind in kinds), "matvec.h", *headers)
    numbered = list(zip(kinds, ("", "2")))
    arrays = [array for kind, number in numbered for array in array_names(kind, number)]
    macros = tuple(macro for kind, number in numbered for macro in format_macros(kind, number))
    return Kernel(name, ("x", "weight", *arrays, *last), outputs, headers, "_".join(kinds), macros)


def matvec(
    x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None = None, residual: mx.array | None = None
) -> mx.array:
    """matrix @ norm(x) + residual for one vector.

    x: (..., columns) with one row; norm: weight (columns,) and eps of an RMSNorm before, or None; residual: (..., rows)
    or None. Returns (1, 1, rows). Rounding: as rms_norm's, the product is summed in float32 and rounded to x.dtype, the
    sum with the residual is rounded. Raises ValueError if shapes or dtypes do not agree.
    """
    _check(x, matrix, norm)
    rows = matrix.format.rows
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
    tuning = _tuning("matvec", matrix.format)
    template = (("ROWS", rows), ("NORM", norm is not None), ("ADD", residual is not None))
    extra = (x if residual is None else residual,)  # not read without ADD
    units = -(-rows // tuning.rows)
    return _launch("matvec", x, [matrix], norm, extra, template, tuning, units, [(1, 1, rows)])[0]


def matvec_swiglu(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float]) -> mx.array:
    """swiglu_joined(matrix @ norm(x)) for one vector: matrix (2 F, columns), gate's rows first; returns (1, 1, F).

    Rounding and errors as matvec's and swiglu's.
    """
    _check(x, matrix, norm)
    require(matrix.format.rows % 2 == 0, lambda: f"matrix has {matrix.format.rows} rows, expected gate's and up's.")
    if not _on_kernel(x, matrix, norm):
        return swiglu_joined_reference(matvec_reference(x, matrix, norm))
    tuning = _tuning("matvec_swiglu", matrix.format)
    width = matrix.format.rows // 2
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
    are whole heads; bias: of all rows; table: rotation_table(...);
    tail (1, 2 n_kv_heads, tokens, head_dim): keys, then values, of the newest tokens; place: int32 (2,), the token's
    position and the tail's. Returns q (1, n_heads, 1, head_dim) and the new tail. Rounding and errors as matvec's and
    qkv_rope's.
    """
    for part in parts:
        _check(x, part, norm)
    rows, half = sum(part.format.rows for part in parts), table.shape[0]
    require(
        tail.ndim == 4 and tail.shape[3] == 2 * half and tail.shape[1] % 2 == 0 and tail.dtype == x.dtype,
        lambda: (
            f"tail has shape {tail.shape} and dtype {tail.dtype}, expected (1, 2 n_kv_heads, tokens, {2 * half}) and "
            f"{x.dtype}."
        ),
    )
    require(
        rows == (n_heads + tail.shape[1]) * 2 * half and parts[0].format.rows % (2 * half) == 0 and len(parts) < 3,
        lambda: (
            f"parts have {[part.format.rows for part in parts]} rows, expected one or two matrices of whole heads, "
            f"{n_heads} + {tail.shape[1]} of {2 * half}."
        ),
    )
    require_like("bias", bias, (rows,), x.dtype)
    require_like("place", place, (2,), mx.int32)
    shape = (1, n_heads, 1, 2 * half)
    tuning = _tuning("matvec_qkv", parts[0].format)
    if len(parts) > 1:
        tuning = replace(tuning, split=1)
    if not all(_on_kernel(x, part, norm) for part in parts) or half % (tuning.rows // 2):
        y = mx.concatenate([matvec_reference(x, part, norm) for part in parts], axis=-1) + bias
        q, kv = _turned(y, table, n_heads, tail.shape[1] // 2)
        return q.reshape(shape), put_in_tail(tail, kv, place)
    units = -(-rows // tuning.rows)
    template = (("HEADS", n_heads), ("KV", tail.shape[1] // 2), ("HALF", half), ("TAIL", tail.shape[2]))
    template += (("PAIRS1", parts[0].format.rows // 2),)
    extra = (bias, table, tail, place)
    return tuple(_launch("matvec_qkv", x, parts, norm, extra, template, tuning, units, [shape, tail.shape]))


def put_in_tail(tail: mx.array, kv: mx.array, place: mx.array) -> mx.array:
    """tail with kv (1, 2 n_kv_heads, 1, head_dim) at place[0] - place[1]."""
    here = mx.arange(tail.shape[2]) == place[0] - place[1]
    return mx.where(here[:, None], kv, tail)


def _turned(y: mx.array, table: mx.array, n_heads: int, n_kv_heads: int) -> tuple[mx.array, mx.array]:
    y = y.reshape(1, -1, 1, 2, table.shape[0])
    wide = mx.float64 if mx.default_device() == mx.cpu else mx.float32
    cos, sin = (table[:, i].astype(wide) + table[:, i + 1].astype(wide) for i in (0, 2))
    a, b = (y[:, : n_heads + n_kv_heads, :, i].astype(wide) for i in (0, 1))
    turned = mx.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).astype(y.dtype)
    both = mx.concatenate([turned, y[:, n_heads + n_kv_heads :]], axis=1).reshape(1, y.shape[1], 1, -1)
    return both[:, :n_heads], both[:, n_heads:]


def matvec_reference(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None = None) -> mx.array:
    """matvec in MLX's own operations, without the residual."""
    y = x.reshape(1, 1, -1)
    if norm is not None:
        y = rms_norm(y, *norm)
    form = matrix.format
    if form.kind == "affine":
        wide = (array.astype(mx.float32) for array in matrix.arrays[1:])
        packing = {"group_size": form.group_size, "bits": form.bits}
        return mx.quantized_matmul(y.astype(mx.float32), matrix.arrays[0], *wide, **packing).astype(x.dtype)
    return (y.astype(mx.float32) @ unpack_reference(matrix, mx.float32).T).astype(x.dtype)


def rotation_table(offset: mx.array, rotary: Rotary) -> mx.array:
    """Cosine and sine of every pair's angle at position `offset`, each as a sum of two floats.

    offset: int32, the position first. Returns (head_dim / 2, 4) float32: cosine, its rest, sine, its rest. Exact
    to 2^-48; YaRN's attention factor is included. All layers of a step share it.
    """
    half = len(rotary.inv_freq)
    if executor() == "reference":
        return _rotation_table_reference(offset, rotary)
    scale = scale_template(rotary)
    inputs, size = (turns_of(rotary), offset), -(-half // 32) * 32
    return _ROTATION(inputs, [("HALF", half), *scale], (size, 1, 1), (size, 1, 1), [(half, 4)], mx.float32)[0]


def _rotation_table_reference(offset: mx.array, rotary: Rotary) -> mx.array:
    angles = float(offset[0].item()) * np.array(rotary.inv_freq)
    wide = [table(angles) * rotary.attention_factor for table in (np.cos, np.sin)]
    high = [values.astype(np.float32) for values in wide]
    low = [(values - rounded).astype(np.float32) for values, rounded in zip(wide, high)]
    return mx.array(np.stack([high[0], low[0], high[1], low[1]], axis=-1))


def _check(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None) -> None:
    require_float("x", x)
    columns = matrix.format.columns
    require(x.size == columns, lambda: f"x has shape {x.shape}, expected one vector of {columns}.")
    if norm is not None:
        require_like("norm's weight", norm[0], (columns,), x.dtype)


def _on_kernel(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None) -> bool:
    if executor("matvec") == "reference" or not matrix.format.served:
        return False
    dense = matrix.format.kind != "dense" or matrix.arrays[0].dtype == x.dtype
    return dense and (norm is None or x.nbytes <= MAX_STAGED)


def _tuning(name: str, form: Format) -> Tuning:
    """Measured on an H200 (see benchmarks/results/run_h200.json): packed rows share the vector's elements, so more of
    them at once; a long row is shared by simdgroups."""
    long = form.columns >= 8192
    if form.kind == "dense":
        return Tuning(2 if name != "matvec" else 1, 2 if long else 1, 4)
    if name == "matvec_swiglu":
        return Tuning(4, 1, 1)
    return Tuning(2, 4 if long else 1, 1)


def _launch(
    name: str,
    x: mx.array,
    parts: Sequence[Matrix],
    norm: tuple[mx.array, float] | None,
    extra: tuple[mx.array, ...],
    template: tuple[tuple[str, object], ...],
    tuning: Tuning,
    units: int,
    shapes: Sequence[tuple[int, ...]],
) -> list[mx.array]:
    weight, eps = (x, 0.0) if norm is None else norm
    groups = min(-(-units // (tuning.threads // 32 // tuning.split)), tuning.groups)
    template = (
        *template,
        *(("K", x.size), ("R", tuning.rows), ("SPLIT", tuning.split), ("DEPTH", tuning.depth)),
        *(("THREADS", tuning.threads), ("GROUPS", groups), ("EPS", float_bits(eps))),
    )
    for part, number in zip(parts, ("", "2")):
        template += ((f"BITS{number}", part.format.bits or 4), (f"GROUP{number}", part.format.group_size or 32))
    grid = (groups * tuning.threads, 1, 1)
    inputs = (x, weight, *(array for part in parts for array in part.arrays), *extra)
    return _kernel(name, tuple(part.format.kind for part in parts))(
        inputs, template, grid, (tuning.threads, 1, 1), shapes
    )
