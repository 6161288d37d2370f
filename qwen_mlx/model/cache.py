"""Key/value caches of one attention layer: all that was seen, or sinks and the newest; as floats or quantized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import ops
from ..backend import mx
from ..errors import QwenMLXError

STEP = 256  # tokens: room is a multiple of it
BLOCK = 64  # tokens whose quantized keys share a scale
TAIL = 16  # tokens of a decoding step's tail
GROWTH = 16  # a full buffer grows by a sixteenth: at 128k tokens it is copied 16 times a doubling, not every STEP


class KVCache:
    """Keys and values seen so far, in one buffer (B, 2 n_kv_heads, room, head_dim) so that a step writes once.

    `offset` is the number of tokens seen, which is also the position of the next one.
    """

    trimmable = True  # any number of the newest tokens can be taken back
    max_size: int | None = None  # tokens held at most
    _step = STEP

    def __init__(self) -> None:
        self.offset = 0
        self._buffers: tuple[mx.array, ...] = ()
        self._newest: mx.array | None = None  # of a decoding step: tokens from `_filled` on
        self._filled = 0
        self._reserved = 0

    @property
    def positions(self) -> int | np.ndarray:
        """The next token's position; of each row, (B,), where they differ."""
        return self.offset

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """Appends kv (B, L, 2, n_kv_heads, head_dim), rotated, and returns the attention (B, L, H, head_dim) of
        q (B, L, H, head_dim) on all that is held: query i sees keys up to its own, within a sliding window only the
        last `sliding_window`, its own included.
        """
        mask = attention_mask(q.shape[1], self.offset, sliding_window)
        keys, values = self.update(kv)
        return ops.attention(q, keys, values, scale, mask)

    def tail_for_one(self) -> tuple[mx.array, mx.array, int]:
        """For one more token of a plain cache that holds something: the buffer (1, 2 n_kv_heads, room, head_dim), the
        tail (1, 2 n_kv_heads, TAIL, head_dim) of the newest tokens, and how many tokens lie before the tail.

        Whoever puts the token into a new tail hands that to `advance`. The buffer is written once in TAIL tokens, so
        that a step's arrays keep their shapes and none is written in place.
        """
        if self._newest is None or not 0 <= self.offset - self._filled < TAIL:
            batch, heads, _, head_dim = self._parts[0].shape  # the buffer then holds all
            self._filled = self.offset
            self._make_room(self._buffers, self.offset, self.offset + TAIL)
            self._newest = mx.zeros((batch, heads, TAIL, head_dim), self._buffers[0].dtype)
        return self._buffers[0], self._newest, self._filled

    def advance(self, tail: mx.array) -> None:
        """Takes the tail with one more token in it."""
        self._newest = tail
        self.offset += 1

    def flush(self) -> None:
        """Puts the tail's tokens into the buffer."""
        self._parts  # noqa: B018 - does it

    @property
    def _parts(self) -> tuple[mx.array, ...]:
        """The buffers, with the tail's tokens in them: what `_pack` makes of keys and values, tokens on axis 2."""
        if self._newest is not None:
            tail, self._newest = self._newest, None
            held = self.offset - self._filled
            if held > 0:  # fewer if tokens were taken back meanwhile
                self._buffers[0][:, :, self._filled : self.offset] = tail[:, :, :held]
        return self._buffers

    @_parts.setter
    def _parts(self, buffers: tuple[mx.array, ...]) -> None:
        self._buffers = buffers

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values (B, L, 2, n_kv_heads, head_dim), rotated, and returns all held, newest last."""
        end = self.offset + kv.shape[1]
        self._write((heads_first(kv),), self.offset, end)
        self.offset = end
        return self.state

    def fill(self, buffer: mx.array) -> None:
        """Holds `buffer` (B, 2 n_kv_heads, tokens, head_dim), keys before values, and nothing else."""
        self._parts, self.offset = (buffer,), buffer.shape[2]

    def reserve(self, n_tokens: int) -> None:
        """Says that `n_tokens` will be held in all, so that the buffer is made once."""
        self._reserved = n_tokens

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Keys and values held, each (B, n_kv_heads, tokens, head_dim). Raises ValueError while the cache is empty."""
        if not self._parts:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        n_kv_heads, held = self._parts[0].shape[1] // 2, self.held
        return self._parts[0][:, :n_kv_heads, :held], self._parts[0][:, n_kv_heads:, :held]

    @property
    def held(self) -> int:
        """Tokens held."""
        return self.offset

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The buffers themselves, for mx.eval."""
        return self._parts

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, spare room included."""
        return sum(part.nbytes for part in self._parts)

    def can_trim(self, n_tokens: int) -> bool:
        """Whether the newest `n_tokens` can be taken back."""
        return 0 <= n_tokens <= self.offset

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises QwenMLXError if the cache holds fewer."""
        if not self.can_trim(n_tokens):
            raise QwenMLXError(f"Cannot trim {n_tokens} tokens from a cache of {self.offset}.")
        self.offset -= n_tokens

    def _write(self, parts: tuple[mx.array, ...], start: int, end: int) -> None:
        """Puts `parts` at slots start to end, in place where there is room."""
        self._make_room(parts, start, end)
        for part, new in zip(self._parts, parts):
            part[:, :, start:end] = new

    def _make_room(self, parts: tuple[mx.array, ...], start: int, end: int) -> None:
        """Lets the buffers grow for `parts` at slots start to end; slots before `start` are kept."""
        room = self._parts[0].shape[2] if self._parts else 0
        if end > room:
            room = max(end, self._reserved, room + room // GROWTH)
            room = -(-room // self._step) * self._step
            room = room if self.max_size is None else min(room, self.max_size)
            spares = [mx.zeros((*new.shape[:2], room - start, *new.shape[3:]), new.dtype) for new in parts]
            # After `parts`, so that not all layers are copied at once: nothing else orders them.
            held = mx.depends([part[:, :, :start] for part in self._parts], list(parts)) if self._parts else []
            pairs = zip(held, spares) if held else ((spare,) for spare in spares)
            self._parts = tuple(mx.concatenate(list(pair), axis=2) for pair in pairs)


def tails_for_one(cache: Sequence[KVCache]) -> tuple[list[mx.array], list[mx.array], int]:
    """Every layer's buffer and tail as `KVCache.tail_for_one`, and how many tokens lie before the tails."""
    found = [layer.tail_for_one() for layer in cache]
    if len({filled for _, _, filled in found}) > 1:  # someone looked into one layer's cache meanwhile
        for layer in cache:
            layer.flush()
        found = [layer.tail_for_one() for layer in cache]
    return [buffer for buffer, _, _ in found], [tail for _, tail, _ in found], found[0][2]


class QuantizedKVCache(KVCache):
    """Keys and values in 8 or 4 bits, the newest BLOCK to 2 BLOCK - 1 tokens as floats.

    Each channel of the keys has a scale and a bias for every BLOCK tokens, each token's values one for every group of
    channels (mx.quantize's affine form): a few channels of Qwen's keys, whose bias is large, would spoil the others'.
    Attention dequantizes one layer at a time, so no more than one layer is ever held as floats.
    Source: Liu et al. 2024, KIVI, arXiv:2402.02750. Raises QwenMLXError for other bits.
    """

    _step = STEP // BLOCK  # its buffers' unit is a block of tokens

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if bits not in (8, 4) or isinstance(bits, bool):
            raise QwenMLXError(f"The cache's bits are {bits!r}, expected 8 or 4.")
        self.bits = bits
        self._blocks = 0
        self._tail: mx.array | None = None  # (B, 2 n_kv_heads, tokens, head_dim)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        new = heads_first(kv)
        tail = new if self._tail is None else mx.concatenate([self._tail, new], axis=2)
        state = self._joined(tail, new)
        full = max(0, tail.shape[2] // BLOCK - 1)
        if full:
            self._write(self._quantized(tail[:, :, : full * BLOCK]), self._blocks, self._blocks + full)
            self._blocks += full
        # A copy, so that the whole chunk's keys and values are not kept alive.
        self._tail = mx.contiguous(tail[:, :, full * BLOCK :])
        self.offset += kv.shape[1]
        return state

    def reserve(self, n_tokens: int) -> None:
        self._reserved = n_tokens // BLOCK

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        if self._tail is None:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        return self._joined(self._tail, self._tail)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        return self._parts if self._tail is None else (*self._parts, self._tail)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def trim(self, n_tokens: int) -> None:
        super().trim(n_tokens)
        if self._tail is None:  # empty
            return
        blocks = min(self._blocks, self.offset // BLOCK)
        if blocks < self._blocks:
            back = mx.concatenate(self._floats(blocks, self._blocks, self._tail), axis=1)
            self._tail = mx.concatenate([back, self._tail], axis=2)
            self._blocks = blocks
        self._tail = self._tail[:, :, : self.offset - blocks * BLOCK]

    def _joined(self, tail: mx.array, after: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of all blocks and of `tail`, computed once `after` is."""
        n = tail.shape[1] // 2
        if not self._blocks:
            return tail[:, :n], tail[:, n:]
        keys, values = self._floats(0, self._blocks, after)
        return mx.concatenate([keys, tail[:, :n]], axis=2), mx.concatenate([values, tail[:, n:]], axis=2)

    def _quantized(self, kv: mx.array) -> tuple[mx.array, ...]:
        """Codes, scales and biases of the keys, then of the values: (B, n_kv_heads, blocks, ...)."""
        n = kv.shape[1] // 2
        keys, values = (part.reshape(kv.shape[0], n, -1, BLOCK, kv.shape[3]) for part in (kv[:, :n], kv[:, n:]))
        return (
            *mx.quantize(keys.swapaxes(3, 4), group_size=BLOCK, bits=self.bits),
            *mx.quantize(values, group_size=_group_size(kv.shape[3]), bits=self.bits),
        )

    def _floats(self, start: int, end: int, after: mx.array) -> list[mx.array]:
        """Keys and values of blocks start to end, (B, n_kv_heads, tokens, head_dim) each."""
        # Without the dependency all layers could be dequantized at once: they wait for nothing else.
        parts = mx.depends([part[:, :, start:end] for part in self._parts], [after])
        values = mx.dequantize(parts[3], parts[4], parts[5], _group_size(after.shape[3]), self.bits)
        keys = mx.dequantize(parts[0], parts[1], parts[2], BLOCK, self.bits).swapaxes(3, 4)
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
            raise QwenMLXError(f"The cache's max_size is {max_size!r}, expected more than its {n_sinks} sinks.")
        self.max_size, self.n_sinks = max_size, n_sinks
        self._furthest = 0  # the most tokens ever seen: some of what is trimmed had pushed others out

    @property
    def held(self) -> int:
        return min(self.offset, self.max_size)

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        length = kv.shape[1]
        start, end = self.offset, self.offset + length
        if end <= self.max_size:
            out = super().attend(q, kv, scale, sliding_window)
        elif length == 1:
            slot = self._slots(start)
            self._write((heads_first(kv),), slot, slot + 1)
            self.offset = end
            mask = self._mask(start, self._positions(end), 1, sliding_window) if sliding_window else None
            out = ops.attention(q, *self.state, scale, mask)
        else:
            out = self._attend_chunk(q, kv, scale, sliding_window)
        self._furthest = max(self._furthest, end)
        return out

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """As KVCache.update while nothing is pushed out. Raises QwenMLXError after: a chunk sees more than is kept."""
        if self.offset + kv.shape[1] > self.max_size:
            raise QwenMLXError(f"A rotating cache of {self.max_size} tokens has no room for {kv.shape[1]} more.")
        return super().update(kv)

    def can_trim(self, n_tokens: int) -> bool:
        """Whether no token that the next query would see has been pushed out by those that are taken back: always
        before the cache is full, after that for the newest one alone."""
        to = self.offset - n_tokens
        return 0 <= n_tokens <= self.offset and (self._furthest <= self.max_size or self._furthest <= to + 1)

    def trim(self, n_tokens: int) -> None:
        """Forgets the newest `n_tokens`. Raises QwenMLXError if that cannot be done exactly."""
        if self.offset >= n_tokens >= 0 and not self.can_trim(n_tokens):
            raise QwenMLXError(
                f"Cannot trim {n_tokens} tokens from a rotating cache of {self.max_size} after {self._furthest}: "
                "what they pushed out is gone; start again with an empty cache."
            )
        super().trim(n_tokens)

    def _attend_chunk(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None) -> mx.array:
        """Several tokens at once, more than fit: they see what is held and each other, then the newest are kept."""
        start, length = self.offset, kv.shape[1]
        held = self._positions(start)
        both = mx.concatenate([*(part[:, :, : held.size] for part in self._parts), heads_first(kv)], axis=2)
        positions = np.concatenate([held, np.arange(start, start + length)])
        n_kv_heads = kv.shape[3]
        mask = self._mask(start, positions, length, sliding_window)
        out = ops.attention(q, both[:, :n_kv_heads], both[:, n_kv_heads:], scale, mask)
        # Where each slot's token stands in what was joined.
        at = {position: i for i, position in enumerate(positions.tolist())}
        order = mx.array([at[position] for position in self._positions(start + length).tolist()], mx.int32)
        self._parts = (mx.take(both, order, axis=2),)
        self.offset = start + length
        return out

    def _slots(self, position: int) -> int:
        if position < self.max_size:
            return position
        return self.n_sinks + (position - self.n_sinks) % (self.max_size - self.n_sinks)

    def _positions(self, end: int) -> np.ndarray:
        """The position of each slot's token when `end` tokens have been seen, (held,)."""
        slots = np.arange(min(end, self.max_size))
        ring = self.max_size - self.n_sinks
        newest = end - 1 - (end - 1 - slots) % ring  # the last position before `end` that falls on the slot
        return np.where(slots < self.n_sinks, slots, newest)

    def _mask(self, start: int, positions: np.ndarray, length: int, sliding_window: int | None) -> mx.array:
        """Whether queries at start to start + length - 1 see the tokens at `positions`, bool (length, tokens)."""
        queries = np.arange(start, start + length)[:, None]
        window = queries - (self.max_size - self.n_sinks) < positions
        seen = (positions <= queries) & (window | (positions < self.n_sinks))
        if sliding_window is not None:
            seen &= positions > queries - sliding_window
        return mx.array(seen)


def make_caches(
    n_layers: int, head_dim: int, *, bits: int | None = None, max_size: int | None = None, n_sinks: int = 4
) -> list[KVCache]:
    """An empty cache for every layer. bits: 8 or 4, None keeps floats; max_size: tokens held at most, None all of them,
    with the first n_sinks among them. Raises QwenMLXError for what cannot be served.
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
    """Channels of a token's values that share a scale; 0 where none will do."""
    return next((size for size in (128, 64, 32) if head_dim % size == 0), 0)


def heads_first(kv: mx.array) -> mx.array:
    """(B, L, 2, n_kv_heads, head_dim) as (B, 2 n_kv_heads, L, head_dim)."""
    batch, length, _, n_kv_heads, head_dim = kv.shape
    return kv.transpose(0, 2, 3, 1, 4).reshape(batch, 2 * n_kv_heads, length, head_dim)


def attention_mask(length: int, offset: int, sliding_window: int | None) -> mx.array | str | None:
    """The mask of `length` queries whose first position is `offset`: query i sees keys j <= i, and within a sliding
    window only j > i - sliding_window. None where every key is seen, "causal" where MLX's own mask serves.
    """
    if sliding_window is None or offset + length <= sliding_window:
        return "causal" if length > 1 else None
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset + length)[None, :]
    return (keys <= queries) & (keys > queries - sliding_window)
