"""One token of every row of a batch through the model on a GPU, as one graph that is built once.

The layers are model.py's. Their caches are stood in for by ones whose arrays keep their shapes from token to token: new
keys and values go into a short tail, and attention reads the buffer as it lies.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import ops
from ..backend import mx, nn
from .batch_cache import BatchKVCache
from .cache import KVCache, tails_for_one

if TYPE_CHECKING:
    from .qwen2 import Qwen2


def serves(model: Qwen2, input_ids: mx.array, cache: Sequence[KVCache]) -> bool:
    """Whether `BatchStep` computes this call: a token of each row after others, kernels in use, no gradient wanted."""
    return (
        input_ids.ndim == 2
        and input_ids.shape[1] == 1
        and model.ranks is None
        and "reference" not in (ops.executor("step"), ops.executor("attend"))
        and not ops.recording()
        and all(type(layer) is BatchKVCache and layer.offset for layer in cache)
    )


class BatchStep:
    """A batch's decoding step. Holds the model's arrays, and is `current` while they are still the model's."""

    def __init__(self, model: Qwen2) -> None:
        # Not the model itself: that would be a cycle, and keep a deleted model until Python collects its garbage.
        self._body: nn.Module = model["model"]
        self._head: nn.Module | None = model.get("lm_head")
        modules = [*self._body.modules(), *([] if self._head is None else self._head.modules())]
        self._held = [(module, name, value) for module in modules for name, value in module.items()]
        this = weakref.proxy(self)
        self._compiled: Callable[..., list[mx.array]] = ops.compiled(lambda *arrays: this._run(*arrays))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model makes its own

    def current(self, model: Qwen2) -> bool:
        """Whether the model still has the modules and arrays this was made for."""
        top = model["model"] is self._body and model.get("lm_head") is self._head
        return top and all(owner[name] is value for owner, name, value in self._held)

    def __call__(self, input_ids: mx.array, cache: Sequence[BatchKVCache]) -> mx.array:
        """Logits (B, 1, vocab_size) of the tokens after input_ids (B, 1); the cache then holds those too."""
        buffers, tails, filled = tails_for_one(cache)
        place = mx.array([cache[0].offset, filled, 0, 0], mx.int32)
        table = mx.array(self._body.rotary.host_table(cache[0].positions, 1))
        logits, *longer = self._compiled(input_ids, place, table, cache[0].padding.array, *buffers, *tails)
        for layer, tail in zip(cache, longer, strict=True):
            layer.advance(tail)
        return logits

    def _run(
        self, input_ids: mx.array, place: mx.array, table: mx.array, padding: mx.array, *rest: mx.array
    ) -> list[mx.array]:
        table, place = table + 0, place + 0  # into the GPU's own memory: see backend.in_gpu_memory
        half = len(rest) // 2
        newest = mx.arange(rest[half].shape[2])[:, None] == place[0] - place[1]
        shared = place, padding, newest
        layers = [_Layer(buffer, tail, *shared) for buffer, tail in zip(rest[:half], rest[half:])]
        h = self._body(input_ids, layers, 1, table)
        logits = self._body.embed_tokens.as_linear(h) if self._head is None else self._head(h)
        return [logits, *(layer.tail for layer in layers)]


class _Layer:
    """What a layer needs of its cache: `attend`, which puts the next token into `tail`."""

    def __init__(
        self,
        buffer: mx.array,
        tail: mx.array,
        place: mx.array,
        padding: mx.array,
        newest: mx.array,
    ) -> None:
        self.tail = tail
        self._buffer, self._place, self._padding, self._newest = buffer, place, padding, newest

    def attend(self, q: mx.array, kv: mx.array, scale: float, sliding_window: int | None = None) -> mx.array:
        """As KVCache.attend, of one token."""
        rows, _, n_heads, head_dim = q.shape
        self.tail = mx.where(self._newest, kv.reshape(rows, -1, 1, head_dim), self.tail)
        out = ops.decode_attention(
            q.reshape(rows, n_heads, 1, head_dim),
            self._buffer,
            self.tail,
            self._place,
            scale,
            sliding_window,
            self._padding,
        )
        return out.reshape(q.shape)
