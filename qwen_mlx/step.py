"""One token through the whole model on a GPU, in five launches a layer.

The same equations as model.py's, which reads like the paper: here the norm, the product and what follows it are one
kernel each (ops/matvec.py), and attention reads the cache as it lies, up to the token's position (ops/attend.py), so
that no shape changes from token to token: the graph is built once, until the cache's buffer grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import ops
from .backend import mx, nn
from .cache import KVCache
from .layers import matrices
from .ops import Matrix

if TYPE_CHECKING:
    from .model import Qwen2


def serves(model: Qwen2, input_ids: mx.array, cache: Sequence[KVCache]) -> bool:
    """Whether `Step` computes this call: one token after others, kernels in use, no gradient wanted, a plain cache."""
    return (
        input_ids.size == 1
        and ops.executor("step") != "reference"
        and not ops.recording()
        and not model.config.mlp_bias
        and all(type(layer) is KVCache and layer.offset for layer in cache)
    )


class Step:
    """A model's decoding step. Holds the model's arrays, and is `current` while they are still the model's."""

    def __init__(self, model: Qwen2):
        self._config = model.config
        self._held: list[tuple[dict[str, Any], str, Any]] = []  # an owner, a name, and what the owner has under it
        self._arrays: list[mx.array] = []
        body = model["model"]
        layers = body["layers"]
        self._rotary = layers[0]["self_attn"].rotary
        self._windows = [layer["self_attn"].sliding_window for layer in layers]
        self._embedding = self._matrices(body, "embed_tokens")
        self._layers = []
        for layer in layers:
            attention, mlp = layer["self_attn"], layer["mlp"]
            self._array(layer["input_layernorm"], "weight")
            qkv = self._matrices(attention, "qkv_proj")
            self._array(attention, "qkv_bias")
            o_proj = self._matrices(attention, "o_proj")
            self._array(layer["post_attention_layernorm"], "weight")
            self._layers.append((qkv, o_proj, self._matrices(mlp, "gate_up_proj"), self._matrices(mlp, "down_proj")))
        self._array(body["norm"], "weight")
        self._head = None if model.config.tie_word_embeddings else self._matrices(model, "lm_head")
        self._compiled = ops.compiled(self._run)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model makes its own

    @property
    def current(self) -> bool:
        """Whether the model still has the modules and arrays this was made for."""
        return all(owner[name] is value for owner, name, value in self._held)

    def __call__(self, input_ids: mx.array, cache: Sequence[KVCache]) -> mx.array:
        """Logits (1, 1, vocab_size) of the token after input_ids (1, 1); the cache then holds that token too."""
        buffers, tails, filled = zip(*(layer.tail_for_one() for layer in cache))
        if len(set(filled)) > 1:  # someone looked into one layer's cache meanwhile
            for layer in cache:
                layer.flush()
            buffers, tails, filled = zip(*(layer.tail_for_one() for layer in cache))
        place = mx.array([cache[0].offset, filled[0]], mx.int32)
        logits, *tails = self._compiled(input_ids, place, *buffers, *tails, *self._arrays)
        for layer, tail in zip(cache, tails, strict=True):
            layer.advance(tail)
        return logits

    def _run(self, input_ids: mx.array, place: mx.array, *rest: mx.array) -> list[mx.array]:
        config, eps = self._config, self._config.rms_norm_eps
        n_layers, n_heads, scale = config.n_layers, config.n_heads, config.head_dim**-0.5
        buffers, tails, arrays = rest[:n_layers], list(rest[n_layers : 2 * n_layers]), iter(rest[2 * n_layers :])
        embedding = _take(self._embedding, arrays)
        table = ops.rotation_table(place, self._rotary)
        h = ops.unpack(embedding[0], tails[0].dtype, input_ids)
        for i, (qkv, o_proj, gate_up, down_proj) in enumerate(self._layers):
            norm = next(arrays), eps
            parts, bias = _take(qkv, arrays), next(arrays)
            if len(parts) == 1:
                q, tails[i] = ops.matvec_qkv(h, parts[0], bias, norm, table, tails[i], place, n_heads)
            else:  # q, k and v are stored differently, as in most files of mixed types
                joined = mx.concatenate([ops.matvec(h, part, norm) for part in parts], axis=-1)
                q, kv = ops.qkv_rope(joined, bias, place[:1], self._rotary, n_heads, config.n_kv_heads, join_kv=True)
                q, kv = q.reshape(1, n_heads, 1, -1), kv.reshape(1, 2 * config.n_kv_heads, 1, -1)
                tails[i] = ops.put_in_tail(tails[i], kv, place)
            out = ops.attend_one(q, buffers[i], tails[i], place, scale, self._windows[i])
            h = ops.matvec(out, _take(o_proj, arrays)[0], residual=h)
            norm, parts = (next(arrays), eps), _take(gate_up, arrays)
            if len(parts) == 1:
                act = ops.matvec_swiglu(h, parts[0], norm)
            else:
                act = ops.swiglu(*(ops.matvec(h, part, norm) for part in parts))
            h = ops.matvec(act, _take(down_proj, arrays)[0], residual=h)
        norm = next(arrays), eps
        head = embedding if self._head is None else _take(self._head, arrays)
        return [ops.matvec(h, head[0], norm), *tails]

    def _array(self, owner: nn.Module, name: str) -> None:
        self._held.append((owner, name, owner[name]))
        self._arrays.append(owner[name])

    def _matrices(self, owner: nn.Module, name: str) -> list[ops.Format]:
        """Notes the arrays of a projection and returns how they are stored."""
        module = owner[name]
        self._held.append((owner, name, module))
        for part in module.get("parts", [module]):
            self._held += [(part, key, value) for key, value in part.items() if isinstance(value, mx.array)]
        found = matrices(module)
        self._arrays += [array for matrix in found for array in matrix.arrays]
        return [matrix.format for matrix in found]


def _take(formats: Sequence[ops.Format], arrays: Iterator[mx.array]) -> list[Matrix]:
    """The next matrices among `arrays`, stored so."""
    return [Matrix(form, tuple(next(arrays) for _ in range(form.n_arrays))) for form in formats]
