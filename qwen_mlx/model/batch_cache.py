"""Key/value caches of many prompts at once: rows of one batch, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import in_gpu_memory, mx
from .cache import KVCache


class Padding:
    """Number of columns on the left of each row that hold nothing, shared by all layers of a batch.

    columns: int32 (B,); array: the same where kernels read it.
    """

    def __init__(self, columns: Sequence[int] | np.ndarray) -> None:
        self.columns = np.array(columns, np.int32)
        self.array = in_gpu_memory(self.columns)


class BatchKVCache(KVCache):
    """A layer's keys and values of rows that are padded on the left; `offset` counts columns, padding included."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    @property
    def positions(self) -> np.ndarray:
        """Each row's next position, int32 (B,); negative within the padding."""
        return self.offset - self.padding.columns

    def mask(self, length: int, sliding_window: int | None = None) -> mx.array | str | None:
        """The mask as KVCache.mask, bool (B, 1, length, columns) where rows are padded: no query sees the padding, but
        each sees itself, because a query that sees nothing would be NaN.
        """
        width, padding = self.offset, self.padding
        if not padding.columns.any():
            return super().mask(length, sliding_window)
        queries, keys = mx.arange(width, width + length)[:, None], mx.arange(width + length)
        visible = (keys <= queries) & (keys >= padding.array[:, None, None, None])
        if sliding_window is not None:
            visible &= keys > queries - sliding_window
        return visible | (keys == queries)


def select(cache: Sequence[KVCache], rows: Sequence[int]) -> list[KVCache]:
    """Caches of some rows, without the columns in which all of them hold nothing; plain ones if it is a single row."""
    columns = _padding(cache)[list(rows)]
    cut = int(columns.min())
    padding = None if len(rows) == 1 else Padding(columns - cut)
    index = mx.array(list(rows), mx.int32)
    return [_filled(padding, mx.take(_columns(layer)[:, :, cut:], index, axis=0)) for layer in cache]


def join(first: Sequence[KVCache], second: Sequence[KVCache]) -> list[KVCache]:
    """Caches of the rows of both, one below the other; each may be of plain caches."""
    widths = [caches[0].size for caches in (first, second)]
    more = [max(widths) - width for width in widths]
    padding = Padding(np.concatenate([_padding(caches) + m for caches, m in zip((first, second), more)]))
    pads = [[(0, 0), (0, 0), (m, 0), (0, 0)] for m in more]
    return [
        _filled(padding, mx.concatenate([mx.pad(_columns(layer), pad) for layer, pad in zip(pair, pads)]))
        for pair in zip(first, second)
    ]


def _padding(cache: Sequence[KVCache]) -> np.ndarray:
    """Columns on the left of each row that hold nothing, (B,)."""
    layer = cache[0]
    return layer.padding.columns if isinstance(layer, BatchKVCache) else np.zeros(layer.arrays[0].shape[0], np.int32)


def _columns(layer: KVCache) -> mx.array:
    """Everything stored, (B, 2 n_kv_heads, columns, head_dim)."""
    return layer.arrays[0][:, :, : layer.size]


def _filled(padding: Padding | None, buffer: mx.array) -> KVCache:
    """A cache of `buffer`, evaluated at once, so that no more than one layer ever exists twice."""
    cache = KVCache() if padding is None else BatchKVCache(padding)
    cache.fill(buffer)
    mx.eval(cache.arrays)
    return cache
