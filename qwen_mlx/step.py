"""One token through the model on a GPU, in four launches a layer besides attention.

The same equations as model.py's, which reads like the paper: here the norm, the product and what follows it are one
kernel each (see ops/matvec.py), and each half of a layer is one graph, built once and shared by all layers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import ops
from .backend import mx, nn
from .cache import KVCache
from .layers import matrices
from .ops import Format, Matrix

if TYPE_CHECKING:
    from .model import Qwen2

Formats = tuple[tuple[Format, ...], ...]  # of each module


def serves(model: Qwen2, input_ids: mx.array, cache: Sequence[KVCache]) -> bool:
    """Whether `logits` computes this call: one token, kernels in use, no gradient wanted, and a plain cache."""
    return (
        input_ids.size == 1
        and ops.executor() != "reference"
        and not ops.recording()
        and not model.config.mlp_bias
        and all(type(layer) is KVCache for layer in cache)
    )


def logits(model: Qwen2, input_ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
    """Logits (1, 1, vocab_size) of the token after input_ids (1, 1)."""
    config, eps = model.config, model.config.rms_norm_eps
    scale = config.head_dim**-0.5
    body = model["model"]
    layers = body["layers"]
    rotary = layers[0]["self_attn"].rotary
    offset = mx.array([cache[0].offset], mx.int32)
    table = ops.rotation_table(offset, rotary)
    h = body["embed_tokens"](input_ids)
    for layer, layer_cache in zip(layers, cache, strict=True):
        attention, mlp = layer["self_attn"], layer["mlp"]
        formats, arrays = _flat(attention["qkv_proj"])
        project = _project(formats, eps, config.n_heads, config.n_kv_heads, rotary if len(formats[0]) > 1 else None)
        q, kv = project(h, table, offset, layer["input_layernorm"]["weight"], attention["qkv_bias"], *arrays)
        out = layer_cache.attend_one(q, kv, scale, attention.sliding_window)
        formats, arrays = _flat(attention["o_proj"], mlp["gate_up_proj"], mlp["down_proj"])
        h = _rest(formats, eps)(h, out, layer["post_attention_layernorm"]["weight"], *arrays)
    formats, arrays = _flat(body["embed_tokens"] if config.tie_word_embeddings else model["lm_head"])
    return _head(formats, eps)(h, body["norm"]["weight"], *arrays)


@functools.lru_cache(maxsize=64)
def _project(formats: Formats, eps: float, n_heads: int, n_kv_heads: int, rotary: ops.Rotary | None) -> Callable:
    """(h, table, offset, norm's weight, bias, matrices) to q and kv of one token, turned."""

    def project(
        h: mx.array, table: mx.array, offset: mx.array, weight: mx.array, bias: mx.array, *arrays: mx.array
    ) -> tuple[mx.array, mx.array]:
        (parts,) = _grouped(formats, arrays)
        if len(parts) == 1:
            return ops.matvec_qkv(h, parts[0], bias, (weight, eps), table, n_heads, n_kv_heads)
        # q, k and v are stored differently, as in most files of mixed types.
        joined = mx.concatenate([ops.matvec(h, part, (weight, eps)) for part in parts], axis=-1)
        q, kv = ops.qkv_rope(joined, bias, offset, rotary, n_heads, n_kv_heads, join_kv=True)
        return q.reshape(1, n_heads, 1, -1), kv.reshape(1, 2 * n_kv_heads, 1, -1)

    return ops.compiled(project)


@functools.lru_cache(maxsize=64)
def _rest(formats: Formats, eps: float) -> Callable:
    """(h, attention's output, norm's weight, matrices) to h after the layer."""

    def rest(h: mx.array, out: mx.array, weight: mx.array, *arrays: mx.array) -> mx.array:
        (o_proj,), gate_up, (down_proj,) = _grouped(formats, arrays)
        h = ops.matvec(out, o_proj, residual=h)
        if len(gate_up) == 1:
            act = ops.matvec_swiglu(h, gate_up[0], (weight, eps))
        else:
            act = ops.swiglu(*(ops.matvec(h, part, (weight, eps)) for part in gate_up))
        return ops.matvec(act, down_proj, residual=h)

    return ops.compiled(rest)


@functools.lru_cache(maxsize=8)
def _head(formats: Formats, eps: float) -> Callable:
    """(h, norm's weight, matrix) to logits."""

    def head(h: mx.array, weight: mx.array, *arrays: mx.array) -> mx.array:
        ((matrix,),) = _grouped(formats, arrays)
        return ops.matvec(h, matrix, (weight, eps))

    return ops.compiled(head)


def _flat(*modules: nn.Module) -> tuple[Formats, list[mx.array]]:
    """How each module's matrices are stored, and their arrays, one after the other."""
    formats, arrays = [], []
    for module in modules:
        parts = matrices(module)
        formats.append(tuple(matrix.format for matrix in parts))
        for matrix in parts:
            arrays += matrix.arrays
    return tuple(formats), arrays


def _grouped(formats: Formats, arrays: Sequence[mx.array]) -> list[list[Matrix]]:
    """The modules' matrices that _flat took apart."""
    rest = iter(arrays)
    return [[Matrix(form, tuple(itertools.islice(rest, form.n_arrays))) for form in module] for module in formats]
