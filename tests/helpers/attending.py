"""Attention on a cache, as the model computes it."""

from __future__ import annotations

from qwen_mlx import ops
from qwen_mlx.backend import mx
from qwen_mlx.model.cache import KVCache


def attend(cache: KVCache, q: mx.array, kv: mx.array, scale: float, window: int | None = None) -> mx.array:
    """The attention (B, L, H, D) of q (B, L, H, D) after kv (B, L, 2, n_kv_heads, D) is put into the cache."""
    mask = cache.mask(q.shape[1], window)
    return ops.attention(q, *cache.update(kv), scale, mask)
