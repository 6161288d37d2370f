"""Qwen2 and Qwen2.5 in MLX (Qwen2.5 technical report, arXiv:2412.15115).

Notable features:
- grouped-query attention, with biases on q, k and v and none on o
- rotary positions on halves: element i turns with i + head_dim / 2
- RMSNorm before attention and before the MLP, one more before the head
- SwiGLU; its projections have biases only where a file carries them
- the head shares the embedding's weights where the file has no head of its own
- q, k and v are one matrix, gate and up another: fewer launches, and each reads its input once
Other parameters have Hugging Face's names; `Qwen2.hf_parameters` gives all of them under those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from .. import ops
from ..backend import mx, named_arrays, nn
from . import batch_step, display
from . import fused_step as step
from .batch_cache import BatchKVCache
from .cache import KVCache, make_caches
from .config import ModelConfig
from .layers import Linear

# What one matrix of the model holds, in the order of its rows, under Hugging Face's names.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
JOINED_BIASES = {"qkv_bias": "qkv_proj", "gate_up_bias": "gate_up_proj"}


class RMSNorm(nn.Module):
    """(h + last, its norm), or (h, its norm) without `last`."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, h: mx.array, last: mx.array | None = None) -> tuple[mx.array, mx.array]:
        if last is None:
            return h, ops.rms_norm(h, self.weight, self.eps)
        return ops.add_rms_norm(last, h, self.weight, self.eps)


class Attention(nn.Module):
    """q, k and v come from one product; their bias is added where q and k are rotated."""

    def __init__(self, config: ModelConfig, sliding_window: int | None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, rows, bias=False)
        self.qkv_bias = mx.zeros((rows,))
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.sliding_window = sliding_window

    def __call__(self, x: mx.array, cache: KVCache, table: mx.array) -> mx.array:
        batch, length, _ = x.shape
        q, kv = ops.qkv_rope(self.qkv_proj(x), self.qkv_bias, table, self.n_heads, self.n_kv_heads)
        out = cache.attend(q, kv, self.head_dim**-0.5, self.sliding_window)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nn.Module):
    """Gate and up come from one product."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.gate_up_bias = mx.zeros((2 * config.intermediate_size,)) if config.mlp_bias else None
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(ops.swiglu_joined(self.gate_up_proj(x), self.gate_up_bias))


class TransformerBlock(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); the last addition is left to the next norm, which does both.

    Call: h (B, L, hidden_size) without the previous block's output, and that output or None; the positions' cosines and
    sines of ops.Rotary.table. Returns both for the next.
    """

    def __init__(self, config: ModelConfig, sliding_window: int | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, sliding_window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self, h: mx.array, last: mx.array | None, cache: KVCache, table: mx.array
    ) -> tuple[mx.array, mx.array]:
        h, x = self.input_layernorm(h, last)
        h, x = self.post_attention_layernorm(h, self.self_attn(x, cache, table))
        return h, self.mlp(x)


class Qwen2Model(nn.Module):
    """Everything below the head: token ids (B, L) to normalised hidden states of the last `keep` positions (0: all).

    table: of ops.Rotary.table for these positions; None makes it from the cache's.
    """

    def __init__(self, config: ModelConfig, rotary: ops.Rotary):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            TransformerBlock(config, config.sliding_window if i >= config.max_window_layers else None)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = rotary

    def __call__(
        self, input_ids: mx.array, cache: Sequence[KVCache], keep: int = 0, table: mx.array | None = None
    ) -> mx.array:
        if table is None:
            table = self.rotary.table(cache[0].positions, input_ids.shape[1])
        h: mx.array = self.embed_tokens(input_ids)
        last: mx.array | None = None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h, last = layer(h, last, layer_cache, table)
        return self.norm(h[:, -keep:], None if last is None else last[:, -keep:])[1]


class Qwen2(nn.Module):
    """The causal language model.

    Call: input_ids (B, L) integers, cache one KVCache a layer (a fresh one if None), logits_to_keep the number of last
    positions to compute logits for, 0 for all. Returns logits (B, L or logits_to_keep, vocab_size), model's dtype.
    """

    def __init__(self, config: ModelConfig, rope_factors: np.ndarray | None = None):
        super().__init__()
        self.config = config
        self._step: step.Step | None = None
        self._batch_step: batch_step.BatchStep | None = None
        self.ranks: Any = None  # parallel.Ranks, where others hold parts of the model
        self.model = Qwen2Model(config, rotary_of(config, rope_factors))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, input_ids: mx.array, cache: Sequence[KVCache] | None = None, logits_to_keep: int = 0
    ) -> mx.array:
        cache = self.make_cache() if cache is None else cache
        if step.serves(self, input_ids, cache):
            if self._step is None or not self._step.current:
                self._step = step.Step(self)
            return self._step(input_ids, cache)
        if batch_step.serves(self, input_ids, cache):
            if self._batch_step is None or not self._batch_step.current(self):
                self._batch_step = batch_step.BatchStep(self)
            return self._batch_step(input_ids, cast("Sequence[BatchKVCache]", cache))
        h = self.model(input_ids, cache, logits_to_keep)
        head = self.model.embed_tokens.as_linear if self.config.tie_word_embeddings else self.lm_head
        logits: mx.array = head(h)
        return logits

    def hf_parameters(self) -> dict[str, mx.array]:
        """All parameters under Hugging Face's names: joined ones as views of their rows."""
        config = self.config
        q, kv, mlp = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.intermediate_size,
        )
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": mlp, "up_proj": mlp}
        found: dict[str, mx.array] = {}
        for name, array in named_arrays(self):
            path, _, kind = name.rpartition(".")
            if kind in JOINED_BIASES:
                path, kind = f"{path}.{JOINED_BIASES[kind]}", "bias"
            parent, _, module = path.rpartition(".")
            if path.rpartition(".parts.")[1]:  # projections whose packings differ lie side by side
                parent, _, part = path.partition(".parts.")
                parent, _, module = parent.rpartition(".")
                found[f"{parent}.{JOINED[module][int(part)]}.{kind}"] = array
                continue
            start = 0
            for part in JOINED.get(module, (module,)):
                size = rows[part] if module in JOINED else array.shape[0]
                found[f"{parent}.{part}.{kind}" if parent else f"{part}.{kind}"] = array[start : start + size]
                start += size
        return found

    def __repr__(self) -> str:
        return f"Qwen2({'; '.join(f'{name}: {text}' for name, text in display.summary(self).items())})"

    def _repr_html_(self) -> str:
        return display.table(display.summary(self).items(), "Qwen2")

    def make_cache(self, *, bits: int | None = None, max_size: int | None = None, n_sinks: int = 4) -> list[KVCache]:
        """An empty cache for every layer: see cache.make_caches."""
        config = self.config
        return make_caches(config.num_hidden_layers, config.head_dim, bits=bits, max_size=max_size, n_sinks=n_sinks)


def rotary_of(config: ModelConfig, rope_factors: np.ndarray | None = None) -> ops.Rotary:
    """The rotary frequencies that a configuration describes. rope_factors: (head_dim / 2,), divisors from a GGUF."""
    scaling = config.rope_scaling
    if scaling is None:
        rotary = ops.Rotary.plain(config.head_dim, config.rope_theta)
    elif scaling.type == "linear":
        rotary = ops.Rotary.plain(config.head_dim, config.rope_theta, scaling.factor)
    else:
        rotary = ops.Rotary.yarn(
            config.head_dim,
            config.rope_theta,
            scaling.factor,
            scaling.original_max_position_embeddings,
            scaling.attention_factor,
            scaling.beta_fast,
            scaling.beta_slow,
        )
    return rotary if rope_factors is None else rotary.divided(rope_factors)
