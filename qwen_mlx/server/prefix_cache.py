"""Keys and values of prompts that were read, shared by all requests and bounded in bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import mx
from ..model.cache import KVCache

SMALLEST = 16  # tokens: reading fewer again costs less than a copy


class PrefixCache:
    """Texts with their keys and values, the longest unused leave first. Another text that begins with the same tokens
    starts from them. Belongs to the thread that computes.

    nbytes: of all entries, at most max_bytes.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._entries: list[tuple[np.ndarray, list[mx.array]]] = []  # ids, and an array a layer; last used last

    def __len__(self) -> int:
        return len(self._entries)

    def longest(self, ids: Sequence[int]) -> list[KVCache] | None:
        """New caches of the longest known beginning of ids, at least one token less than all; None if it is short."""
        text = np.array(ids[:-1], np.int32)
        lengths = [_shared(entry, text) for entry, _ in self._entries]
        length = max(lengths, default=0)
        if length < SMALLEST:
            return None
        # The newest of several, so that the order of use stays meaningful.
        entry = self._entries.pop(len(lengths) - 1 - lengths[::-1].index(length))
        self._entries.append(entry)
        return [_cache_of(array[:, :, :length]) for array in entry[1]]

    def add(self, ids: Sequence[int], layers: Sequence[KVCache]) -> None:
        """Keeps the keys and values of ids, or of as many as the layers hold, unless a known text holds them all. Texts
        that this one continues are dropped, and the longest unused until all fit."""
        length = min(len(ids), *(layer.offset for layer in layers))
        text = np.array(ids[:length], np.int32)
        lengths = [_shared(entry, text) for entry, _ in self._entries]
        if length < SMALLEST or length in lengths:
            return
        kept = [entry for entry, shared in zip(self._entries, lengths) if shared < len(entry[0])]
        self._entries = kept
        arrays = [mx.contiguous(layer.arrays[0][:, :, :length]) for layer in layers]
        size = sum(array.nbytes for array in arrays)
        self.nbytes = sum(_nbytes(entry) for entry in kept)
        while kept and self.nbytes + size > self.max_bytes:
            self.nbytes -= _nbytes(kept.pop(0))
        if size <= self.max_bytes:
            mx.eval(arrays)
            kept.append((text, arrays))
            self.nbytes += size


def _nbytes(entry: tuple[np.ndarray, list[mx.array]]) -> int:
    return sum(array.nbytes for array in entry[1])


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading ids that two texts share."""
    size = min(a.size, b.size)
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size


def _cache_of(buffer: mx.array) -> KVCache:
    cache = KVCache()
    cache.fill(buffer)
    return cache
