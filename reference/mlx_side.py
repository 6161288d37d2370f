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
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.qwen2 import Qwen2

from .taps import Run

Sink = Callable[[str, mx.array], None]  # called with key and array, in the order of computation

# The places where taps are read. A layer's modules: (tap of the input, tap of the output), None not reported.
LAYER_MODULES = {
    "input_layernorm": (None, "input_norm"),
    "self_attn.q_proj": (None, "q"),
    "self_attn.k_proj": (None, "k"),
    "self_attn.v_proj": (None, "v"),
    "self_attn.o_proj": ("attn", "o"),
    "post_attention_layernorm": ("attn_residual", "post_norm"),
    "mlp.gate_proj": (None, "gate"),
    "mlp.up_proj": (None, "up"),
    "mlp.down_proj": ("act", "down"),
    "": (None, "residual"),
}


def record(model: Qwen2, run: Run, sink: Sink) -> None:
    """Runs the model on `run` and hands every tap to `sink`, positions on axis 1.

    Logits and caches are those of a second run, of the fused form that generation uses: it has no taps inside, and is
    compared too.
    """
    watched, unwatched = _cache(model, run), _cache(model, run)
    for call, ids in enumerate(run.calls()):
        with taps(model, lambda name, array, call=call: sink(f"{call}.{name}", array)):
            model(mx.array(ids), watched)
        sink(f"{call}.logits", FusedModel.of(model)(mx.array(ids), unwatched, 0))
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
    points: dict[int, tuple[int | None, str | None, str]] = {
        id(modules["model.embed_tokens"]): (None, None, "embeddings"),
        id(modules["model.norm"]): (None, None, "norm"),
    }
    for i in range(len(model.model.layers)):
        for path, taps_of in LAYER_MODULES.items():
            points[id(modules[f"model.layers.{i}.{path}".rstrip(".")])] = (i, *taps_of)
    layer = 0  # the one being computed, for the operations, which know none
    ropes = 0  # rotations computed so far: of queries and keys in turn

    def say(at: int | None, tap: str | None, array: mx.array) -> None:
        if tap:
            report(tap if at is None else f"layers.{at}.{tap}", array)

    def tapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            nonlocal layer
            if id(self) not in points:
                return call(self, x, *args, **kwargs)
            at, before, after = points[id(self)]
            layer = layer if at is None else at
            say(at, before, x)
            out = call(self, x, *args, **kwargs)
            say(at, after, out)
            return out

        return run

    def rope(x: mx.array, table: mx.array) -> mx.array:
        nonlocal ropes
        out = operations["rope"](x, table)
        say(layer, ("q_rope", "k_rope")[ropes % 2], out)
        ropes += 1
        return out

    def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
        say(layer, "probs", probabilities(q, keys, scale, mask))
        return operations["attention"](q, keys, values, scale, mask)

    watched = {"rope": rope, "attention": attention}
    operations = {name: getattr(ops, name) for name in watched}
    calls = {cls: cls.__call__ for cls in {type(m) for m in modules.values() if id(m) in points}}
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
