"""The points of a forward pass that are compared, in the order of computation, and the runs that reach them.

A trace maps keys such as "0.layers.3.gate" (model call, layer, tap) to arrays with the batch on axis 0 and the position
on axis 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qwen_mlx.model.activations import LAYER_TAPS

# Tap: what it holds.
CACHE_TAPS = {
    "cache_k": "keys held after the call, (B, S, K, D)",
    "cache_v": "values held after the call, (B, S, K, D)",
}
TAPS = {
    "embeddings": "token embeddings",
    **LAYER_TAPS,
    "norm": "final RMSNorm",
    "logits": "logits, (B, L, vocabulary)",
    **CACHE_TAPS,
}


def keys_of_call(call: int, n_layers: int) -> list[str]:
    """Every key of one model call, in the order of computation; the cache is read when the call is over."""
    layers = [f"{call}.layers.{i}.{tap}" for i in range(n_layers) for tap in LAYER_TAPS]
    caches = [f"{call}.layers.{i}.{tap}" for i in range(n_layers) for tap in CACHE_TAPS]
    return [f"{call}.embeddings", *layers, f"{call}.norm", f"{call}.logits", *caches]


def split_key(key: str) -> tuple[int, int | None, str]:
    """(call, layer or None, tap) of a key."""
    call, *layer, tap = key.split(".")
    return int(call), int(layer[1]) if layer else None, tap


@dataclass(frozen=True)
class Run:
    """The input of both sides: token ids (all rows of one length) in calls of `chunks` tokens, one cache throughout.

    padding: how many ids on the left of each row are padding, whose activations are not compared; None for no batch.
    """

    name: str
    ids: tuple[tuple[int, ...], ...]
    chunks: tuple[int, ...]
    padding: tuple[int, ...] | None = None

    @classmethod
    def prefill(cls, ids: list[int], name: str = "prefill") -> Run:
        """One call with every token."""
        return cls(name, (tuple(ids),), (len(ids),))

    @classmethod
    def chunked(cls, ids: list[int], size: int, name: str = "chunked") -> Run:
        """Calls of `size` tokens, the last one with what is left."""
        rest = len(ids) % size
        return cls(name, (tuple(ids),), (size,) * (len(ids) // size) + ((rest,) if rest else ()))

    @classmethod
    def decode(cls, ids: list[int], prompt: int, name: str = "decode") -> Run:
        """One call with the first `prompt` tokens, then one call for each of the others."""
        return cls(name, (tuple(ids),), (prompt,) + (1,) * (len(ids) - prompt))

    @classmethod
    def padded(cls, rows: list[list[int]], steps: int, pad: int = 0, name: str = "padded") -> Run:
        """Rows of different lengths as a batch, padded on the left: one call, then one for each of the last `steps`."""
        longest = max(map(len, rows))
        padding = tuple(longest - len(row) for row in rows)
        ids = tuple((pad,) * columns + tuple(row) for columns, row in zip(padding, rows))
        return cls(name, ids, (longest - steps,) + (1,) * steps, padding)

    def calls(self) -> list[list[list[int]]]:
        """The ids of each model call, (B, chunk)."""
        at, found = 0, []
        for size in self.chunks:
            found.append([list(row[at : at + size]) for row in self.ids])
            at += size
        return found

    def positions(self, call: int) -> np.ndarray:
        """Each token's position in its row, (B, chunk); negative within the padding."""
        start = sum(self.chunks[:call])
        columns = np.arange(start, start + self.chunks[call])
        return columns - np.array(self.padding or [0] * len(self.ids))[:, None]

    def valid(self, array: np.ndarray, key: str) -> np.ndarray:
        """A tap without padding: (B, L, ...) as (tokens, ...) where rows are padded, else unchanged."""
        if self.padding is None:
            return array
        call, _, tap = split_key(key)
        start = 0 if tap in CACHE_TAPS else sum(self.chunks[:call])
        return np.concatenate([row[max(0, columns - start) :] for row, columns in zip(array, self.padding)])
