"""More deliberate bugs: in attention and its cache, the MLP, the residual stream, the order of layers, and the head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import qwen_mlx.model.cache as cache_module
from qwen_mlx import ops
from qwen_mlx.backend import mx
from qwen_mlx.model.batch_cache import BatchKVCache, Padding
from qwen_mlx.model.cache import KVCache
from qwen_mlx.model.fused import FusedModel
from qwen_mlx.model.qwen2 import TransformerBlock

from .bugs import BUGS, LAYER, Bug, bug

__all__ = ["BUGS", "Bug"]


@bug("no causal mask", "0.layers.0.probs", "no causal mask")
def _(model, patch):
    patch.setattr(cache_module, "attention_mask", lambda *_: None)


@bug("causal mask off by one", "0.layers.0.probs", "each token sees the next")
def _(model, patch):
    def mask(length, offset, window):
        return mx.arange(offset + length)[None] <= mx.arange(offset, offset + length)[:, None] + 1

    patch.setattr(cache_module, "attention_mask", mask)


@bug("sliding window ignored", "0.layers.1.probs", "sliding window is missing", shape="sliding window")
def _(model, patch):
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None


@bug("sliding window one too long", "0.layers.1.probs", shape="sliding window")
def _(model, patch):
    for layer in model.model.layers[1:]:
        layer.self_attn.sliding_window += 1


@bug("scores not scaled", "0.layers.1.probs", "not scaled")
def _(model, patch):
    model.model.layers[LAYER].self_attn.scale = 1


@bug("query heads dealt to key heads in turn", "0.layers.0.attn", "dealt to key/value heads in turn")
def _(model, patch):
    attention = ops.attention

    def dealt(q, keys, values, scale, mask):
        groups = q.shape[2] // keys.shape[1]
        return attention(q, mx.tile(keys, (1, groups, 1, 1)), mx.tile(values, (1, groups, 1, 1)), scale, mask)

    patch.setattr(ops, "attention", dealt)


@bug("the fused attention forgets its mask", "0.layers.0.attn", "no causal mask")
def _(model, patch):
    attention = ops.attention
    patch.setattr(ops, "attention", lambda q, k, v, scale, mask: attention(q, k, v, scale, None))


@bug("the cache forgets its first key", "0.layers.0.probs", run="decode")
def _(model, patch):
    update = KVCache.update

    def forget(self, kv):
        keys, values = update(self, kv)
        return mx.concatenate([keys[:, :, :1] * 0, keys[:, :, 1:]], axis=2), values

    patch.setattr(KVCache, "update", forget)


@bug("a second chunk overwrites the first key", "1.layers.0.cache_k", run="chunked")
def _(model, patch):
    update = KVCache.update

    def overwrite(self, kv):
        state = update(self, kv)
        if self.offset > kv.shape[1]:
            self.arrays[0][:, :, 0] = self.arrays[0][:, :, self.offset - 1]
        return state

    patch.setattr(KVCache, "update", overwrite)


@bug("keys held in bfloat16", "0.layers.0.probs", run="decode")
def _(model, patch):
    update = KVCache.update
    patch.setattr(KVCache, "update", lambda self, kv: update(self, kv.astype(mx.bfloat16).astype(kv.dtype)))


@bug("a column of the padding is seen", "0.layers.0.probs", run="padded")
def _(model, patch):
    make = Padding.__init__

    def short(self, columns):
        make(self, columns)
        self.array = mx.maximum(self.array - 1, 0)

    patch.setattr(Padding, "__init__", short)


@bug("padding is seen", "0.layers.0.probs", "mask of the padding is missing", run="padded")
def _(model, patch):
    patch.setattr(BatchKVCache, "mask", KVCache.mask)


@bug("positions count the padding", "0.layers.0.q_rope", "count the padding", run="padded")
def _(model, patch):
    counted = property(lambda self: np.full(self.padding.columns.shape, self.offset, np.int32))
    patch.setattr(BatchKVCache, "positions", counted)


@bug("rows of a batch exchanged while it goes on", "2.layers.0.probs", run="padded")
def _(model, patch):
    update = BatchKVCache.update

    def exchanged(self, kv):
        if kv.shape[1] == 1 and int(self.positions.max()) == 12:
            self.fill(mx.concatenate(self.state, axis=1)[::-1])
        return update(self, kv)

    patch.setattr(BatchKVCache, "update", exchanged)


def patch_act(patch: pytest.MonkeyPatch, act: Callable[[mx.array, mx.array], mx.array]) -> None:
    patch.setattr(ops, "swiglu", act)


@bug("gelu for silu", "0.layers.0.act", "gelu stands for silu")
def _(model, patch):
    patch_act(patch, lambda gate, up: gate * mx.sigmoid(1.702 * gate) * up)


@bug("silu on up", "0.layers.0.act", "applied to up")
def _(model, patch):
    patch_act(patch, lambda gate, up: gate * up * mx.sigmoid(up))


@bug("silu missing", "0.layers.0.act", "silu is missing")
def _(model, patch):
    patch_act(patch, lambda gate, up: gate * up)


@bug("residual dropped", "0.layers.0.attn_residual", "what the reference has as o")
def _(model, patch):
    def block(self, x, *rest):
        h = self.self_attn(self.input_layernorm(x), *rest)
        return h + self.mlp(self.post_attention_layernorm(h))

    patch.setattr(TransformerBlock, "__call__", block)


@bug("embeddings scaled as in Gemma", "0.embeddings", "times 8")
def _(model, patch):
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 8


@bug("embeddings of the next id", "0.embeddings")
def _(model, patch):
    model.model.embed_tokens.weight = mx.array(np.roll(np.array(model.model.embed_tokens.weight), 1, 0))


@bug("layers in the wrong order", "0.layers.1.input_norm", "model.layers.2.input_layernorm.weight is what belongs")
def _(model, patch):
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]


@bug("last layer skipped", "0.layers.2.input_norm")
def _(model, patch):
    model.model.layers = model.model.layers[:2]
    make = type(model).make_cache
    patch.setattr(type(model), "make_cache", lambda self: make(self)[:2])


@bug("head of zeros", "0.logits", "all zeros")
def _(model, patch):
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)


@bug("tied head where the file has its own", "0.logits", "uses the embeddings")
def _(model, patch):
    class Tied(type(model.lm_head)):
        def __call__(self, x):
            return model_embed(x)

    model_embed = model.model.embed_tokens.as_linear
    head = Tied(1, 1, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


@bug("the fused form goes wrong", "1.logits", "times 1.01", run="decode")
def _(model, patch):
    """The taps cannot look into it: it computes when nobody looks."""
    call = FusedModel.__call__

    def wrong(self, ids, *rest):
        return call(self, ids, *rest) * (1.01 if ids.size == 1 else 1)

    patch.setattr(FusedModel, "__call__", wrong)


@bug("a norm that returns float32 in a bfloat16 model", "0.norm", dtype="bfloat16")
def _(model, patch):
    rms_norm, last = ops.rms_norm, model.model.norm

    def promoting(x, weight, eps):
        return rms_norm(x, weight, eps).astype(mx.float32 if weight is last.weight else x.dtype)

    patch.setattr(ops, "rms_norm", promoting)


@bug("attention that returns float32 in a bfloat16 model", "0.layers.0.attn", dtype="bfloat16")
def _(model, patch):
    """The norm behind it refuses what is left of that."""
    attention = ops.attention
    patch.setattr(ops, "attention", lambda *arguments: attention(*arguments).astype(mx.float32))


@bug("a cache that cannot hold what it is given", "0.layers.0.probs")
def _(model, patch):
    patch.setattr(KVCache, "update", lambda self, kv: kv.reshape(1, 2, 3))
