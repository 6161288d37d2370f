"""Qwen2 and Qwen2.5 in MLX (Qwen2.5 technical report, arXiv:2412.15115).

Notable features:
- grouped-query attention, with biases on q, k and v, and on o only where a file carries them
- rotary positions on halves: element i turns with i + head_dim / 2
- RMSNorm before attention and before the MLP, one more before the head
- SwiGLU; its projections have biases only where a file carries them
- the head shares the embedding's weights where the file has no head of its own
Modules and parameters have Hugging Face's names. Generation computes the same function in fewer launches: fused.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import ops
from ..backend import check_process, mx, named_arrays, nn
from ..errors import QwenMLXError
from . import display
from .cache import KVCache, make_caches
from .config import ModelConfig
from .layers import Linear

Mask = mx.array | str | None
InputIds = mx.array | np.ndarray | Sequence[int] | Sequence[Sequence[int]]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention, within the last `sliding_window` tokens where there is one."""

    def __init__(self, config: ModelConfig, sliding_window: int | None):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale, self.sliding_window = config.head_dim, config.head_dim**-0.5, sliding_window
        self.q_proj = Linear(config.hidden_size, self.n_heads * self.head_dim, bias=True)
        self.k_proj = Linear(config.hidden_size, self.n_kv_heads * self.head_dim, bias=True)
        self.v_proj = Linear(config.hidden_size, self.n_kv_heads * self.head_dim, bias=True)
        self.o_proj = Linear(self.n_heads * self.head_dim, config.hidden_size, bias=config.o_proj_bias)

    def __call__(self, x: mx.array, rotation: mx.array, cache: KVCache, mask: Mask) -> mx.array:
        def heads(y: mx.array) -> mx.array:
            return y.reshape(*x.shape[:2], -1, self.head_dim)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = ops.rope(q, rotation), ops.rope(k, rotation)
        keys, values = cache.update(mx.stack([k, v], axis=2))
        out = ops.attention(q, keys, values, self.scale, mask)
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, width, bias=bias)
        self.up_proj = Linear(hidden, width, bias=bias)
        self.down_proj = Linear(width, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    """h = x + attention(norm(x)), then h + mlp(norm(h)); x (B, L, hidden_size)."""

    def __init__(self, config: ModelConfig, sliding_window: int | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, sliding_window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, rotation: mx.array, cache: KVCache, mask: Mask) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), rotation, cache, mask)
        return h + self.mlp(self.post_attention_layernorm(h))


class Qwen2Model(nn.Module):
    """Everything below the head: token ids (B, L) to normalised hidden states of the last `keep` positions (0: all)."""

    def __init__(self, config: ModelConfig, rotary: ops.Rotary):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [
            TransformerBlock(config, config.sliding_window if i >= config.max_window_layers else None)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary, self.is_causal, self.vocab_size = rotary, config.is_causal, config.vocab_size

    def __call__(self, input_ids: mx.array, cache: Sequence[KVCache], keep: int = 0) -> mx.array:
        check_process()
        rotation, masks = self.positions(input_ids.shape[1], cache)
        # MLX would read beyond the matrix for an id without a row. Raising here would mean to wait for the ids.
        has_row = (input_ids >= 0) & (input_ids < self.vocab_size)
        h = mx.where(has_row[..., None], self.embed_tokens(mx.where(has_row, input_ids, 0)), mx.nan)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, rotation, layer_cache, masks[layer.self_attn.sliding_window])
        return self.norm(h[:, -keep:])

    def positions(self, length: int, cache: Sequence[KVCache]) -> tuple[mx.array, dict[int | None, Mask]]:
        """The rotary table of the next `length` positions, and the mask of each kind of layer by its window."""
        windows = {layer.self_attn.sliding_window for layer in self.layers}
        masks: dict[int | None, Mask] = dict.fromkeys(windows)
        if self.is_causal:
            masks = {window: cache[0].mask(length, window) for window in windows}
        return self.rotary.table(cache[0].positions, length), masks


class Qwen2(nn.Module):
    """The causal language model.

    Call: input_ids (B, L), or (L,) for one row, integers of MLX, NumPy or lists; cache one KVCache a layer (a fresh one
    if None); logits_to_keep the number of last positions to compute logits for, 0 for all. Returns logits
    (B, L or logits_to_keep, vocab_size), model's dtype; NaN in a row with an id of MLX's that is not in the vocabulary,
    from that id on if not before.
    """

    def __init__(self, config: ModelConfig, rope_factors: np.ndarray | None = None):
        super().__init__()
        self.config = config
        self.adapter_digest = ""  # of the adapters that its values contain
        self.ranks: Any = None  # a parallel.group.TensorParallelGroup, where others hold parts of the model
        self.model = Qwen2Model(config, rotary_of(config, rope_factors))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def __call__(
        self, input_ids: InputIds, cache: Sequence[KVCache] | None = None, logits_to_keep: int = 0
    ) -> mx.array:
        cache = self.make_cache() if cache is None else cache
        return self.head(self.model(as_input_ids(input_ids, self.config), cache, logits_to_keep))

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., vocab_size) of normalised hidden states (..., hidden_size)."""
        embeddings = self.model.embed_tokens
        logits: mx.array = embeddings.as_linear(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits

    def hf_parameters(self) -> dict[str, mx.array]:
        """All parameters by name; the names are Hugging Face's."""
        return dict(named_arrays(self))

    def __repr__(self) -> str:
        return f"Qwen2({'; '.join(f'{name}: {text}' for name, text in display.summary(self, self.config).items())})"

    def _repr_html_(self) -> str:
        return display.table(display.summary(self, self.config).items(), "Qwen2")

    def make_cache(self, *, bits: int | None = None, max_size: int | None = None, n_sinks: int = 4) -> list[KVCache]:
        """An empty cache for every layer: see cache.make_caches."""
        config = self.config
        return make_caches(config.num_hidden_layers, config.head_dim, bits=bits, max_size=max_size, n_sinks=n_sinks)


def as_input_ids(ids: InputIds, config: ModelConfig) -> mx.array:
    """Token ids as (B, L). The values of an MLX array are not read, which would wait for them. Raises QwenMLXError for
    what is not one row or several of one length, of integers that are tokens."""
    if not isinstance(ids, mx.array):
        try:
            rows = np.asarray(ids)
        except ValueError:  # rows of several lengths
            rows = np.empty(0)
        if rows.size and rows.dtype.kind in "iu" and not 0 <= rows.min() <= rows.max() < config.vocab_size:
            raise QwenMLXError(
                f"input_ids go from {rows.min()} to {rows.max()}, expected 0 to {config.vocab_size - 1}."
            )
        ids = mx.array(rows.astype(np.int64)) if rows.dtype.kind in "iu" else mx.array(0.5)
    if ids.ndim not in (1, 2) or not ids.size or not mx.issubdtype(ids.dtype, mx.integer):
        raise QwenMLXError("input_ids are not token ids; give integers, one row (L,) or several of one length (B, L).")
    return ids[None] if ids.ndim == 1 else ids


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
