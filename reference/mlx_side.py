"""Taps on this package's model. The model knows nothing of them: for the length of a run the classes and operations
that it calls are replaced by ones that also report; nothing is left behind, nothing is paid when no run is recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from qwen_mlx import ops
from qwen_mlx.backend import mx, nn
from qwen_mlx.model.batch_cache import BatchKVCache, Padding
from qwen_mlx.model.qwen2 import Qwen2

from .taps import Run

Sink = Callable[[str, mx.array], None]  # called with key and array, in the order of computation

# Where each tap is read, all in one place. A layer's modules: (tap of the input, taps of the outputs); "<" before a tap
# is the layer before, None is not reported. Norms return the residual stream too, whose addition they do.
LAYER_MODULES = {
    "input_layernorm": (None, ("<residual", "input_norm")),
    "self_attn.o_proj": ("attn", ("o",)),
    "post_attention_layernorm": (None, ("attn_residual", "post_norm")),
    "mlp.down_proj": ("act", ("down",)),
}
OPERATIONS = ("qkv_rope", "attention", "swiglu_joined")  # q, k, v, q_rope, k_rope; probs; gate, up


def record(model: Qwen2, run: Run, sink: Sink) -> None:
    """Runs the model on `run` and hands every tap to `sink`, positions on axis 1.

    Logits and caches are those of a second run that nobody watches, the way generation goes: what is fused there, and
    has no taps inside, is compared too.
    """
    watched, unwatched = _cache(model, run), _cache(model, run)
    for call, ids in enumerate(run.calls()):
        with taps(model, lambda name, array, call=call: sink(f"{call}.{name}", array)):
            model(mx.array(ids), watched)
        with ops.no_grad():
            sink(f"{call}.logits", model(mx.array(ids), unwatched))
        for i, layer in enumerate(unwatched):
            for tap, array in zip(("cache_k", "cache_v"), layer.state):
                sink(f"{call}.layers.{i}.{tap}", array.swapaxes(1, 2))


def _cache(model: Qwen2, run: Run) -> list[Any]:
    if run.padding is None:
        return model.make_cache()
    padding = Padding(run.padding)
    return [BatchKVCache(padding) for _ in model.model.layers]


@contextlib.contextmanager
def taps(model: Qwen2, report: Sink) -> Iterator[None]:
    """While open, `model` reports every tap but logits and cache as it computes them."""
    modules = dict(model.named_modules())
    last = len(model.model.layers) - 1
    places: dict[int, tuple[int, str | None, tuple[str | None, ...]]] = {
        id(modules["model.embed_tokens"]): (-1, None, ("embeddings",)),
        id(modules["model.norm"]): (last + 1, None, ("<residual", "norm")),
    }
    for i in range(last + 1):
        for path, (before, after) in LAYER_MODULES.items():
            places[id(modules[f"model.layers.{i}.{path}"])] = (i, before, after)
    layer = 0  # the one being computed, for the operations, which know none

    def say(at: int, tap: str | None, array: mx.array) -> None:
        if tap and tap.startswith("<"):
            at, tap = at - 1, tap[1:]
            if at < 0:
                return  # before the first layer it is the embeddings
        if tap:
            report(f"layers.{at}.{tap}" if 0 <= at <= last else tap, array)

    def tapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal layer
            if id(self) not in places:
                return call(self, x, *args, **kwargs)
            at, before, after = places[id(self)]
            layer = at
            say(at, before, x)
            out = call(self, x, *args, **kwargs)
            for tap, array in zip(after, out if isinstance(out, tuple) else (out,), strict=True):
                say(at, tap, array)
            return out

        return run

    def qkv_rope(
        qkv: mx.array, bias: mx.array | None, table: mx.array, heads: int, kv_heads: int
    ) -> tuple[mx.array, mx.array]:
        head_dim = qkv.shape[-1] // (heads + 2 * kv_heads)
        biased = qkv if bias is None else qkv + bias
        parts = mx.split(biased, [heads * head_dim, (heads + kv_heads) * head_dim], axis=-1)
        for tap, array in zip("qkv", parts):
            say(layer, tap, array)
        q, kv = operations["qkv_rope"](qkv, bias, table, heads, kv_heads)
        say(layer, "q_rope", q)
        say(layer, "k_rope", kv[:, :, 0])
        return q, kv

    def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
        say(layer, "probs", probabilities(q, keys, scale, mask))
        return operations["attention"](q, keys, values, scale, mask)

    def swiglu_joined(gate_up: mx.array, bias: mx.array | None = None) -> mx.array:
        for tap, array in zip(("gate", "up"), mx.split(gate_up if bias is None else gate_up + bias, 2, axis=-1)):
            say(layer, tap, array)
        return operations["swiglu_joined"](gate_up, bias)

    operations = {name: getattr(ops, name) for name in OPERATIONS}
    watched = {"qkv_rope": qkv_rope, "attention": attention, "swiglu_joined": swiglu_joined}
    calls = {cls: cls.__call__ for cls in {type(m) for m in modules.values() if id(m) in places}}
    try:
        for cls, call in calls.items():
            cls.__call__ = tapped(call)
        for name, operation in watched.items():
            setattr(ops, name, operation)
        yield
    finally:
        for cls, call in calls.items():
            cls.__call__ = call
        for name, operation in operations.items():
            setattr(ops, name, operation)


def probabilities(q: mx.array, keys: mx.array, scale: float, mask: Any) -> mx.array:
    """softmax(scale q k^T + mask) of the very arguments that `ops.attention` is given, which keeps its own to itself.

    q (B, L, H, D), keys (B, K, S, D). Returns (B, L, H, S) in q.dtype, computed in float32.
    """
    batch, length, heads, head_dim = q.shape
    seen = keys.shape[2]
    wide = q.astype(mx.float32).swapaxes(1, 2).reshape(batch, keys.shape[1], -1, length, head_dim)
    scores = scale * (wide @ keys.astype(mx.float32).swapaxes(2, 3)[:, :, None])
    if isinstance(mask, str):
        mask = mx.arange(seen)[None, :] <= mx.arange(seen - length, seen)[:, None]
    if mask is not None:
        mask = mask[:, :, None] if mask.ndim == 4 else mask  # a batch's, (B, 1, L, S)
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    out = mx.softmax(scores, axis=-1).reshape(batch, heads, length, seen)
    return out.swapaxes(1, 2).astype(q.dtype)
