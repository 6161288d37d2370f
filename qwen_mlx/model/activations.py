"""The values inside a forward pass, under short names: for people who look into a model, and for the reference harness.

MLX's modules have no hooks. While values are recorded, the classes and operations that a model calls are replaced by
ones that also report; nothing is left behind, and a model that is not recorded pays nothing. One thread may record at a
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import ops
from ..backend import mx, nn
from ..errors import QwenMLXError, refuse_unknown, refuses_wrong_arguments
from .qwen2 import InputIds, Qwen2, as_input_ids

Sink = Callable[[str, mx.array], None]  # called with name and array, in the order of computation

# Tap: what it holds. Shapes: hidden (B, L, hidden_size) unless said otherwise; H heads, K key/value heads, S positions.
LAYER_TAPS = {
    "input_norm": "RMSNorm before attention",
    "q": "query projection with bias, (B, L, H D)",
    "k": "key projection with bias, (B, L, K D)",
    "v": "value projection with bias, (B, L, K D)",
    "q_rope": "queries after RoPE, (B, L, H, D)",
    "k_rope": "keys after RoPE, (B, L, K, D)",
    "probs": "attention probabilities, (B, L, H, S)",
    "attn": "attention output before o_proj, (B, L, H D)",
    "o": "attention output after o_proj",
    "attn_residual": "residual stream after attention",
    "post_norm": "RMSNorm before the MLP",
    "gate": "gate projection, (B, L, F)",
    "up": "up projection, (B, L, F)",
    "act": "silu(gate) * up, (B, L, F)",
    "down": "down projection",
    "residual": "residual stream after the block",
}
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


@refuses_wrong_arguments
def activations(model: Qwen2, input_ids: InputIds, names: Sequence[str] | None = None) -> dict[str, mx.array]:
    """Runs the model on token ids and returns what it computed by name: "embeddings", "layers.5.probs" (layers from 0,
    with the names of LAYER_TAPS), "norm" and "logits".

    input_ids: (B, L), or (L,) for one row; integers of MLX, NumPy or lists. names: the ones to keep, None for all,
    which needs the memory of all. Arrays have the model's dtype, the batch on axis 0 and the position on axis 1.

        activations(model, tokenizer.encode("Rome is in"), ["layers.5.probs"])

    Raises QwenMLXError for ids that are none and for a name that is none.
    """
    ids = as_input_ids(input_ids, model.config)
    layers = range(model.config.num_hidden_layers)
    known = ["embeddings", *(f"layers.{i}.{tap}" for i in layers for tap in LAYER_TAPS), "norm", "logits"]
    if isinstance(names, str) or not isinstance(names, Sequence | None) or not all(type(n) is str for n in names or ()):
        raise QwenMLXError(f"names is {names!r:.80}, expected a list of names such as 'layers.5.probs'.")
    refuse_unknown(names or (), known, "activation")
    kept: dict[str, mx.array] = {}

    def keep(name: str, array: mx.array) -> None:
        if names is None or name in names:
            kept[name] = array

    with recording(model, keep):
        keep("logits", model(ids))
    mx.eval(kept)
    return kept


@refuses_wrong_arguments
def hidden_states(model: Qwen2, input_ids: InputIds) -> list[mx.array]:
    """The hidden states (B, L, hidden_size) of token ids, as transformers' output_hidden_states: the embeddings, and
    the stream after each layer, the last one after the final norm. `hidden_states(model, ids)[5]` is what the fifth
    layer hands on. Arguments and errors as for activations."""
    layers = range(model.config.num_hidden_layers)
    names = ["embeddings", *(f"layers.{i}.residual" for i in layers[:-1]), "norm"]
    kept = activations(model, input_ids, names)
    return [kept[name] for name in names]


@contextlib.contextmanager
def recording(model: Qwen2, report: Sink) -> Iterator[None]:
    """While open, `model` reports all but the logits as it computes them."""
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

    def tapped(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
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
        out: mx.array = operations["rope"](x, table)
        say(layer, ("q_rope", "k_rope")[ropes % 2], out)
        ropes += 1
        return out

    def attention(q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
        say(layer, "probs", probabilities(q, keys, scale, mask))
        out: mx.array = operations["attention"](q, keys, values, scale, mask)
        return out

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
