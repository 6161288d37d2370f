"""Key/value caches of one attention layer: all that was seen, or sinks and the newest; as floats or quantized.

Caches store. Attention is computed in qwen2.py and fused.py, with the mask that a cache says belongs to its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError

STEP = 256  # tokens: a buffer's length is a multiple of it
BLOCK = 64  # tokens whose quantized keys share a scale
RECENT = 16  # tokens that decoding keeps beside the buffer
GROWTH = 16  # a full buffer grows by a sixteenth: at 128k tokens it is copied 16 times a doubling, not every STEP


class KVCache:
    """Keys and values seen so far, in one buffer (B, 2 n_kv_heads, capacity, head_dim): a token is written once.

    `offset` is the number of tokens seen, which is also the position of the next one.
    """

    trimmable = True  # any number of the newest tokens can be taken back
    max_size: int | None = None  # tokens stored at most
    _step = STEP

    def __init__(self) -> None:
        self.offset = 0
        self._arrays: tuple[mx.array, ...] = ()
        self._recent: mx.array | None = None  # while decoding: tokens from `_n_buffered` on
        self._n_buffered = 0
        self._reserved = 0

    @property
    def positions(self) -> int | np.ndarray:
        """The next token's position; int32 (B,) where the rows differ."""
        return self.offset

    def mask(self, length: int, sliding_window: int | None = None) -> mx.array | str | None:
        """The mask of the next `length` queries on what `update` will return, as ops.attention takes it: query i sees
        keys up to its own, within a sliding window only the last `sliding_window`, its own included.
        """
        return attention_mask(length, self.offset, sliding_window)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values (B, L, 2, n_kv_heads, head_dim), rotated.

        Returns the keys and the values that the L queries attend to, each (B, n_kv_heads, tokens, head_dim), newest
        last.
        """
        end = self.offset + kv.shape[1]
        self._write((heads_first(kv),), self.offset, end)
        self.offset = end
        return self.state

    def recent(self) -> tuple[mx.array, mx.array, int]:
        """The buffer (B, 2 n_kv_heads, capacity, head_dim), the newest tokens (B, 2 n_kv_heads, RECENT, head_dim) and
        how many tokens lie before these, for a decoding step on a plain cache that is not empty.

        The step puts one more token into a new array and hands that to `advance`. The buffer is written once in RECENT
        tokens, so that a step's arrays keep their shapes and none is written in place.
        """
        if self._recent is None or not 0 <= self.offset - self._n_buffered < RECENT:
            batch, heads, _, head_dim = self._buffers[0].shape  # which then hold everything
            self._n_buffered = self.offset
            self._grow(self._arrays, self.offset, self.offset + RECENT)
            self._recent = mx.zeros((batch, heads, RECENT, head_dim), self._arrays[0].dtype)
        return self._arrays[0], self._recent, self._n_buffered

    def advance(self, recent: mx.array) -> None:
        """Takes the newest tokens with one more among them."""
        self._recent = recent
        self.offset += 1

    def flush(self) -> None:
        """Puts the newest tokens into the buffer."""
        if self._recent is not None:
            recent, self._recent = self._recent, None
            count = self.offset - self._n_buffered
            if count > 0:  # fewer if tokens were taken back meanwhile
                self._arrays[0][:, :, self._n_buffered : self.offset] = recent[:, :, :count]

    @property
    def _buffers(self) -> tuple[mx.array, ...]:
        """The buffers with every token in them, tokens on axis 2."""
        self.flush()
        return self._arrays

    def fill(self, buffer: mx.array) -> None:
        """Stores `buffer` (B, 2 n_kv_heads, tokens, head_dim), keys before values, and nothing else."""
        self._recent, self._arrays, self.offset = None, (buffer,), buffer.shape[2]

    def reserve(self, n_tokens: int) -> None:
        """Announces that `n_tokens` will be stored in all, so that the buffer is made once."""
        self._reserved = n_tokens

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Stored keys and values, each (B, n_kv_heads, tokens, head_dim). Raises ValueError for an empty cache."""
        if not self._buffers:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        n_kv_heads = self._buffers[0].shape[1] // 2
        return self._buffers[0][:, :n_kv_heads, : self.size], self._buffers[0][:, n_kv_heads:, : self.size]

    @property
    def size(self) -> int:
        """Number of tokens stored."""
        return self.offset

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The buffers themselves, for mx.eval."""
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare capacity included."""
        return sum(array.nbytes for array in self.arrays)

    def can_trim(self, n_tokens: int) -> bool:
        """True if the newest `n_tokens` can be taken back."""
        return 0 <= n_tokens <= self.offset

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises QwenMLXError if the cache stores fewer."""
        if not self.can_trim(n_tokens):
            raise QwenMLXError(f"Cannot trim {n_tokens} tokens from a cache of {self.offset}.")
        self.offset -= n_tokens

    def _write(self, arrays: tuple[mx.array, ...], start: int, end: int) -> None:
        """Puts `arrays` at slots start to end, in place where there is capacity."""
        self.flush()
        self._grow(arrays, start, end)
        for buffer, new in zip(self._arrays, arrays):
            buffer[:, :, start:end] = new

    def _grow(self, arrays: tuple[mx.array, ...], start: int, end: int) -> None:
        """Lets the buffers grow for `arrays` at slots start to end; slots before `start` are kept."""
        capacity = self._arrays[0].shape[2] if self._arrays else 0
        if end > capacity:
            capacity = max(end, self._reserved, capacity + capacity // GROWTH)
            capacity = -(-capacity // self._step) * self._step
            capacity = capacity if self.max_size is None else min(capacity, self.max_size)
            spare = [mx.zeros((*new.shape[:2], capacity - start, *new.shape[3:]), new.dtype) for new in arrays]
            # Growing waits for `arrays`, so that not all layers are copied at once: nothing else orders them.
            old = mx.depends([array[:, :, :start] for array in self._arrays], list(arrays)) if self._arrays else []
            pairs = zip(old, spare) if old else ((array,) for array in spare)
            self._arrays = tuple(mx.concatenate(list(pair), axis=2) for pair in pairs)


def recent_of(cache: Sequence[KVCache]) -> tuple[list[mx.array], list[mx.array], int]:
    """`KVCache.recent` of every layer: the buffers, the newest tokens, and how many tokens lie before these."""
    layers = [layer.recent() for layer in cache]
    if len({n_buffered for _, _, n_buffered in layers}) > 1:  # someone has looked into one layer's cache meanwhile
        for layer in cache:
            layer.flush()
        layers = [layer.recent() for layer in cache]
    return [buffer for buffer, _, _ in layers], [recent for _, recent, _ in layers], layers[0][2]


class QuantizedKVCache(KVCache):
    """Keys and values in 8 or 4 bits, the newest BLOCK to 2 BLOCK - 1 tokens as floats.

    Each channel of the keys has a scale and a bias for every BLOCK tokens, each token's values one for every group of
    channels (mx.quantize's affine form): a few channels of Qwen's keys, whose bias is large, would spoil the others'.
    One layer is dequantized at a time, so that no more than one layer ever exists as floats.
    Source: Liu et al. 2024, KIVI, arXiv:2402.02750. Raises QwenMLXError for other bits.
    """

    _step = STEP // BLOCK  # its buffers' unit is a block of tokens

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if bits not in (8, 4) or isinstance(bits, bool):
            raise QwenMLXError(f"The cache's bits are {bits!r}, expected 8 or 4.")
        self.bits = bits
        self._blocks = 0
        self._floats: mx.array | None = None  # the newest, (B, 2 n_kv_heads, tokens, head_dim)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        new = heads_first(kv)
        floats = new if self._floats is None else mx.concatenate([self._floats, new], axis=2)
        state = self._with_blocks(floats, new)
        full = max(0, floats.shape[2] // BLOCK - 1)
        if full:
            self._write(self._quantize(floats[:, :, : full * BLOCK]), self._blocks, self._blocks + full)
            self._blocks += full
        # A copy, so that the whole chunk's keys and values are not kept alive.
        self._floats = mx.contiguous(floats[:, :, full * BLOCK :])
        self.offset += kv.shape[1]
        return state

    def reserve(self, n_tokens: int) -> None:
        self._reserved = n_tokens // BLOCK

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        if self._floats is None:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        return self._with_blocks(self._floats, self._floats)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self._arrays if self._floats is None else (*self._arrays, self._floats)

    def trim(self, n_tokens: int) -> None:
        super().trim(n_tokens)
        if self._floats is None:  # empty
            return
        blocks = min(self._blocks, self.offset // BLOCK)
        if blocks < self._blocks:
            back = mx.concatenate(self._dequantize(blocks, self._blocks, self._floats), axis=1)
            self._floats = mx.concatenate([back, self._floats], axis=2)
            self._blocks = blocks
        self._floats = self._floats[:, :, : self.offset - blocks * BLOCK]

    def _with_blocks(self, floats: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of all blocks and of `floats`, computed once `after` is."""
        n = floats.shape[1] // 2
        if not self._blocks:
            return floats[:, :n], floats[:, n:]
        keys, values = self._dequantize(0, self._blocks, after)
        return mx.concatenate([keys, floats[:, :n]], axis=2), mx.concatenate([values, floats[:, n:]], axis=2)

    def _quantize(self, kv: mx.array) -> tuple[mx.array, ...]:
        """Codes, scales and biases of the keys, then of the values: (B, n_kv_heads, blocks, ...)."""
        n = kv.shape[1] // 2
        keys, values = (half.reshape(kv.shape[0], n, -1, BLOCK, kv.shape[3]) for half in (kv[:, :n], kv[:, n:]))
        return (
            *mx.quantize(keys.swapaxes(3, 4), group_size=BLOCK, bits=self.bits),
            *mx.quantize(values, group_size=_group_size(kv.shape[3]), bits=self.bits),
        )

    def _dequantize(self, start: int, end: int, after: mx.array) -> list[mx.array]:
        """Keys and values of blocks start to end, (B, n_kv_heads, tokens, head_dim) each."""
        # Without the dependency all layers could be dequantized at once: they wait for nothing else.
        arrays = mx.depends([array[:, :, start:end] for array in self._arrays], [after])
        values = mx.dequantize(arrays[3], arrays[4], arrays[5], _group_size(after.shape[3]), self.bits)
        keys = mx.dequantize(arrays[0], arrays[1], arrays[2], BLOCK, self.bits).swapaxes(3, 4)
        return [keys.flatten(2, 3), values.flatten(2, 3)]


class RotatingKVCache(KVCache):
    """The first `n_sinks` tokens and the newest, `max_size` in all: memory stays bounded however long the text.

    Each query sees the sinks and the newest max_size - n_sinks tokens up to its own, also within a long prompt. Keys
    are rotated at their true positions when they are stored, so the distance between two tokens stays what it was and
    nothing is rotated again (Xiao et al. 2023, arXiv:2309.17453, count positions within the cache instead); the model's
    context is not extended. Raises QwenMLXError unless max_size exceeds n_sinks.
    """

    trimmable = False
    max_size: int

    def __init__(self, max_size: int, n_sinks: int = 4) -> None:
        super().__init__()
        if not isinstance(n_sinks, int) or n_sinks < 0:
            raise QwenMLXError(f"n_sinks is {n_sinks!r}, expected 0 or more.")
        if not isinstance(max_size, int) or isinstance(max_size, bool) or max_size <= n_sinks:
            raise QwenMLXError(
                f"The cache's max_size is {max_size!r}, expected more than the {n_sinks} first tokens that it keeps."
            )
        self.max_size, self.n_sinks = max_size, n_sinks
        self._furthest = 0  # most tokens ever seen: what is trimmed may have pushed others out

    @property
    def size(self) -> int:
        return min(self.offset, self.max_size)

    def mask(self, length: int, sliding_window: int | None = None) -> mx.array | str | None:
        start, end = self.offset, self.offset + length
        if end <= self.max_size:
            return super().mask(length, sliding_window)
        if length == 1:  # what is not stored any more needs no mask
            return self._mask(start, self._stored(end), 1, sliding_window) if sliding_window else None
        return self._mask(start, np.append(self._stored(start), np.arange(start, end)), length, sliding_window)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        start, length = self.offset, kv.shape[1]
        end = start + length
        self._furthest = max(self._furthest, end)
        if end <= self.max_size:
            return super().update(kv)
        if length == 1:
            slot = self._slot(start)
            self._write((heads_first(kv),), slot, slot + 1)
            self.offset = end
            return self.state
        # More than fit: the queries see what is stored and each other, then the newest are kept.
        stored = self._stored(start)
        both = mx.concatenate([*(array[:, :, : stored.size] for array in self._arrays), heads_first(kv)], axis=2)
        index = {position: i for i, position in enumerate(np.append(stored, np.arange(start, end)).tolist())}
        kept = mx.array([index[position] for position in self._stored(end).tolist()], mx.int32)
        self._arrays, self.offset = (mx.take(both, kept, axis=2),), end
        n_kv_heads = kv.shape[3]
        return both[:, :n_kv_heads], both[:, n_kv_heads:]

    def can_trim(self, n_tokens: int) -> bool:
        """True if no token that the next query would see has been pushed out by those that are taken back: always
        before the cache is full, after that for the newest one alone."""
        remaining = self.offset - n_tokens
        return 0 <= n_tokens <= self.offset and (self._furthest <= self.max_size or self._furthest <= remaining + 1)

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises QwenMLXError if that cannot be done exactly."""
        if self.offset >= n_tokens >= 0 and not self.can_trim(n_tokens):
            raise QwenMLXError(
                f"Cannot trim {n_tokens} tokens from a rotating cache of {self.max_size} after {self._furthest}: "
                "what they pushed out is gone; start again with an empty cache."
            )
        super().trim(n_tokens)

    def _slot(self, position: int) -> int:
        if position < self.max_size:
            return position
        return self.n_sinks + (position - self.n_sinks) % (self.max_size - self.n_sinks)

    def _stored(self, end: int) -> np.ndarray:
        """The position of each slot's token when `end` tokens have been seen, (tokens stored,)."""
        slots = np.arange(min(end, self.max_size))
        ring = self.max_size - self.n_sinks
        newest = end - 1 - (end - 1 - slots) % ring  # the last position before `end` that falls on the slot
        return np.where(slots < self.n_sinks, slots, newest)

    def _mask(self, start: int, positions: np.ndarray, length: int, sliding_window: int | None) -> mx.array:
        """True where queries at start to start + length - 1 see the tokens at `positions`, bool (length, tokens)."""
        queries = np.arange(start, start + length)[:, None]
        window = queries - (self.max_size - self.n_sinks) < positions
        visible = (positions <= queries) & (window | (positions < self.n_sinks))
        if sliding_window is not None:
            visible &= positions > queries - sliding_window
        return mx.array(visible)


def make_caches(
    n_layers: int, head_dim: int, *, bits: int | None = None, max_size: int | None = None, n_sinks: int = 4
) -> list[KVCache]:
    """An empty cache for every layer.

    bits: 8 or 4, None keeps floats; max_size: tokens stored at most, None for all of them, with the first n_sinks among
    them. Raises QwenMLXError for bits with a max_size, and for bits where no group of channels fits the heads.
    """
    if bits is not None and max_size is not None:
        raise QwenMLXError(
            f"A cache of at most {max_size} tokens cannot be held in {bits} bits: blocks of tokens share their scales, "
            "and a rotating cache replaces single ones; choose one of the two."
        )
    if bits is not None and _group_size(head_dim) == 0:
        raise QwenMLXError(
            f"The model's heads have {head_dim} elements, which no group of 128, 64 or 32 divides: leave the cache in "
            "floats."
        )
    if bits is not None:
        return [QuantizedKVCache(bits) for _ in range(n_layers)]
    if max_size is not None:
        return [RotatingKVCache(max_size, n_sinks) for _ in range(n_layers)]
    return [KVCache() for _ in range(n_layers)]


def _group_size(head_dim: int) -> int:
    """Number of channels of a token's values that share a scale; 0 where no group fits."""
    return next((size for size in (128, 64, 32) if head_dim % size == 0), 0)


def heads_first(kv: mx.array) -> mx.array:
    """(B, L, 2, n_kv_heads, head_dim) as (B, 2 n_kv_heads, L, head_dim)."""
    batch, length, _, n_kv_heads, head_dim = kv.shape
    return kv.transpose(0, 2, 3, 1, 4).reshape(batch, 2 * n_kv_heads, length, head_dim)


def attention_mask(length: int, offset: int, sliding_window: int | None) -> mx.array | str | None:
    """The mask of `length` queries whose first position is `offset`: query i sees keys j <= i, and within a sliding
    window only j > i - sliding_window. None where every key is seen, "causal" where MLX's own mask does.
    """
    if sliding_window is None or offset + length <= sliding_window:
        return "causal" if length > 1 else None
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset + length)[None, :]
    return (keys <= queries) & (keys > queries - sliding_window)
