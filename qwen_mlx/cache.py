"""Key/value cache of one attention layer."""

from __future__ import annotations

from .backend import mx

STEP = 256  # tokens by which the buffers grow, so that most updates write in place


class KVCache:
    """Keys and values seen so far, (B, n_kv_heads, offset, head_dim) in the model's activation dtype.

    `offset` is the number of tokens held, which is also the position of the next one.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (B, n_kv_heads, L, head_dim) and returns everything held, newest last."""
        end = self.offset + keys.shape[2]
        self._keys = _room(self._keys, keys, self.offset, end)
        self._values = _room(self._values, values, self.offset, end)
        self._keys[:, :, self.offset : end] = keys
        self._values[:, :, self.offset : end] = values
        self.offset = end
        return self.state

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Keys and values held, without the spare room. Raises ValueError while the cache is empty."""
        if self._keys is None or self._values is None:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers, spare room included."""
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises ValueError if the cache holds fewer."""
        if not 0 <= n_tokens <= self.offset:
            raise ValueError(f"Cannot trim {n_tokens} tokens from a cache of {self.offset}.")
        self.offset -= n_tokens


def _room(buffer: mx.array | None, new: mx.array, offset: int, end: int) -> mx.array:
    """`buffer` (or an empty one) with room for positions up to `end`."""
    if buffer is not None and end <= buffer.shape[2]:
        return buffer
    batch, heads, _, head_dim = new.shape
    size = -(-end // STEP) * STEP
    spare = mx.zeros((batch, heads, size - offset, head_dim), new.dtype)
    return spare if buffer is None else mx.concatenate([buffer[:, :, :offset], spare], axis=2)
