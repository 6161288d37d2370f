"""Key/value cache of one attention layer."""

from __future__ import annotations

from . import ops
from .backend import mx

STEP = 256  # tokens by which the buffer grows, so that most updates write in place


class KVCache:
    """Keys and values seen so far, in one buffer (B, 2 n_kv_heads, room, head_dim) so that a step writes once.

    `offset` is the number of tokens held, which is also the position of the next one.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._buffer: mx.array | None = None

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """Appends kv (B, L, 2, n_kv_heads, head_dim), rotated, and returns the attention of q (B, L, H, head_dim) on
        all that is held: query i sees keys up to its own, within a sliding window only the last `sliding_window`.
        """
        mask = attention_mask(q.shape[1], self.offset, sliding_window)
        keys, values = self.update(kv)
        return ops.attention(q, keys, values, scale, mask)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values (B, L, 2, n_kv_heads, head_dim), rotated, and returns all held, newest last."""
        batch, length, _, n_kv_heads, head_dim = kv.shape
        new = kv.transpose(0, 2, 3, 1, 4).reshape(batch, 2 * n_kv_heads, length, head_dim)
        end = self.offset + length
        if self._buffer is None or end > self._buffer.shape[2]:
            size = -(-end // STEP) * STEP
            spare = mx.zeros((batch, 2 * n_kv_heads, size - self.offset, head_dim), kv.dtype)
            held = [] if self._buffer is None else [self._buffer[:, :, : self.offset]]
            self._buffer = mx.concatenate([*held, spare], axis=2)
        self._buffer[:, :, self.offset : end] = new
        self.offset = end
        return self.state

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Keys and values held, each (B, n_kv_heads, offset, head_dim). Raises ValueError while the cache is empty."""
        if self._buffer is None:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        n_kv_heads = self._buffer.shape[1] // 2
        return self._buffer[:, :n_kv_heads, : self.offset], self._buffer[:, n_kv_heads:, : self.offset]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, spare room included."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises ValueError if the cache holds fewer."""
        if not 0 <= n_tokens <= self.offset:
            raise ValueError(f"Cannot trim {n_tokens} tokens from a cache of {self.offset}.")
        self.offset -= n_tokens


def attention_mask(length: int, offset: int, sliding_window: int | None) -> mx.array | str | None:
    """The mask of `length` queries whose first position is `offset`: query i sees keys j <= i, and within a sliding
    window only j > i - sliding_window. None where every key is seen, "causal" where MLX's own mask serves.
    """
    if sliding_window is None or offset + length <= sliding_window:
        return "causal" if length > 1 else None
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset + length)[None, :]
    return (keys <= queries) & (keys > queries - sliding_window)
