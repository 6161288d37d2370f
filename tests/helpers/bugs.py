"""Deliberate bugs: ways in which ports of Qwen2 have gone wrong. Each is put into a loaded model or into what it calls
and says at which tap the harness must see it first and what it must call it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from qwen_mlx import ops
from qwen_mlx.backend import mx

LAYER = 1  # where bugs of one layer sit
NOT_THE_FILES = "the operation is right: its weight or bias"


@dataclass(frozen=True)
class Bug:
    name: str
    put: Callable[[Any, pytest.MonkeyPatch], None]
    first: str  # the first tap that diverges
    cause: str | None = None  # part of the diagnosis, None where the bug has no signature
    run: str = "prefill"
    shape: str = "base"
    dtype: str = "float32"


BUGS: list[Bug] = []


def bug(name: str, first: str, cause: str | None = None, **where: str) -> Callable:
    def keep(put: Callable[[Any, pytest.MonkeyPatch], None]) -> Callable:
        BUGS.append(Bug(name, put, first, cause, **where))
        return put

    return keep


def module_of(model: Any, part: str) -> Any:
    """The projection `part` ("q", "up", ...) of the layer where bugs sit."""
    layer = model.model.layers[LAYER]
    return (layer.mlp if part in ("gate", "up", "down") else layer.self_attn)[f"{part}_proj"]


def change_part(model: Any, part: str, kind: str, change: Callable[[mx.array], mx.array]) -> None:
    module = module_of(model, part)
    module[kind] = change(module[kind])


@bug("gate and up swapped", "0.layers.1.gate", "gate and up are swapped")
def _(model, patch):
    gate, up = module_of(model, "gate"), module_of(model, "up")
    gate.weight, up.weight = up.weight, gate.weight


@bug("q_proj transposed", "0.layers.1.q", "square weight is transposed")
def _(model, patch):
    change_part(model, "q", "weight", lambda w: w.T)


@bug("o_proj transposed", "0.layers.1.o", "square weight is transposed")
def _(model, patch):
    module = model.model.layers[LAYER].self_attn.o_proj
    module.weight = module.weight.T


@bug("down_proj in the order of GGUF's dimensions", "0.layers.1.down", "order of the transpose")
def _(model, patch):
    module = model.model.layers[LAYER].mlp.down_proj
    module.weight = module.weight.T.reshape(module.weight.shape)


@bug("q rows permuted as for Llama", "0.layers.1.q", "permuted")
def _(model, patch):
    def permute(w: mx.array) -> mx.array:
        heads, size = model.config.num_attention_heads, model.config.head_dim
        return w.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(w.shape)

    change_part(model, "q", "weight", permute)


for part in "qkv":

    @bug(f"{part} bias dropped", f"0.layers.1.{part}", "bias is missing")
    def _(model, patch, part=part):
        change_part(model, part, "bias", mx.zeros_like)


@bug("q bias negated", "0.layers.1.q", "bias has the wrong sign")
def _(model, patch):
    change_part(model, "q", "bias", lambda b: -b)


@bug("one weight of q off by a thousandth of its size", "0.layers.1.q", NOT_THE_FILES)
def _(model, patch):
    def nudge(w: mx.array) -> mx.array:
        w = mx.array(w)
        w[3, 5] = w[3, 5] + 0.001 * mx.abs(w).max()
        return w

    change_part(model, "q", "weight", nudge)


@bug("up rounded to bfloat16 on its way", "0.layers.1.up", NOT_THE_FILES)
def _(model, patch):
    change_part(model, "up", "weight", lambda w: w.astype(mx.bfloat16).astype(w.dtype))


@bug("biases of two layers exchanged", "0.layers.0.q", NOT_THE_FILES)
def _(model, patch):
    for name in ("q_proj", "k_proj", "v_proj"):
        one, two = (model.model.layers[i].self_attn[name] for i in (0, 1))
        one.bias, two.bias = two.bias, one.bias


@bug("a row of up is NaN", "0.layers.1.up", "NaN")
def _(model, patch):
    change_part(model, "up", "weight", lambda w: mx.where(mx.arange(w.shape[0])[:, None] == 3, mx.nan, w))


@bug("everything is NaN", "0.embeddings", "NaN throughout")
def _(model, patch):
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * mx.nan


def change_rotary(model: Any, make: Callable[[ops.Rotary], ops.Rotary]) -> None:
    model.model.rotary = make(model.model.rotary)


@bug("theta 1e4", "0.layers.0.q_rope", "theta is 10000")
def _(model, patch):
    change_rotary(model, lambda rotary: ops.Rotary.plain(model.config.head_dim, 1e4))


@bug("the configuration's theta is another", "0.layers.0.q_rope", "theta is 10000, the reference's 1e+06")
def _(model, patch):
    model.config = replace(model.config, rope_theta=1e4)
    change_rotary(model, lambda rotary: ops.Rotary.plain(model.config.head_dim, 1e4))


@bug(
    "YaRN's factor on cosine and sine missing",
    "0.layers.0.q_rope",
    "factor on cosine and sine is missing",
    shape="yarn",
)
def _(model, patch):
    change_rotary(model, lambda rotary: replace(rotary, attention_factor=1.0))


@bug("YaRN not applied", "0.layers.0.q_rope", "scaling is not applied", shape="yarn")
def _(model, patch):
    change_rotary(model, lambda rotary: ops.Rotary.plain(model.config.head_dim, model.config.rope_theta))


@bug("RoPE pairs neighbours", "0.layers.0.q_rope", "pairs neighbours")
def _(model, patch):
    rope = ops.rope

    def turn(x, table):
        halves = mx.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        return mx.stack(mx.split(rope(halves, table), 2, axis=-1), axis=-1).reshape(x.shape)

    patch.setattr(ops, "rope", turn)


@bug("RoPE turns the wrong way", "0.layers.0.q_rope", "wrong way")
def _(model, patch):
    rope = ops.rope
    patch.setattr(ops, "rope", lambda x, table: rope(x, table * mx.array([1.0, -1.0])))


@bug("RoPE left out", "0.layers.0.q_rope", "RoPE was left out")
def _(model, patch):
    patch.setattr(ops, "rope", lambda x, table: x)


@bug("RoPE starts at 1", "0.layers.0.q_rope", "off by 1")
def _(model, patch):
    table = ops.Rotary.table
    patch.setattr(ops.Rotary, "table", lambda self, offset, length: table(self, offset + 1, length))


@bug("RoPE ignores the cache's offset", "1.layers.0.q_rope", "offset is not used", run="decode")
def _(model, patch):
    table = ops.Rotary.table
    patch.setattr(ops.Rotary, "table", lambda self, offset, length: table(self, 0, length))


@bug("eps 1e-5 instead of 1e-6", "0.layers.0.input_norm", "eps is 1e-05, expected 1e-06")
def _(model, patch):
    for layer in model.model.layers:
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-5


@bug("the configuration's eps is another", "0.layers.0.input_norm", "eps is 0.0001, the reference's 1e-06")
def _(model, patch):
    model.config = replace(model.config, rms_norm_eps=1e-4)
    for layer in model.model.layers:
        layer.input_layernorm.eps = layer.post_attention_layernorm.eps = 1e-4


@bug("eps added outside the root", "0.layers.0.input_norm", "outside the root")
def _(model, patch):
    def norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return x / (mx.sqrt(mx.mean(x * x, axis=-1, keepdims=True)) + eps) * weight

    patch.setattr(ops, "rms_norm", norm)


@bug("one element of a norm's weight lost", "0.layers.1.input_norm", NOT_THE_FILES)
def _(model, patch):
    norm = model.model.layers[LAYER].input_layernorm
    norm.weight = mx.where(mx.arange(norm.weight.size) == 5, 1.0, norm.weight)


@bug("norm's weight not applied", "0.layers.1.post_norm", "weight is not applied")
def _(model, patch):
    norm = model.model.layers[LAYER].post_attention_layernorm
    norm.weight = mx.ones_like(norm.weight)


@bug("norm's weight plus one, as in Gemma", "0.norm", "1 + weight")
def _(model, patch):
    model.model.norm.weight = 1 + model.model.norm.weight


@bug("norms of a layer swapped", "0.layers.1.input_norm", "are swapped")
def _(model, patch):
    layer = model.model.layers[LAYER]
    one, two = layer.input_layernorm, layer.post_attention_layernorm
    one.weight, two.weight = two.weight, one.weight


@bug("final norm left out", "0.norm", "the norm was left out")
def _(model, patch):
    class Nothing(type(model.model.norm)):
        def __call__(self, x):
            return x

    model.model.norm = Nothing(model.config.hidden_size, 1e-6)
