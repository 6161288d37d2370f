"""The compiled functions of one token's step and of a prompt's passes, on NumPy's float32 arrays.

Loops over rows run on numba's threads. Sums are in float32, those of a norm in float64.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from numba.core.errors import NumbaError

from ...errors import QwenMLXError
from . import replay, threads
from .packings import add_products, store_values
from .vectors import (
    exp16,
    floats8,
    floats16,
    fma,
    largest16,
    maximum16,
    minus16,
    no_sums,
    plus16,
    silu16,
    store,
    times16,
    total,
    zeros8,
    zeros16,
)

TILE = 1 << 16  # weights, 256 KiB, that a core's own cache holds
HEIGHT = 64  # rows of a strip that a thread unpacks at a time, for a product with their transpose
QUERIES = 48  # tokens whose scores a thread computes at a time
CHUNK = 256  # tokens of the cache that a thread attends to at a time

# numba would look for more to run on threads: it compiles twice as long.
_OTHERS = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
_PRANGE_ALONE = {"prange": True, **dict.fromkeys(_OTHERS, False)}
_uint, _f32 = np.uintp, np.float32


_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()
_dispatchers: list[Any] = []


def compilations() -> int:
    """The number of functions that were compiled in this process, and not read from disk."""
    return sum(sum(compiled.stats.cache_misses.values()) for compiled in _dispatchers)


def are_kept() -> bool:
    """True if compiled functions are written to the disk, for later processes."""
    return all(compiled.stats.cache_path for compiled in _dispatchers)


def _serial(function: Callable[..., Any]) -> Any:
    """Compiles a function that others of this file call."""
    return njit(error_model="numpy")(function)


def _compiled(function: Callable[..., Any]) -> Callable[..., None]:
    """Compiles a function on its first call, or reads it from numba's cache on disk where there is a place for one."""
    options: dict[str, Any] = {"parallel": _PRANGE_ALONE, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
        # numba looks at this file's date alone, which says nothing about the files that it imports.
        compiled._cache._cache_file._source_stamp = _SOURCES
    except RuntimeError:  # neither this folder nor the user's is writable
        compiled = njit(**options)(function)

    _dispatchers.append(compiled)

    @functools.wraps(function)
    def call(*arguments: Any) -> None:
        if replay.current() is not None:  # its results would be the first call's for ever
            raise replay.Unknown
        try:
            threads.limit()
            compiled(*arguments)
        except (NumbaError, OSError, RuntimeError, ValueError) as error:
            raise QwenMLXError(
                f"numba cannot compile or run the CPU's {function.__name__} ({str(error).splitlines()[0]}); unset the "
                "NUMBA_* variables, or switch these functions off with QWEN_MLX_KERNELS=off."
            ) from error

    return call


@_serial
def _norm_factor(x: np.ndarray, eps: float) -> np.float32:
    """1 / rms(x)."""
    squares = 0.0
    for value in x:
        squares += np.float64(value * value)
    return _f32(1 / math.sqrt(squares / x.size + eps))


@_serial
def ordered(x: np.ndarray, weight: np.ndarray, eps: float, by_words: bool) -> tuple[np.ndarray, np.ndarray]:
    """norm(x), and the sums of each 32 of its elements. norm: RMSNorm, or nothing where the weight has 0 elements.

    `by_words` it is 2^-24 times as large, and each 32 are four times 8: elements 0, 4, ..., then 1, 5, ... and so on.
    """
    order, totals = np.empty_like(x), np.empty(x.size // 32, np.float32)
    factor = _norm_factor(x, eps) if weight.size > 0 else _f32(1)
    for g in range(totals.size):
        whole = 0.0
        for i in range(32):
            value = x[32 * g + i]
            if weight.size > 0:
                value = value * factor * weight[32 * g + i]
            whole += np.float64(value)
            if by_words:
                order[32 * g + i % 4 * 8 + i // 4] = value * _f32(2.0**-24)
            else:
                order[32 * g + i] = value
        totals[g] = whole
    return order, totals


@_compiled
def multiply_one(
    matrix: Any,
    groups_of_block: int,
    by_words: bool,
    x: np.ndarray,
    weight: np.ndarray,
    eps: float,
    residual: np.ndarray,
    out: np.ndarray,
) -> None:
    """out (rows,) = W norm(x) + residual for W (rows, columns), which is read as it lies, x (columns,).

    norm: RMSNorm with a weight (columns,) and eps, or without one (0 elements) none; so with the residual (rows,).
    """
    order, totals = ordered(x, weight, eps, by_words)
    blocks = _uint(totals.size // groups_of_block)
    for row in prange(out.size):
        first, sums = _uint(row) * blocks, no_sums()
        for block in range(blocks):
            sums = add_products(matrix, first + block, block, order, totals, sums)
        out[row] = total(sums) + residual[row] if residual.size > 0 else total(sums)


@_serial
def _products(
    w: np.ndarray,
    w_start: int,
    w_stride: int,
    n_rows: int,
    x: np.ndarray,
    x_start: int,
    x_stride: int,
    n_vectors: int,
    columns: int,
    out: np.ndarray,
    out_start: int,
    out_stride: int,
) -> None:
    """out (n_vectors, n_rows) = x w^T on flat arrays, rows of `columns` elements, a multiple of 8, at their strides.

    Four rows of w are multiplied by three of x at a time, whose sums fit in registers; what is too much for the last of
    them is computed twice.
    """
    for b0 in range(0, n_vectors, 3):
        b1, b2 = min(b0 + 1, n_vectors - 1), min(b0 + 2, n_vectors - 1)
        x0, x1, x2 = (_uint(x_start + b0 * x_stride), _uint(x_start + b1 * x_stride), _uint(x_start + b2 * x_stride))
        o0, o1, o2 = out_start + b0 * out_stride, out_start + b1 * out_stride, out_start + b2 * out_stride
        for r0 in range(0, n_rows, 4):
            r1, r2, r3 = min(r0 + 1, n_rows - 1), min(r0 + 2, n_rows - 1), min(r0 + 3, n_rows - 1)
            w0, w1 = _uint(w_start + r0 * w_stride), _uint(w_start + r1 * w_stride)
            w2, w3 = _uint(w_start + r2 * w_stride), _uint(w_start + r3 * w_stride)
            s00 = s01 = s02 = s10 = s11 = s12 = s20 = s21 = s22 = s30 = s31 = s32 = zeros8()
            for k in range(_uint(columns // 8)):
                at = k * _uint(8)
                v0, v1, v2 = floats8(x, x0 + at), floats8(x, x1 + at), floats8(x, x2 + at)
                u = floats8(w, w0 + at)
                s00, s01, s02 = fma(u, v0, s00), fma(u, v1, s01), fma(u, v2, s02)
                u = floats8(w, w1 + at)
                s10, s11, s12 = fma(u, v0, s10), fma(u, v1, s11), fma(u, v2, s12)
                u = floats8(w, w2 + at)
                s20, s21, s22 = fma(u, v0, s20), fma(u, v1, s21), fma(u, v2, s22)
                u = floats8(w, w3 + at)
                s30, s31, s32 = fma(u, v0, s30), fma(u, v1, s31), fma(u, v2, s32)
            out[o0 + r0], out[o1 + r0], out[o2 + r0] = total(s00), total(s01), total(s02)
            out[o0 + r1], out[o1 + r1], out[o2 + r1] = total(s10), total(s11), total(s12)
            out[o0 + r2], out[o1 + r2], out[o2 + r2] = total(s20), total(s21), total(s22)
            out[o0 + r3], out[o1 + r3], out[o2 + r3] = total(s30), total(s31), total(s32)


@_serial
def _tile_height(columns: int) -> int:
    """Rows of so many columns, a multiple of 4, that a core's cache holds."""
    return max(4, min(64, TILE // columns // 4 * 4))


@_compiled
def multiply(w: np.ndarray, x: np.ndarray, columns: int, out: np.ndarray, start: int, width: int) -> None:
    """Columns of out (B, width) from `start` on = x w^T for w (n, columns) and x (B, columns), flat. A thread takes a
    tile of w."""
    n_rows, n_vectors, height = w.size // columns, x.size // columns, _tile_height(columns)
    for t in prange(-(-n_rows // height)):
        first = t * height
        rows = min(height, n_rows - first)
        _products(w, first * columns, columns, rows, x, 0, columns, n_vectors, columns, out, start + first, width)


@_compiled
def multiply_packed(
    matrix: Any, n_rows: int, blocks: int, x: np.ndarray, columns: int, out: np.ndarray, start: int, width: int
) -> None:
    """As multiply for a packed matrix of so many rows and blocks a row. A thread unpacks a tile and multiplies it while
    it lies in its core's cache."""
    n_vectors, height = x.size // columns, _tile_height(columns)
    for t in prange(-(-n_rows // height)):
        first = t * height
        rows = min(height, n_rows - first)
        w = np.empty(height * columns, np.float32)
        for block in range(_uint(rows * blocks)):
            store_values(matrix, _uint(first * blocks) + block, w, block)
        _products(w, 0, columns, rows, x, 0, columns, n_vectors, columns, out, start + first, width)


@_serial
def _add_products(
    y: np.ndarray,
    y_start: int,
    y_stride: int,
    n_vectors: int,
    w: np.ndarray,
    n_rows: int,
    n_columns: int,
    out: np.ndarray,
    out_start: int,
    out_stride: int,
) -> None:
    """out (n_vectors, n_columns) += y w on flat arrays; n_columns is a multiple of 32, between whose rows in w is none.

    As in _products, 32 columns of three vectors at a time; what is too much is computed and stored twice.
    """
    for b0 in range(0, n_vectors, 3):
        b1, b2 = min(b0 + 1, n_vectors - 1), min(b0 + 2, n_vectors - 1)
        y0, y1, y2 = _uint(y_start + b0 * y_stride), _uint(y_start + b1 * y_stride), _uint(y_start + b2 * y_stride)
        for c in range(0, n_columns, 32):
            o0 = _uint(out_start + b0 * out_stride + c)
            o1, o2 = _uint(out_start + b1 * out_stride + c), _uint(out_start + b2 * out_stride + c)
            i1, i2, i3 = _uint(8), _uint(16), _uint(24)
            s00, s01, s02, s03 = floats8(out, o0), floats8(out, o0 + i1), floats8(out, o0 + i2), floats8(out, o0 + i3)
            s10, s11, s12, s13 = floats8(out, o1), floats8(out, o1 + i1), floats8(out, o1 + i2), floats8(out, o1 + i3)
            s20, s21, s22, s23 = floats8(out, o2), floats8(out, o2 + i1), floats8(out, o2 + i2), floats8(out, o2 + i3)
            at = _uint(c)
            for r in range(_uint(n_rows)):
                v0, v1, v2 = y[y0 + r], y[y1 + r], y[y2 + r]
                u = floats8(w, at)
                s00, s10, s20 = fma(v0, u, s00), fma(v1, u, s10), fma(v2, u, s20)
                u = floats8(w, at + i1)
                s01, s11, s21 = fma(v0, u, s01), fma(v1, u, s11), fma(v2, u, s21)
                u = floats8(w, at + i2)
                s02, s12, s22 = fma(v0, u, s02), fma(v1, u, s12), fma(v2, u, s22)
                u = floats8(w, at + i3)
                s03, s13, s23 = fma(v0, u, s03), fma(v1, u, s13), fma(v2, u, s23)
                at += _uint(n_columns)
            store(out, o0, s00), store(out, o0 + i1, s01), store(out, o0 + i2, s02), store(out, o0 + i3, s03)
            store(out, o1, s10), store(out, o1 + i1, s11), store(out, o1 + i2, s12), store(out, o1 + i3, s13)
            store(out, o2, s20), store(out, o2 + i1, s21), store(out, o2 + i2, s22), store(out, o2 + i3, s23)


@_compiled
def multiply_transposed(
    matrix: Any, n_rows: int, blocks: int, columns: int, y: np.ndarray, strip: int, out: np.ndarray
) -> None:
    """out (B, columns) = y W for W of so many rows, and blocks a row, and y (B, n_rows), flat. A thread takes `strip`
    blocks of every row, and unpacks HEIGHT rows of them at a time."""
    n_vectors, width = y.size // n_rows, columns // blocks
    for t in prange(-(-blocks // strip)):
        first, count = t * strip, min(strip, blocks - t * strip)
        for b in range(n_vectors):
            out[b * columns + first * width : b * columns + (first + count) * width] = 0
        w = np.empty(HEIGHT * strip * width, np.float32)
        for row in range(0, n_rows, HEIGHT):
            rows = min(HEIGHT, n_rows - row)
            for r in range(rows):
                for i in range(count):
                    store_values(matrix, _uint((row + r) * blocks + first + i), w, _uint(r * count + i))
            _add_products(y, row, n_rows, n_vectors, w, rows, count * width, out, first * width, columns)


@_serial
def _exponentials(scores: np.ndarray, start: int, count: int, scale: np.float32) -> tuple[np.float32, np.float32]:
    """Makes `count` scores, a multiple of 16, e^(scale (score - the largest)). Returns the largest and the sum."""
    largest, sums = floats16(scores, start), zeros16()
    for t in range(start + 16, start + count, 16):
        largest = maximum16(largest, floats16(scores, t))
    most = largest16(largest)
    for t in range(start, start + count, 16):
        power = exp16(times16(scale, minus16(floats16(scores, t), most)))
        store(scores, t, power)
        sums = plus16(sums, power)
    return most, total(sums)


@_compiled
def attention(
    shape: tuple[int, int, int, int, int, int],
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    masked: bool,
    causal: bool,
    scale: np.float32,
    out: np.ndarray,
) -> None:
    """softmax(scale q k^T + mask) v of many tokens.

    shape: (B, L, n_heads, n_kv_heads, head_dim, S), S a multiple of 16; q and out (B, L, n_heads, head_dim), keys
    (B, n_kv_heads, S, head_dim), values (B, n_kv_heads, head_dim, S), flat; mask: uint8 (1 or B, L, tokens), 0 where a
    key is not seen; of `causal` ones the last L of `tokens` belong to the queries. A thread takes QUERIES tokens of a
    head.
    """
    n_rows, length, n_heads, n_kv_heads, head_dim, room = shape
    n_blocks, tokens, stride = -(-length // QUERIES), mask.shape[2], n_heads * head_dim
    for task in prange(n_rows * n_heads * n_blocks):
        block, head, b = task % n_blocks, task // n_blocks % n_heads, task // (n_blocks * n_heads)
        start = block * QUERIES
        count = min(QUERIES, length - start)
        seen = tokens - length + start + count if causal else tokens
        at = (b * n_kv_heads + head // (n_heads // n_kv_heads)) * room * head_dim
        first, padded = (b * length + start) * stride + head * head_dim, -(-seen // 16) * 16
        scores = np.empty(QUERIES * room, np.float32)
        _products(keys, at, head_dim, seen, q, first, stride, count, head_dim, scores, 0, room)
        for i in range(count):
            row, limit = i * room, seen - count + 1 + i if causal else seen
            for t in range(limit, padded):
                scores[row + t] = -np.inf
            if masked:
                for t in range(limit):
                    if not mask[b % mask.shape[0], start + i, t]:
                        scores[row + t] = -np.inf
            _, whole = _exponentials(scores, row, padded, scale)
            for t in range(row, row + padded, 16):
                store(scores, t, times16(_f32(1) / whole, floats16(scores, t)))
        _products(values, at, room, head_dim, scores, 0, room, count, padded, out, first, stride)


@_compiled
def unpack(matrix: Any, blocks: int, rows: np.ndarray, out: np.ndarray) -> None:
    """out (len(rows) columns,): the values of a packed matrix's rows of so many blocks."""
    for i in prange(rows.size):
        first, to = _uint(rows[i]) * _uint(blocks), _uint(i) * _uint(blocks)
        for block in range(_uint(blocks)):
            store_values(matrix, first + block, out, to + block)


@_compiled
def rms_norm(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, eps: float, h: np.ndarray, y: np.ndarray) -> None:
    """h = x + residual, y = h / rms(h) * weight, all (rows, D); without a residual (0 rows) h is x."""
    for r in prange(x.shape[0]):
        if residual.shape[0] > 0:
            for i in range(weight.size):
                h[r, i] = x[r, i] + residual[r, i]
        factor = _norm_factor(h[r], eps)
        for i in range(weight.size):
            y[r, i] = h[r, i] * factor * weight[i]


@_compiled
def qkv_rope(
    qkv: np.ndarray, bias: np.ndarray, table: np.ndarray, n_heads: int, n_rotated: int, q: np.ndarray, kv: np.ndarray
) -> None:
    """Splits qkv (tokens, heads D) + bias into q (tokens, n_heads D) and kv (tokens, the rest); the first n_rotated
    heads are turned by the table (tokens of one row or of all, D / 2, 2)."""
    half, n_angles = table.shape[1], table.shape[0]
    width = n_heads * 2 * half
    for t in prange(qkv.shape[0]):
        for head in range(qkv.shape[1] // (2 * half)):
            for i in range(half):
                at = head * 2 * half + i
                a, b = qkv[t, at] + bias[at], qkv[t, at + half] + bias[at + half]
                if head < n_rotated:
                    cos, sin = table[t % n_angles, i, 0], table[t % n_angles, i, 1]
                    a, b = a * cos - b * sin, b * cos + a * sin
                if head < n_heads:
                    q[t, at], q[t, at + half] = a, b
                else:
                    kv[t, at - width], kv[t, at + half - width] = a, b


@_compiled
def swiglu(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out = silu(gate) up, all (rows, F)."""
    width = out.shape[1]
    for r in prange(out.shape[0]):
        for i in range(0, width // 16 * 16, 16):
            store(out[r], i, times16(silu16(floats16(gate[r], i)), floats16(up[r], i)))
        for i in range(width // 16 * 16, width):
            x = gate[r, i]
            out[r, i] = x / (_f32(1) + math.exp(-x)) * up[r, i]


@_compiled
def decode_attention(
    shape: tuple[int, int, int, int],
    q: np.ndarray,
    kv: np.ndarray,
    recent: np.ndarray,
    buffered: int,
    tokens: int,
    first: np.ndarray,
    scale: np.float32,
    parts: np.ndarray,
    stats: np.ndarray,
) -> None:
    """softmax(scale q k^T) v of one token a row, in parts of CHUNK tokens: of `buffered` ones in kv and of those after
    them in recent, from first[b] on up to `tokens`.

    shape: (B, n_heads, n_kv_heads, head_dim), head_dim a multiple of 16; q, kv, recent: ops.decode_attention's, flat.
    parts (B n_heads, chunks, head_dim), flat: sums of values by e^(score - largest); stats (B n_heads, chunks, 2): the
    largest score, and the sum of the weights. A thread takes a chunk for all query heads that share its keys.
    """
    n_rows, n_heads, n_kv_heads, head_dim = shape
    room = kv.size // (2 * n_rows * n_kv_heads * head_dim)
    slots = recent.size // (2 * n_rows * n_kv_heads * head_dim)
    ratio, n_chunks = n_heads // n_kv_heads, stats.shape[1]
    for task in prange(n_rows * n_kv_heads * n_chunks):
        which, chunk = task // n_chunks, task % n_chunks
        b, head = which // n_kv_heads, which % n_kv_heads
        start, stop = max(chunk * CHUNK, first[b]), min((chunk + 1) * CHUNK, tokens)
        middle = min(max(buffered, start), stop)
        old_keys, new_keys = (2 * b * n_kv_heads + head) * room, (2 * b * n_kv_heads + head) * slots - buffered
        old_values, new_values = old_keys + n_kv_heads * room, new_keys + n_kv_heads * slots
        weights = np.empty(CHUNK, np.float32)
        for i in range(ratio):
            row = b * n_heads + head * ratio + i
            for t in range(start, stop):
                sums = zeros16()
                for d in range(0, head_dim, 16):
                    if t < buffered:
                        key = floats16(kv, (old_keys + t) * head_dim + d)
                    else:
                        key = floats16(recent, (new_keys + t) * head_dim + d)
                    sums = fma(floats16(q, row * head_dim + d), key, sums)
                weights[t - start] = total(sums)
            count = max(16, -(-(stop - start) // 16) * 16)
            for t in range(max(stop - start, 0), count):
                weights[t] = -np.inf
            if start < stop:
                largest, whole = _exponentials(weights, 0, count, scale)
            else:  # the row sees nothing of this chunk
                largest, whole = _f32(-np.inf), _f32(0)
            stats[row, chunk, 0], stats[row, chunk, 1] = largest * scale, whole
            for d in range(0, head_dim, 16):
                sums = zeros16()
                for t in range(start, middle):
                    sums = fma(weights[t - start], floats16(kv, (old_values + t) * head_dim + d), sums)
                for t in range(middle, stop):
                    sums = fma(weights[t - start], floats16(recent, (new_values + t) * head_dim + d), sums)
                store(parts, (row * n_chunks + chunk) * head_dim + d, sums)
