"""Key/value caches of one attention layer: all that was seen, or sinks and the newest; as floats or quantized."""

from __future__ import annotations

import functools

import numpy as np

from . import ops
from .backend import mx
from .errors import QwenMLXError

STEP = 256  # tokens: room is a multiple of it
GROWTH = 16  # a full buffer grows by a sixteenth: at 128k tokens it is copied 16 times a doubling, not every STEP


class KVCache:
    """Keys and values seen so far, in one buffer (B, 2 n_kv_heads, room, head_dim) so that a step writes once.

    `offset` is the number of tokens seen, which is also the position of the next one.
    """

    trimmable = True  # any number of the newest tokens can be taken back
    max_size: int | None = None  # tokens held at most

    def __init__(self) -> None:
        self.offset = 0
        self._parts: tuple[mx.array, ...] = ()  # what `_pack` makes of keys and values: tokens on axis 2
        self._reserved = 0

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """Appends kv (B, L, 2, n_kv_heads, head_dim), rotated, and returns the attention (B, L, H, head_dim) of
        q (B, L, H, head_dim) on all that is held: query i sees keys up to its own, within a sliding window only the
        last `sliding_window`, its own included.
        """
        mask = attention_mask(q.shape[1], self.offset, sliding_window)
        keys, values = self.update(kv)
        return ops.attention(q, keys, values, scale, mask)

    def attend_one(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """attend for one new token of a plain cache: q (1, n_heads, 1, head_dim) and kv (1, 2 n_kv_heads, 1, head_dim)
        lie as the buffer does, so that nothing is turned. Returns q's shape.
        """
        end = self.offset + 1
        self._write((kv,), self.offset, end)
        self.offset = end
        first = 0 if sliding_window is None else max(0, end - sliding_window)
        buffer, n_kv_heads = self._parts[0], kv.shape[1] // 2
        keys, values = buffer[:, :n_kv_heads, first:end], buffer[:, n_kv_heads:, first:end]
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale)

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Appends keys and values (B, L, 2, n_kv_heads, head_dim), rotated, and returns all held, newest last."""
        end = self.offset + kv.shape[1]
        self._write(self._pack(heads_first(kv)), self.offset, end)
        self.offset = end
        return self.state

    def reserve(self, n_tokens: int) -> None:
        """Says that `n_tokens` will be held in all, so that the buffer is made once."""
        self._reserved = n_tokens

    @property
    def state(self) -> tuple[mx.array, mx.array]:
        """Keys and values held, each (B, n_kv_heads, tokens, head_dim). Raises ValueError while the cache is empty."""
        if not self._parts:
            raise ValueError("The cache is empty: run the model on a prompt first.")
        n_kv_heads, held = self._parts[0].shape[1] // 2, self.held
        kv = self._unpack(tuple(part[:, :, :held] for part in self._parts))
        return kv[:, :n_kv_heads], kv[:, n_kv_heads:]

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
        room = self._parts[0].shape[2] if self._parts else 0
        if end > room:
            room = max(end, self._reserved, room + room // GROWTH)
            room = -(-room // STEP) * STEP
            room = room if self.max_size is None else min(room, self.max_size)
            spares = [mx.zeros((*new.shape[:2], room - start, new.shape[3]), new.dtype) for new in parts]
            held = [part[:, :, :start] for part in self._parts]
            self._parts = tuple(
                mx.concatenate(pair, axis=2) for pair in (zip(held, spares) if held else ((s,) for s in spares))
            )
        for part, new in zip(self._parts, parts):
            part[:, :, start:end] = new

    def _pack(self, kv: mx.array) -> tuple[mx.array, ...]:
        """What is stored for keys and values (B, 2 n_kv_heads, L, head_dim)."""
        return (kv,)

    def _unpack(self, parts: tuple[mx.array, ...]) -> mx.array:
        return parts[0]


class QuantizedKVCache(KVCache):
    """Keys and values in 8 or 4 bits, each run of `group_size` elements of a head with a scale and a bias of its own
    (mx.quantize). Attention dequantizes one layer at a time, so no more than one layer is ever held as floats.

    Raises QwenMLXError for other bits or group sizes.
    """

    def __init__(self, bits: int = 8, group_size: int = 64) -> None:
        super().__init__()
        if bits not in (8, 4) or isinstance(bits, bool):
            raise QwenMLXError(f"The cache's bits are {bits!r}, expected 8 or 4.")
        if group_size not in (32, 64, 128):
            raise QwenMLXError(f"The cache's group size is {group_size!r}, expected 32, 64 or 128.")
        self.bits, self.group_size = bits, group_size

    def _pack(self, kv: mx.array) -> tuple[mx.array, ...]:
        return tuple(mx.quantize(kv, group_size=self.group_size, bits=self.bits))

    def _unpack(self, parts: tuple[mx.array, ...]) -> mx.array:
        return mx.dequantize(*parts, group_size=self.group_size, bits=self.bits)


class RotatingKVCache(KVCache):
    """The first `n_sinks` tokens and the newest, `max_size` in all: memory stays bounded however long the text.

    Each query sees the sinks and the newest max_size - n_sinks tokens up to its own, also within a long prompt. Keys
    are rotated at their true positions when they are stored, so the distance between two tokens stays what it was and
    nothing is rotated again (Xiao et al. 2023, arXiv:2309.17453, count positions within the cache instead); the model's
    context is not extended. Raises QwenMLXError unless max_size exceeds n_sinks.
    """

    trimmable = False

    def __init__(self, max_size: int, n_sinks: int = 4, **packing: int) -> None:
        super().__init__(**packing)
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
            self._write(self._pack(heads_first(kv)), slot, slot + 1)
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
                f"Cannot trim {n_tokens} tokens from a rotating cache of {self.max_size} that has seen {self._furthest}: "
                "what they pushed out is gone; start again with an empty cache."
            )
        super().trim(n_tokens)

    def _attend_chunk(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None) -> mx.array:
        """Several tokens at once, more than fit: they see what is held and each other, then the newest are kept."""
        start, length = self.offset, kv.shape[1]
        new = self._pack(heads_first(kv))
        positions = self._positions(start)
        joined = new
        if positions.size:
            joined = tuple(
                mx.concatenate([part[:, :, : positions.size], more], axis=2) for part, more in zip(self._parts, new)
            )
        positions = np.concatenate([positions, np.arange(start, start + length)])
        both = self._unpack(joined)
        n_kv_heads = kv.shape[3]
        mask = self._mask(start, positions, length, sliding_window)
        out = ops.attention(q, both[:, :n_kv_heads], both[:, n_kv_heads:], scale, mask)
        # Where each slot's token stands in what was joined.
        at = {position: i for i, position in enumerate(positions.tolist())}
        order = mx.array([at[position] for position in self._positions(start + length).tolist()], mx.int32)
        self._parts = tuple(mx.take(part, order, axis=2) for part in joined)
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


class RotatingQuantizedKVCache(RotatingKVCache, QuantizedKVCache):
    """Both: sinks and the newest tokens, in `bits` bits and groups of `group_size`."""


def make_caches(
    n_layers: int,
    head_dim: int,
    *,
    bits: int | None = None,
    max_size: int | None = None,
    n_sinks: int = 4,
    group_size: int = 64,
) -> list[KVCache]:
    """An empty cache for every layer. bits: 8 or 4, None keeps floats; max_size: tokens held at most, None all of them,
    with the first n_sinks among them. Raises QwenMLXError for what cannot be served.
    """
    packing = {} if bits is None else {"bits": bits, "group_size": group_size}
    if bits is not None and isinstance(group_size, int) and head_dim % group_size:
        raise QwenMLXError(
            f"The cache cannot be quantized in groups of {group_size}: the model's heads have {head_dim} elements, "
            "expected a multiple; choose another group size (32, 64 or 128) or leave the cache in floats."
        )
    if max_size is None:
        make = KVCache if bits is None else functools.partial(QuantizedKVCache, **packing)
    else:
        kind = RotatingKVCache if bits is None else RotatingQuantizedKVCache
        make = functools.partial(kind, max_size, n_sinks, **packing)
    return [make() for _ in range(n_layers)]


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
