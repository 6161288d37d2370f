"""The same function as Qwen2's in fewer launches and without gradients: what generation and evaluation compute with.

Several tokens: q, k, v are one product and gate, up another; a residual addition and the norm after it are one pass.
One token on a GPU with kernels: five launches a layer, in one graph that is built once. Norm, product and what follows
it are one kernel each, and attention reads the cache as it lies, up to the token's position, so that no shape changes
from token to token until the cache's buffer grows. One token of each row of a batch goes the same way, with the
products of several tokens.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..backend import in_gpu_memory, mx, nn
from ..ops import Matrix
from .batch_cache import BatchKVCache
from .cache import RECENT, KVCache, recent_of
from .layers import join_rows, matrix_of, temporary_bytes
from .qwen2 import Qwen2, TransformerBlock

# A pass whose temporary arrays take SMALL bytes in all is evaluated at once, a larger one after each PIECE of bytes.
SMALL, PIECE = 512 << 20, 128 << 20

Attend = Callable[[int, mx.array, mx.array], mx.array]  # layer, q, kv -> attention (B, L, H head_dim)
Compiled = Callable[..., list[mx.array]]


class _Layer(NamedTuple):
    """A block's arrays as the fused form reads them; o_proj and down_proj are modules, which may sum over ranks."""

    input_norm: mx.array
    qkv: Sequence[Matrix]
    qkv_bias: mx.array
    window: int | None
    o_proj: nn.Module
    post_norm: mx.array
    gate_up: Sequence[Matrix]
    gate_up_bias: mx.array | None
    down_proj: nn.Module
    outputs: tuple[Matrix, Matrix]  # of o_proj and down_proj


class _Pieces:
    """Evaluates a pass in pieces of PIECE bytes while it is built, at most two of them under way: else memory would
    hold the unpacked matrices and the activations of all layers at once."""

    def __init__(self) -> None:
        self._bytes = 0
        self._under_way: tuple[mx.array, ...] = ()

    def add(self, nbytes: int, *arrays: mx.array) -> None:
        """Notes that temporary arrays of `nbytes` have led to `arrays`, from which the pass goes on."""
        self._bytes += nbytes
        if self._bytes >= PIECE:
            mx.async_eval(arrays)
            mx.eval(self._under_way)
            self._bytes, self._under_way = 0, arrays


class FusedModel:
    """A model's fused form; `of` gives the current one. It keeps the model's modules and arrays, not the model."""

    def __init__(self, model: Qwen2):
        body = model.model
        self._body, self._config, self._ranks = body, model.config, model.ranks
        self._eps = model.config.rms_norm_eps
        self._layers = [_layer(block) for block in body.layers]
        attention = body.layers[0].self_attn  # a rank has some of the model's heads
        self._n_heads, self._n_kv_heads, self._head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self._head_module = body.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        self._windows = {layer.window for layer in self._layers}
        matrices = [m for layer in self._layers for m in (*layer.qkv, *layer.gate_up, *layer.outputs)]
        dtype = self._layers[0].input_norm.dtype
        self._temporary_bytes = functools.lru_cache(lambda n_vectors: temporary_bytes(n_vectors, dtype, matrices))
        modules = [*body.modules(), *self._head_module.modules()]
        self._modules, self._sizes = modules, list(map(len, modules))
        items = [(module, name, value) for module in modules for name, value in module.items()]
        self._owners, self._names, self._values = zip(*items)
        self._step_positions: tuple[int, mx.array] = (-1, mx.array(0))
        # A proxy: a cycle would keep a deleted model's memory until Python collects its garbage.
        this = weakref.proxy(self)
        self._one_row: Compiled = ops.compiled(lambda *arrays: this._run_one_row(*arrays), lambda: this._constants())
        self._rows: Compiled = ops.compiled(lambda *arrays: this._run_rows(*arrays), lambda: this._constants())

    @classmethod
    def of(cls, model: Qwen2) -> FusedModel:
        """The model's fused form, made anew where the model has other modules or arrays than when it was made."""
        fused: FusedModel | None = getattr(model, "_fused", None)
        if fused is None or not fused._is_of(model):
            fused = model._fused = cls(model)
        return fused

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model makes its own

    def _is_of(self, model: Qwen2) -> bool:
        head = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
        if not (model.model is self._body and head is self._head_module and model.ranks is self._ranks):
            return False
        if list(map(len, self._modules)) != self._sizes:
            return False
        return all(map(operator.is_, map(dict.get, self._owners, self._names), self._values))

    def __call__(self, input_ids: mx.array, cache: Sequence[KVCache], logits_to_keep: int = 1) -> mx.array:
        """Logits (B, L or logits_to_keep, vocab_size) as Qwen2's; 0 keeps all. The cache then holds the tokens too."""
        with ops.no_grad():
            if self.supports_step(input_ids, cache):
                return self._step(input_ids, cache)
            return self.head(self.hidden(input_ids, cache, logits_to_keep))

    def head(self, hidden: mx.array) -> mx.array:
        """Logits (..., vocab_size) of normalised hidden states (..., hidden_size)."""
        head: Callable[[mx.array], mx.array] = self._head_module
        if self._config.tie_word_embeddings:
            if self._ranks is None:
                return ops.multiply(hidden, matrix_of(self._head_module))
            head = self._head_module.as_linear
        return head(hidden)

    def hidden(self, input_ids: mx.array, cache: Sequence[KVCache], keep: int = 0) -> mx.array:
        """Normalised hidden states (B, L or keep, hidden_size) of input_ids (B, L); the cache then holds the tokens."""
        with ops.no_grad():
            length = input_ids.shape[1]
            rotation = self._body.rotary.table(cache[0].positions, length)
            masks = {window: cache[0].mask(length, window) for window in self._windows}

            def attend(i: int, q: mx.array, kv: mx.array) -> mx.array:
                keys, values = cache[i].update(kv)
                return ops.attention(q, keys, values, self._head_dim**-0.5, masks[self._layers[i].window]).flatten(2)

            pieces = _Pieces() if self._temporary_bytes(input_ids.size) > SMALL else None
            return self._forward(input_ids, rotation, attend, keep, pieces)

    def _forward(
        self, input_ids: mx.array, rotation: mx.array, attend: Attend, keep: int, pieces: _Pieces | None = None
    ) -> mx.array:
        if self._ranks is None:
            h = self._embedded(input_ids, self._layers[0].input_norm.dtype)
        else:
            h = self._body.embed_tokens(input_ids)  # which begins a pass
        x = ops.rms_norm(h, self._layers[0].input_norm, self._eps)
        following = [*(layer.input_norm for layer in self._layers[1:]), self._body.norm.weight]
        for i, (layer, next_norm) in enumerate(zip(self._layers, following)):
            qkv = ops.multiply_all(x, layer.qkv)
            q, kv = ops.qkv_rope(qkv, layer.qkv_bias, rotation, self._n_heads, self._n_kv_heads)
            out = layer.o_proj(attend(i, q, kv))
            h, x = ops.add_rms_norm(out, h, layer.post_norm, self._eps)
            gate_up = ops.multiply_all(x, layer.gate_up)
            if pieces is not None:
                matrices = (*layer.qkv, layer.outputs[0], *layer.gate_up)
                pieces.add(temporary_bytes(input_ids.size, x.dtype, matrices), h, gate_up)
            out = layer.down_proj(ops.swiglu_joined(gate_up, layer.gate_up_bias))
            del qkv, q, kv, gate_up  # an array lives as long as it has a name
            if pieces is not None:
                pieces.add(temporary_bytes(input_ids.size, x.dtype, layer.outputs[1:]), h, out)
            if i == len(self._layers) - 1 and keep < h.shape[1]:
                out, h = out[:, -keep:], h[:, -keep:]
            h, x = ops.add_rms_norm(out, h, next_norm, self._eps)
        return x

    # -----------------------------------------------------------------------------------------------------------------
    # One token of each row, after others

    def supports_step(self, input_ids: mx.array, cache: Sequence[KVCache]) -> bool:
        """True for one token of each row after others, with kernels, on plain caches."""
        if input_ids.shape[1] != 1 or ops.executor("step") == "reference" or not cache[0].offset:
            return False
        if type(cache[0]) is BatchKVCache:
            return self._ranks is None and ops.executor("attend") != "reference"
        timed = self._ranks is not None and self._ranks.next_step_timed
        plain = all(type(layer) is KVCache and layer.offset for layer in cache)
        config = self._config
        unusual = config.mlp_bias or config.o_proj_bias or config.lm_head_bias
        return input_ids.size == 1 and plain and not timed and not unusual

    def _step(self, input_ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
        buffers, recent, n_buffered = recent_of(cache)
        rotation = self._body.rotary.table(cache[0].positions, 1)
        position = self._position(cache[0].offset, n_buffered)
        if isinstance(cache[0], BatchKVCache):
            padding = cache[0].padding.array
            logits, *newer = self._rows(input_ids, rotation, position, padding, *buffers, *recent)
        else:
            if self._ranks is not None:
                self._ranks.begin_pass(chunk=False)
            logits, *newer = self._one_row(input_ids, rotation[0, 0], position, *buffers, *recent)
        for layer, tokens in zip(cache, newer, strict=True):
            layer.advance(tokens)
        return logits

    def _position(self, offset: int, n_buffered: int) -> mx.array:
        """The token's position and the number of tokens before the newest, int32 (4,), of which the first two are
        read: MLX keeps arrays of up to 8 bytes in the host's memory.
        """
        if self._step_positions[0] != n_buffered:
            rows = [[n_buffered + i, n_buffered, 0, 0] for i in range(RECENT)]
            self._step_positions = n_buffered, in_gpu_memory(np.array(rows, np.int32))
        return self._step_positions[1][offset - n_buffered]

    def _run_rows(
        self, input_ids: mx.array, rotation: mx.array, position: mx.array, padding: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        n_layers = len(self._layers)
        buffers, recent = arrays[:n_layers], list(arrays[n_layers:])

        def attend(i: int, q: mx.array, kv: mx.array) -> mx.array:
            rows, _, n_heads, head_dim = q.shape
            recent[i] = ops.put_recent(recent[i], ops.reshaped(kv, (rows, -1, 1, head_dim)), position)
            out = ops.decode_attention(
                ops.reshaped(q, (rows, n_heads, 1, head_dim)),
                buffers[i],
                recent[i],
                position,
                head_dim**-0.5,
                self._layers[i].window,
                padding,
            )
            return ops.reshaped(out, (rows, 1, -1))

        return [self.head(self._forward(input_ids, rotation, attend, 1)), *recent]

    def _constants(self) -> list[mx.array]:
        """The arrays that a step reads beside its arguments."""
        modules = [self._body.embed_tokens, self._head_module]
        matrices = [matrix_of(module) for module in modules if "part" not in module]
        arrays = [self._body.norm.weight]
        for layer in self._layers:
            arrays += [layer.input_norm, layer.post_norm, layer.qkv_bias]
            matrices += [*layer.qkv, *layer.gate_up, *layer.outputs]
        for matrix in matrices:
            arrays += [array for array in (*matrix.arrays, *(matrix.low_rank or ())) if array is not None]
        return arrays

    def _run_one_row(
        self, input_ids: mx.array, table: mx.array, position: mx.array, *arrays: mx.array
    ) -> list[mx.array]:
        n_layers, n_heads, eps = len(self._layers), self._n_heads, self._eps
        buffers, recent = arrays[:n_layers], list(arrays[n_layers:])
        h = self._embedded(input_ids, recent[0].dtype)
        for i, layer in enumerate(self._layers):
            norm = layer.input_norm, eps
            if len(layer.qkv) <= 2:
                q, recent[i] = ops.matvec_qkv(h, layer.qkv, layer.qkv_bias, norm, table, recent[i], position, n_heads)
            else:  # q, k and v are packed in three ways
                qkv = mx.concatenate([ops.matvec(h, matrix, norm) for matrix in layer.qkv], axis=-1)
                q, kv = ops.qkv_rope(qkv, layer.qkv_bias, table[None, None], n_heads, self._n_kv_heads)
                q = q.reshape(1, n_heads, 1, -1)
                recent[i] = ops.put_recent(recent[i], kv.reshape(1, 2 * self._n_kv_heads, 1, -1), position)
            scale = self._head_dim**-0.5
            out = ops.decode_attention(q, buffers[i], recent[i], position, scale, layer.window)
            h = self._add(h, out, layer.o_proj)
            norm = layer.post_norm, eps
            if len(layer.gate_up) == 1:
                out = ops.matvec_swiglu(h, layer.gate_up[0], norm)
            else:
                out = ops.swiglu(*(ops.matvec(h, matrix, norm) for matrix in layer.gate_up))
            h = self._add(h, out, layer.down_proj)
        norm = self._body.norm.weight, eps
        if self._ranks is None:
            return [ops.matvec(h, matrix_of(self._head_module), norm), *recent]
        return [self._head_module.gather(ops.matvec(h, matrix_of(self._head_module.part), norm)), *recent]

    def _embedded(self, input_ids: mx.array, dtype: mx.Dtype) -> mx.array:
        embeddings = self._body.embed_tokens
        if self._ranks is None:
            return ops.unpack(matrix_of(embeddings), dtype, input_ids)
        rows: mx.array = embeddings.rows(input_ids)
        return rows

    def _add(self, h: mx.array, x: mx.array, module: nn.Module) -> mx.array:
        """h + module(x); of several ranks each has some columns of the matrix, and the first adds h."""
        if self._ranks is None:
            return ops.matvec(x, matrix_of(module), residual=h)
        total: mx.array = self._ranks.all_sum(
            ops.matvec(x, matrix_of(module.part), residual=None if self._ranks.rank else h)
        )
        return total


def _layer(block: TransformerBlock) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_proj, mlp.up_proj]
    matrices, biases = (join_rows(qkv), join_rows(gate_up)), (_joined_bias(qkv), _joined_bias(gate_up))
    if biases[0] is None:
        raise ValueError("The projections of q, k and v have no biases, which every Qwen2 has.")
    o_proj, down_proj = (module.part if "part" in module else module for module in (attention.o_proj, mlp.down_proj))
    return _Layer(
        block.input_layernorm.weight,
        matrices[0],
        biases[0],
        attention.sliding_window,
        attention.o_proj,
        block.post_attention_layernorm.weight,
        matrices[1],
        biases[1],
        mlp.down_proj,
        (matrix_of(o_proj), matrix_of(down_proj)),
    )


def _joined_bias(modules: Sequence[nn.Module]) -> mx.array | None:
    biases = [module["bias"] for module in modules if "bias" in module]
    if not biases:
        return None
    joined = mx.concatenate(biases)
    mx.eval(joined)
    return joined
