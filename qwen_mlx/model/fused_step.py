"""One token through the whole model on a GPU, in five launches a layer.

The same equations as model.py's, which reads like the paper: here the norm, the product and what follows it are one
kernel each (ops/matvec.py), and attention reads the cache as it lies, up to the token's position (ops/attend.py), so
that no shape changes from token to token: the graph is built once, until the cache's buffer grows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import ops
from ..backend import mx, nn
from ..ops import Matrix
from .cache import KVCache, tails_for_one
from .layers import matrices

if TYPE_CHECKING:
    from .qwen2 import Qwen2

# Norms' weights, the projections q, k and v with their bias, o, gate and up, down.
Layer = tuple[mx.array, mx.array, tuple[Sequence[Matrix], mx.array], Sequence[Matrix], tuple[Sequence[Matrix], ...]]


def serves(model: Qwen2, input_ids: mx.array, cache: Sequence[KVCache]) -> bool:
    """Whether `Step` computes this call: one token after others, kernels in use, no gradient wanted, a plain cache."""
    return (
        input_ids.size == 1
        and (model.ranks is None or not model.ranks.times_next)
        and ops.executor("step") != "reference"
        and not ops.recording()
        and not model.config.mlp_bias
        and all(type(layer) is KVCache and layer.offset for layer in cache)
    )


class Step:
    """A model's decoding step. Holds the model's arrays, and is `current` while they are still the model's."""

    def __init__(self, model: Qwen2):
        self._config, self._ranks = model.config, model.ranks
        self._held: list[tuple[dict[str, Any], str, Any]] = []  # an owner, a name, and what the owner has under it
        body = model["model"]
        layers = body["layers"]
        self._rotary = body.rotary
        self._windows = [layer["self_attn"].sliding_window for layer in layers]
        self._n_heads, self._n_kv_heads = layers[0]["self_attn"].n_heads, layers[0]["self_attn"].n_kv_heads
        self._embedding = self._matrices(body, "embed_tokens")
        self._layers: list[Layer] = []
        for layer in layers:
            attention, mlp = layer["self_attn"], layer["mlp"]
            qkv = self._matrices(attention, "qkv_proj"), self._array(attention, "qkv_bias")
            norm = self._array(layer["input_layernorm"], "weight")
            mlp_norm = self._array(layer["post_attention_layernorm"], "weight")
            gate_up_down = self._matrices(mlp, "gate_up_proj"), self._matrices(mlp, "down_proj")
            self._layers.append((norm, mlp_norm, qkv, self._matrices(attention, "o_proj"), gate_up_down))
        self._norm = self._array(body["norm"], "weight")
        self._head = self._embedding if model.config.tie_word_embeddings else self._matrices(model, "lm_head")
        # With several ranks these know how their parts come together.
        self._embed = body["embed_tokens"]
        self._logits = self._embed if model.config.tie_word_embeddings else model["lm_head"]
        # The weights are constants of the graph: as arguments they cost 0.1 microseconds each at every token.
        mx.eval([array for _, _, array in self._held if isinstance(array, mx.array)])
        this = weakref.proxy(self)  # a cycle would keep a deleted model's memory until Python collects its garbage
        self._compiled: Callable[..., list[mx.array]] = ops.compiled(lambda *arrays: this._run(*arrays))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model makes its own

    @property
    def current(self) -> bool:
        """Whether the model still has the modules and arrays this was made for."""
        return all(owner[name] is value for owner, name, value in self._held)

    def __call__(self, input_ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
        """Logits (1, 1, vocab_size) of the token after input_ids (1, 1); the cache then holds that token too."""
        buffers, tails, filled = tails_for_one(cache)
        place = mx.array([cache[0].offset, filled, 0, 0], mx.int32)
        table = mx.array(self._rotary.host_table(cache[0].offset, 1))
        if self._ranks is not None:
            self._ranks.begin(chunk=False)
        logits, *longer = self._compiled(input_ids, place, table, *buffers, *tails)
        for layer, tail in zip(cache, longer, strict=True):
            layer.advance(tail)
        return logits

    def _run(self, input_ids: mx.array, place: mx.array, table: mx.array, *rest: mx.array) -> list[mx.array]:
        config, eps = self._config, self._config.rms_norm_eps
        n_layers, n_heads, n_kv_heads, scale = (
            config.num_hidden_layers,
            self._n_heads,
            self._n_kv_heads,
            config.head_dim**-0.5,
        )
        buffers, tails = rest[:n_layers], list(rest[n_layers:])
        table, place = table + 0, place + 0  # into the GPU's own memory: see backend.in_gpu_memory
        angles = table[0, 0]
        if self._ranks is None:
            h = ops.unpack(self._embedding[0], tails[0].dtype, input_ids)
        else:
            h = self._embed.rows(input_ids)
        for i, (norm, mlp_norm, (qkv, bias), o_proj, (gate_up, down_proj)) in enumerate(self._layers):
            if len(qkv) <= 2:
                q, tails[i] = ops.matvec_qkv(h, qkv, bias, (norm, eps), angles, tails[i], place, n_heads)
            else:  # q, k and v are stored in three ways
                joined = mx.concatenate([ops.matvec(h, part, (norm, eps)) for part in qkv], axis=-1)
                q, kv = ops.qkv_rope(joined, bias, table, n_heads, n_kv_heads)
                q, kv = q.reshape(1, n_heads, 1, -1), kv.reshape(1, 2 * n_kv_heads, 1, -1)
                tails[i] = ops.put_recent(tails[i], kv, place)
            out = ops.decode_attention(q, buffers[i], tails[i], place, scale, self._windows[i])
            h = self._add(h, out, o_proj[0])
            if len(gate_up) == 1:
                act = ops.matvec_swiglu(h, gate_up[0], (mlp_norm, eps))
            else:
                act = ops.swiglu(*(ops.matvec(h, part, (mlp_norm, eps)) for part in gate_up))
            h = self._add(h, act, down_proj[0])
        logits = ops.matvec(h, self._head[0], (self._norm, eps))
        return [logits if self._ranks is None else self._logits.join(logits), *tails]

    def _add(self, h: mx.array, x: mx.array, matrix: Matrix) -> mx.array:
        """h + matrix @ x; of several ranks each has some columns, and the first has h."""
        if self._ranks is None:
            return ops.matvec(x, matrix, residual=h)
        total: mx.array = self._ranks.sum(ops.matvec(x, matrix, residual=None if self._ranks.rank else h))
        return total

    def _array(self, owner: nn.Module, name: str) -> mx.array:
        """An array of a module, which the model must keep for this step to stay current."""
        array: mx.array = owner[name]
        self._held.append((owner, name, array))
        return array

    def _matrices(self, owner: nn.Module, name: str) -> Sequence[Matrix]:
        """The matrices of a projection, likewise."""
        module = owner[name]
        self._held.append((owner, name, module))
        if self._ranks is not None and "part" in module:
            return self._matrices(module, "part")
        for part in module.get("parts", [module]):
            self._held += [(part, key, value) for key, value in part.items() if isinstance(value, mx.array)]
        return matrices(module)
