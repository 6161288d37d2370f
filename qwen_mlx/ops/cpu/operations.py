"""The operations of ops on a CPU: as their namesakes there, which have checked the arguments, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ...backend import mx
from ..matrix import Matrix
from . import kernels, matrices
from .arrays import Output, elements, later
from .replay import current, perform

supports = matrices.supports
_NOTHING, _NO_ELEMENTS = np.empty((0, 0), np.float32), np.empty(0, np.float32)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """ops.rms_norm."""
    out = Output(*x.shape)
    _norm(elements(x), _NOTHING, weight, eps, _NOTHING, out.values)
    return out.array()


def add_rms_norm(x: mx.array, residual: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """ops.add_rms_norm."""
    h, y = Output(*x.shape), Output(*x.shape)
    _norm(elements(x), elements(residual), weight, eps, h.values, y.values)
    return h.array(), y.array()


def _norm(x: np.ndarray, residual: np.ndarray, weight: mx.array, eps: float, h: np.ndarray, y: np.ndarray) -> None:
    arrays = (array.reshape(-1, x.shape[-1]) if array.size else _NOTHING for array in (x, residual, h, y))
    x, residual, h, y = arrays
    perform(partial(kernels.rms_norm, x, residual, elements(weight), eps, h if residual.size else x, y))


def qkv_rope(
    qkv: mx.array, bias: mx.array | None, table: mx.array, n_heads: int, n_kv_heads: int
) -> tuple[mx.array, mx.array]:
    """ops.qkv_rope."""
    batch, length, width = qkv.shape
    head_dim = width // (n_heads + 2 * n_kv_heads)
    q, kv = Output(batch, length, n_heads, head_dim), Output(batch, length, 2, n_kv_heads, head_dim)
    n_rotated = n_heads + n_kv_heads
    perform(_qkv_rope(elements(qkv).reshape(-1, width), bias, elements(table), n_rotated, q.values, kv.values))
    return q.array(), kv.array()


def _qkv_rope(
    qkv: np.ndarray, bias: mx.array | None, table: np.ndarray, n_rotated: int, q: np.ndarray, kv: np.ndarray
) -> Callable[[], None]:
    half, n_tokens = table.shape[-2], len(qkv)
    added = np.zeros(qkv.shape[1], np.float32) if bias is None else elements(bias)
    q, kv = q.reshape(n_tokens, -1), kv.reshape(n_tokens, -1)
    return partial(kernels.qkv_rope, qkv, added, table.reshape(-1, half, 2), q.shape[1] // (2 * half), n_rotated, q, kv)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """ops.swiglu without biases."""
    out, width = Output(*gate.shape), gate.shape[-1]
    arrays = (array.reshape(-1, width) for array in (elements(gate), elements(up), out.values))
    perform(partial(kernels.swiglu, *arrays))
    return out.array()


def swiglu_joined(gate_up: mx.array) -> mx.array:
    """ops.swiglu_joined without a bias."""
    width = gate_up.shape[-1] // 2
    both, out = elements(gate_up).reshape(-1, 2, width), Output(*gate_up.shape[:-1], width)
    perform(partial(kernels.swiglu, both[:, 0], both[:, 1], out.values.reshape(-1, width)))
    return out.array()


def multiply_all(x: mx.array, pieces: Sequence[Matrix]) -> mx.array:
    """ops.multiply_all."""
    rows = [matrix.rows for matrix in pieces]
    out = Output(*x.shape[:-1], sum(rows))
    vectors, products = elements(x).reshape(-1, x.shape[-1]), out.values.reshape(-1, sum(rows))
    for i, matrix in enumerate(pieces):
        perform(matrices.products(vectors, matrix, products, sum(rows[:i])))
    return out.array()


def multiply_transposed(y: mx.array, matrix: Matrix) -> mx.array:
    """y W for y (..., rows): what a product's gradient is multiplied by."""
    out = Output(*y.shape[:-1], matrix.columns)
    shape = out.values.reshape(-1, matrix.columns)
    matrices.transposed_product(elements(y).reshape(-1, matrix.rows), matrix, shape)
    return out.array()


def matmul(x: mx.array, w: mx.array) -> mx.array:
    """ops.matmul, for a multiple of 8 columns."""
    rows, columns = w.shape
    out = Output(*x.shape[:-1], rows)
    kernels.multiply(elements(w).reshape(-1), elements(x).reshape(-1), columns, out.values.reshape(-1), 0, rows)
    return out.array()


def reshaped(x: mx.array, shape: Sequence[int]) -> mx.array:
    """ops.reshaped."""
    tape, y = current(), x.reshape(shape)
    if tape is not None:
        tape.add(y, tape.values(x).reshape(y.shape))
    return y


def unpack(matrix: Matrix, ids: mx.array | None) -> mx.array:
    """ops.unpack of a packed matrix, or of rows of any."""
    # An id may be -1, where a step is launched ahead on a logit that is not finite.
    rows = np.arange(matrix.rows) if ids is None else elements(ids)
    out = Output(*rows.shape, matrix.columns)
    flat, to = rows.reshape(-1), out.values.reshape(-1, matrix.columns)
    perform(lambda: matrices.unpack(matrix, flat.astype(np.int64) % matrix.rows, to))
    return out.array()


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """ops.attention for a head_dim that 8 divides."""
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads, tokens = keys.shape[1], keys.shape[2]
    room = -(-tokens // 16) * 16
    padded = np.zeros((2, batch, n_kv_heads, room * head_dim), np.float32)
    padded[0].reshape(batch, n_kv_heads, room, head_dim)[:, :, :tokens] = np.asarray(keys)
    padded[1].reshape(batch, n_kv_heads, head_dim, room)[..., :tokens] = np.asarray(values).swapaxes(2, 3)
    masked = isinstance(mask, mx.array)
    seen = np.empty((1, 0, tokens), np.uint8)
    if masked:
        seen = np.ascontiguousarray(np.asarray(mask), np.uint8).reshape(-1, length, tokens)
    out = Output(*q.shape)
    shape = (batch, length, n_heads, n_kv_heads, head_dim, room)
    flat = (array.reshape(-1) for array in (elements(q), padded[0], padded[1]))
    kernels.attention(shape, *flat, seen, masked, isinstance(mask, str), np.float32(scale), out.values.reshape(-1))
    return out.array()


def best_token(logits: mx.array) -> mx.array:
    """ops.best_token."""
    values = elements(logits)
    finite = np.isfinite(values.sum(axis=-1))
    return mx.array(np.where(finite, values.argmax(axis=-1), -1).astype(np.int32))


# ---------------------------------------------------------------------------------------------------------------------
# One token


def matvec(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float] | None, residual: mx.array | None) -> mx.array:
    """ops.matvec."""
    out = Output(1, 1, matrix.rows)
    added = _NO_ELEMENTS if residual is None else elements(residual).reshape(-1)
    _multiply_one(elements(x).reshape(-1), matrix, _norm_of(norm), added, out.values[0, 0])
    return out.array()


def matvec_swiglu(x: mx.array, matrix: Matrix, norm: tuple[mx.array, float]) -> mx.array:
    """ops.matvec_swiglu."""
    both, out = np.empty((2, 1, matrix.rows // 2), np.float32), Output(1, 1, matrix.rows // 2)
    _multiply_one(elements(x).reshape(-1), matrix, _norm_of(norm), _NO_ELEMENTS, both.reshape(-1))
    perform(partial(kernels.swiglu, both[0], both[1], out.values[0]))
    return out.array()


def matvec_qkv(
    x: mx.array,
    pieces: Sequence[Matrix],
    bias: mx.array,
    norm: tuple[mx.array, float],
    table: mx.array,
    recent_kv: mx.array,
    position: mx.array,
    n_heads: int,
) -> tuple[mx.array, mx.array]:
    """ops.matvec_qkv."""
    vector, weight, start = elements(x).reshape(-1), _norm_of(norm), 0
    qkv = np.empty((1, sum(matrix.rows for matrix in pieces)), np.float32)
    for matrix in pieces:
        _multiply_one(vector, matrix, weight, _NO_ELEMENTS, qkv[0, start : start + matrix.rows])
        start += matrix.rows
    heads, head_dim = recent_kv.shape[1], recent_kv.shape[3]
    q, kv = Output(1, n_heads, 1, head_dim), np.empty((1, heads, 1, head_dim), np.float32)
    perform(_qkv_rope(qkv, bias, elements(table), n_heads + heads // 2, q.values, kv))
    return q.array(), _put_recent(recent_kv, kv, position)


def put_recent(recent_kv: mx.array, kv: mx.array, position: mx.array) -> mx.array:
    """ops.put_recent."""
    return _put_recent(recent_kv, elements(kv), position)


def _put_recent(recent_kv: mx.array, kv: np.ndarray, position: mx.array) -> mx.array:
    out, older, at = Output(*recent_kv.shape), later(recent_kv), elements(position)

    def put() -> None:
        out.values[...] = older()  # a copy: the caller may go back to the old one
        out.values[:, :, at[0] - at[1]] = kv[:, :, 0]

    perform(put)
    return out.array()


def decode_attention(
    q: mx.array,
    kv: mx.array,
    recent_kv: mx.array,
    position: mx.array,
    scale: float,
    window: int | None,
    first: mx.array | None,
) -> mx.array:
    """ops.decode_attention for a head_dim that 16 divides."""
    n_rows, n_heads, _, head_dim = q.shape
    shape, float_scale, out = (n_rows, n_heads, kv.shape[1] // 2, head_dim), np.float32(scale), Output(*q.shape)
    queries, older, recent, at = elements(q).reshape(-1), later(kv), later(recent_kv), elements(position)
    firsts = np.zeros(n_rows, np.int64) if first is None else elements(first)

    def attend() -> None:
        newest, buffered = int(at[0]), int(at[1])
        starts = firsts.astype(np.int64) if window is None else np.maximum(firsts, newest + 1 - window).astype(np.int64)
        n_chunks = -(-(newest + 1) // kernels.CHUNK)
        parts = np.empty((n_rows * n_heads, n_chunks, head_dim), np.float32)
        stats = np.empty((n_rows * n_heads, n_chunks, 2), np.float32)
        arrays = queries, older().reshape(-1), recent().reshape(-1)
        kernels.decode_attention(shape, *arrays, buffered, newest + 1, starts, float_scale, parts.reshape(-1), stats)
        if n_chunks > 1:
            shares = np.exp(stats[:, :, 0] - stats[:, :, 0].max(axis=1, keepdims=True))
            parts *= shares[:, :, None]
            stats[:, :, 1] *= shares
        sums = stats[:, :, 1].sum(axis=1, keepdims=True)
        np.divide(parts.sum(axis=1), sums, out=out.values.reshape(-1, head_dim))

    perform(attend)
    return out.array()


def _norm_of(norm: tuple[mx.array, float] | None) -> tuple[np.ndarray, float]:
    return (_NO_ELEMENTS, 0.0) if norm is None else (elements(norm[0]), norm[1])


def _multiply_one(
    x: np.ndarray, matrix: Matrix, norm: tuple[np.ndarray, float], residual: np.ndarray, out: np.ndarray
) -> None:
    """matrices.one_product, with what an adapter makes of the matrix."""
    if matrix.low_rank is None:
        perform(matrices.one_product(x, matrix, norm, residual, out))
        return
    (a, b), row_scale = matrix.low_rank.factors, matrix.low_rank.row_scale
    small = np.empty(a.rows, np.float32)
    perform(matrices.one_product(x, a, norm, _NO_ELEMENTS, small))
    perform(matrices.one_product(x, matrix, norm, residual if row_scale is None else _NO_ELEMENTS, out))
    if row_scale is not None:
        perform(partial(np.multiply, out, elements(row_scale), out))
        if residual.size:
            perform(partial(np.add, out, residual, out))
    if supports(b):
        perform(matrices.one_product(small, b, (_NO_ELEMENTS, 0.0), out, out))
    else:
        columns = elements(b.arrays[0])
        perform(lambda: np.add(out, columns @ small, out))
