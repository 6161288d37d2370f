"""Key/value caches of many prompts at once: rows of one batch, padded on the left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from .. import ops
from ..backend import in_gpu_memory, mx
from .cache import KVCache

T = TypeVar("T")


class Padding:
    """How many columns on the left of each row hold nothing; shared by all layers of a batch, as are the masks that
    follow from it. `array`: the same, int32 (B,)."""

    def __init__(self, columns: Sequence[int] | np.ndarray) -> None:
        self.columns = np.array(columns, np.int32)
        self.array = in_gpu_memory(self.columns)
        self._made: dict[str, tuple[object, Any]] = {}

    def positions(self, width: int) -> np.ndarray:
        """Each row's position in column `width`, int32 (B,); negative within the padding."""
        return width - self.columns

    def mask(self, width: int, length: int, sliding_window: int | None) -> mx.array | str | None:
        """Which of width + length columns the queries in the last `length` see, bool (B, 1, length, columns): as
        attention_mask, none of the padding, and themselves, because a query that sees nothing would be NaN."""
        return self._once(f"mask {sliding_window}", (width, length), lambda: self._mask(width, length, sliding_window))

    def _mask(self, width: int, length: int, window: int | None) -> mx.array | str | None:
        if not self.columns.any() and (window is None or width + length <= window):
            return "causal" if length > 1 else None
        queries, keys = mx.arange(width, width + length)[:, None], mx.arange(width + length)
        seen = (keys <= queries) & (keys >= self.array[:, None, None, None])
        if window is not None:
            seen &= keys > queries - window
        return seen | (keys == queries)

    def _once(self, name: str, key: object, make: Callable[[], T]) -> T:
        if self._made.get(name, (None,))[0] != key:
            self._made[name] = key, make()
        made: T = self._made[name][1]
        return made


class BatchKVCache(KVCache):
    """A layer's keys and values of rows that are padded on the left; `offset` counts columns, padding included."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    @property
    def positions(self) -> np.ndarray:
        """Each row's next position, int32 (B,)."""
        return self.padding.positions(self.offset)

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """As KVCache.attend."""
        mask = self.padding.mask(self.offset, q.shape[1], sliding_window)
        keys, values = self.update(kv)
        return ops.attention(q, keys, values, scale, mask)


def select(cache: Sequence[BatchKVCache], rows: Sequence[int]) -> list[BatchKVCache]:
    """Caches of some rows, without the columns in which all of them hold nothing."""
    columns = cache[0].padding.columns[list(rows)]
    cut = int(columns.min())
    padding, index = Padding(columns - cut), mx.array(list(rows), mx.int32)
    return [_of(padding, mx.take(_columns(layer)[:, :, cut:], index, axis=0)) for layer in cache]


def join(first: Sequence[BatchKVCache], second: Sequence[BatchKVCache]) -> list[BatchKVCache]:
    """Caches of the rows of both, one below the other."""
    widths = [caches[0].held for caches in (first, second)]
    more = [max(widths) - width for width in widths]
    padding = Padding(np.concatenate([c[0].padding.columns + m for c, m in zip((first, second), more)]))
    pads = [[(0, 0), (0, 0), (m, 0), (0, 0)] for m in more]
    return [
        _of(padding, mx.concatenate([mx.pad(_columns(layer), pad) for layer, pad in zip(pair, pads)]))
        for pair in zip(first, second)
    ]


def _columns(layer: BatchKVCache) -> mx.array:
    """What is held, (B, 2 n_kv_heads, columns, head_dim)."""
    return layer.arrays[0][:, :, : layer.held]


def _of(padding: Padding, buffer: mx.array) -> BatchKVCache:
    """Evaluated layer by layer, so that two copies of one layer is all there ever is."""
    made = BatchKVCache(padding)
    made.fill(buffer)
    mx.eval(made.arrays)
    return made
