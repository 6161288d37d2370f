"""Grouped-query attention on a key/value cache."""

from __future__ import annotations

import functools

from ..backend import mx
from . import cpu
from .dispatch import differentiable, executor, have_values, recording
from .exponential import exp

SCORES = 1 << 20  # scores at a time on the CPU, where they are written out: 4 MB, and no slower than all at once


def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """softmax(scale q k^T + mask) v, each group of query heads on its key/value head.

    q: (B, L, H, D); keys, values: (B, n_kv_heads, S, D), the newest L last; mask: None, "causal" or bool (L, S) or
    (B, 1, L, S), True where a key is seen. Returns (B, L, H, D) in q.dtype. Rounding: scores and softmax in float32.
    Source: Ainslie et al. 2023, arXiv:2305.13245.
    """
    by_numba = executor("attend") == "cpu" and q.dtype == mx.float32 and q.size and q.shape[3] % 8 == 0
    # With gradients few scores are left to MLX, whose rounding is nearer to PyTorch's; many would take it minutes.
    many = q.size // q.shape[3] * keys.shape[2] > SCORES
    if by_numba and (not recording() or (many and have_values(q, keys, values))):
        native = functools.partial(cpu.attention, scale=scale, mask=mask)
        return differentiable(native, functools.partial(_grouped, scale=scale, mask=mask), q, keys, values)
    if mx.default_device() != mx.cpu:
        return _fused(q, keys, values, scale, mask)
    if q.dtype != mx.float32:  # MLX's own would round the scores there: Qwen2's reach 1285, where bfloat16's step is 8
        wide = q.astype(mx.float32), keys.astype(mx.float32), values.astype(mx.float32)
        return attention(*wide, scale, mask).astype(q.dtype)
    return _in_parts(q, keys, values, scale, mask)


def _in_parts(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """attention in plain MLX on a CPU, of as many queries at a time as SCORES allows."""
    batch, length, n_heads, _ = q.shape
    rows, seen = max(1, SCORES // (batch * n_heads * keys.shape[2])), keys.shape[2]
    if length <= rows:
        return _grouped(q, keys, values, scale, mask)
    out: list[mx.array] = []
    for start in range(0, length, rows):
        part = q[:, start : start + rows]
        if out:  # one slice after the other: MLX would make room for many at once
            part = mx.depends([part], [out[-1]])[0]
        if isinstance(mask, str):  # what comes after the last of these queries is not even read
            end = seen - length + start + part.shape[1]
            out.append(_grouped(part, keys[:, :, :end], values[:, :, :end], scale, mask))
        else:
            part_mask = None if mask is None else mask[..., start : start + rows, :]
            out.append(_grouped(part, keys, values, scale, part_mask))
    return mx.concatenate(out, axis=1)


def _fused(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    out = mx.fast.scaled_dot_product_attention(q.swapaxes(1, 2), keys, values, scale=scale, mask=mask)
    return out.swapaxes(1, 2)


def _grouped(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None) -> mx.array:
    """float32 on the CPU: one product a key/value head, where MLX's own makes one a query head."""
    batch, length, _, head_dim = q.shape
    n_kv_heads, seen = keys.shape[1], keys.shape[2]
    groups = (q * scale).reshape(batch, length, n_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    scores = groups.reshape(batch, n_kv_heads, -1, head_dim) @ keys.swapaxes(2, 3)
    if mask is not None:
        if isinstance(mask, str):
            mask = mx.arange(seen)[None, :] <= mx.arange(seen - length, seen)[:, None]
        mask = mask[:, :, None] if mask.ndim == 4 else mask
        rows = scores.reshape(batch, n_kv_heads, -1, length, seen)
        scores = mx.where(mask, rows, -mx.inf).reshape(scores.shape)
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    out = (weights @ values) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(batch, n_kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4).reshape(q.shape)
