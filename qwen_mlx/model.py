"""Qwen2 and Qwen2.5 in MLX (Qwen2.5 technical report, arXiv:2412.15115).

Notable features:
- grouped-query attention, with biases on q, k and v and none on o
- rotary positions on halves: element i turns with i + head_dim / 2
- RMSNorm before attention and before the MLP, one more before the head
- SwiGLU; its projections have biases only where a file carries them
- the head shares the embedding's weights where the file has no head of its own
Parameter names are those of Hugging Face's Qwen2ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import ops
from .backend import mx, nn
from .cache import KVCache
from .config import ModelConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, rotary: ops.Rotary, sliding_window: int | None):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.n_heads * config.head_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, config.n_kv_heads * config.head_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, config.n_kv_heads * config.head_dim, bias=True)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.hidden_size, bias=False)
        self._rotary = rotary
        self._sliding_window = sliding_window

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.n_heads, self.head_dim)
        k = self.k_proj(x).reshape(batch, length, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(batch, length, self.n_kv_heads, self.head_dim)
        q, k = ops.rope(q, cache.offset, self._rotary), ops.rope(k, cache.offset, self._rotary)
        mask = attention_mask(length, cache.offset, self._sliding_window)
        keys, values = cache.update(k.swapaxes(1, 2), v.swapaxes(1, 2))
        out = ops.attention(q, keys, values, self.head_dim**-0.5, mask)
        return self.o_proj(out.reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, config: ModelConfig, rotary: ops.Rotary, sliding_window: int | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rotary, sliding_window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Qwen2Model(nn.Module):
    """Everything below the head: token ids (B, L) to normalised hidden states (B, L, hidden_size)."""

    def __init__(self, config: ModelConfig, rotary: ops.Rotary):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            TransformerBlock(config, rotary, config.sliding_window if i >= config.max_window_layers else None)
            for i in range(config.n_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, input_ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
        h = self.embed_tokens(input_ids)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, layer_cache)
        return self.norm(h)


class Qwen2(nn.Module):
    """The causal language model.

    Call: input_ids (B, L) integers, cache one KVCache a layer (a fresh one if None), logits_to_keep the number of last
    positions to compute logits for, 0 for all. Returns logits (B, L or logits_to_keep, vocab_size), model's dtype.
    """

    def __init__(self, config: ModelConfig, rope_factors: np.ndarray | None = None):
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config, rotary_of(config, rope_factors))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self, input_ids: mx.array, cache: Sequence[KVCache] | None = None, logits_to_keep: int = 0
    ) -> mx.array:
        h = self.model(input_ids, self.make_cache() if cache is None else cache)[:, -logits_to_keep:]
        return self.model.embed_tokens.as_linear(h) if self.config.tie_word_embeddings else self.lm_head(h)

    def make_cache(self) -> list[KVCache]:
        """An empty cache for every layer."""
        return [KVCache() for _ in range(self.config.n_layers)]


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


def attention_mask(length: int, offset: int, sliding_window: int | None) -> mx.array | str | None:
    """The mask of `length` queries whose first position is `offset`: query i sees keys j <= i, and within a sliding
    window only j > i - sliding_window. None where every key is seen, "causal" where MLX's own mask serves.
    """
    if sliding_window is None or offset + length <= sliding_window:
        return "causal" if length > 1 else None
    queries = mx.arange(offset, offset + length)[:, None]
    keys = mx.arange(offset + length)[None, :]
    return (keys <= queries) & (keys > queries - sliding_window)
