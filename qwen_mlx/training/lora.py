"""LoRA beside a model's matrices (Hu et al. 2021, arXiv:2106.09685): W x + alpha / rank b (a x), and its loss.

DoRA (Liu et al. 2024, arXiv:2402.09353) gives the rows of W + alpha / rank b a the lengths m, which are trained, too.

The model's own modules compute it: they add what lies beside their matrix as lora_a and lora_b (model/layers.py), so
that a loaded adapter and one in training are the same code, on dense matrices and on packed ones. Only a and b are
given to MLX's gradients; nothing of the model is copied, unpacked for good or changed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .. import ops
from ..backend import mx, nn
from ..errors import QwenMLXError
from ..model.cache import KVCache, heads_first
from ..model.layers import matrix_of
from ..model.qwen2 import Qwen2
from ..ops import Matrix
from .data import Batch

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *MLP)
ROWS = 1024  # predictions whose logits exist at a time: 0.6 GB for Qwen2.5's vocabulary in float32
# By a module's name: "a" (rank, in), "b" (out, rank) and for DoRA "m" (out,), float32.
Factors = dict[str, dict[str, mx.array]]


@dataclass(frozen=True)
class LoraSettings:
    """An adapter's shape. rank: rows of a; alpha: the change's scale times the rank; targets: projections that have
    one; num_layers: only the last so many, None for all; dropout: the share of x's elements that a step hides from a;
    dora: train the lengths of rows, too. Raises QwenMLXError for values that cannot be."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    num_layers: int | None = None
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise QwenMLXError(f"rank is {self.rank}, expected 1 or more.")
        if not 0 < self.alpha < math.inf:
            raise QwenMLXError(f"alpha is {self.alpha}, expected a positive number.")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise QwenMLXError(f"targets are {', '.join(self.targets)}, expected some of {', '.join(TARGETS)}, once.")
        if self.num_layers is not None and self.num_layers < 1:
            raise QwenMLXError(f"num_layers is {self.num_layers}, expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise QwenMLXError(f"dropout is {self.dropout}, expected 0 or more and less than 1.")

    @property
    def scale(self) -> float:
        """The factor of b a."""
        return self.alpha / self.rank

    def first_layer(self, n_layers: int) -> int:
        """The first layer with an adapter, of so many."""
        return 0 if self.num_layers is None else max(0, n_layers - self.num_layers)

    @property
    def keys(self) -> list[str]:
        """The projections' names within a layer."""
        return [f"self_attn.{n}" if n in ATTENTION else f"mlp.{n}" for n in TARGETS if n in self.targets]

    def modules(self, n_layers: int) -> list[str]:
        """The adapted modules' names in a model of so many layers."""
        layers = range(self.first_layer(n_layers), n_layers)
        return [f"model.layers.{i}.{key}" for i in layers for key in self.keys]


def module_at(model: Qwen2, name: str) -> nn.Module:
    """The projection of this name."""
    _, _, layer, part, projection = name.split(".")
    module: nn.Module = model.model.layers[int(layer)][part][projection]
    return module


def new_factors(model: Qwen2, settings: LoraSettings, seed: int) -> Factors:
    """Factors to begin with: a uniform within 1 / sqrt(in), as peft's and mlx-lm's, and b zero, so that the model is
    still the base's. The numbers depend on the seed and not on the device. Raises QwenMLXError for a model that has an
    adapter already or is one rank's part."""
    if model.ranks is not None or model.adapter_digest:
        raise QwenMLXError("The model has an adapter already, or is one rank's part; load the base alone.")
    rng, factors = np.random.default_rng(seed), {}
    for name in settings.modules(len(model.model.layers)):
        matrix = matrix_of(module_at(model, name))
        bound = 1 / math.sqrt(matrix.columns)
        a = rng.uniform(-bound, bound, (settings.rank, matrix.columns)).astype(np.float32)
        factors[name] = {"a": mx.array(a), "b": mx.zeros((matrix.rows, settings.rank))}
        if settings.dora:
            factors[name]["m"] = mx.sqrt(mx.square(ops.unpack(matrix, mx.float32)).sum(axis=1))
            mx.eval(factors[name])  # or all the values would be there at once
    return factors


class Dropout(NamedTuple):
    """The elements of x that a step hides from the factors: a share `rate` of them, drawn with a key of MLX's."""

    rate: float
    key: mx.array

    def keep(self, shape: tuple[int, ...], name: str, dtype: mx.Dtype) -> mx.array:
        """The factors of a module's input, by the module's name: 0, or the inverse of the share that stays."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        own = self.key + mx.array([0, number], mx.uint32)
        return mx.random.bernoulli(1 - self.rate, shape, key=own).astype(dtype) / (1 - self.rate)


class Beside(NamedTuple):
    """The way factors stand beside a model's matrices: the scale of b, the lengths of W's own rows by module for DoRA,
    and dropout, in a step alone."""

    scale: float
    lengths: Mapping[str, mx.array] = MappingProxyType({})
    dropout: Dropout | None = None


def put_beside(model: Qwen2, factors: Factors, beside: Beside, shape: tuple[int, ...] = ()) -> None:
    """Lets the model's modules add the factors' products, in the activations' dtype. shape: (B, L), for dropout."""
    dtype = model.model.norm.weight.dtype
    for name, parts in factors.items():
        module, a, b = module_at(model, name), parts["a"], beside.scale * parts["b"]
        if "m" in parts:
            growth = parts["m"] / _row_lengths(matrix_of(module).base, a, b, beside.lengths[name])
            module.lora_row_scale, b = growth.astype(dtype), growth[:, None] * b
        if beside.dropout is not None:
            module.lora_keep = beside.dropout.keep((*shape, a.shape[1]), name, dtype)
        module.lora_a, module.lora_b = a.astype(dtype), b.astype(dtype)


def _row_lengths(base: Matrix, a: mx.array, b: mx.array, own: mx.array) -> mx.array:
    """The lengths of the rows of W + b a, with W's own: constants to a gradient (Liu et al. 2024, section 4.3). W a^T
    and a a^T are enough for them, so that W + b a is not formed."""
    squares = mx.square(own) + (b * (2 * ops.multiply(a, base).T + b @ (a @ a.T))).sum(axis=1)
    return mx.stop_gradient(mx.sqrt(squares))


def take_away(model: Qwen2, factors: Factors) -> None:
    """Undoes put_beside."""
    for name in factors:
        module = module_at(model, name)
        for array in ("lora_a", "lora_b", "lora_row_scale", "lora_keep"):
            module.pop(array, None)


class _NoCache(KVCache):
    """Gives a layer the keys and values of its own call, and stores nothing."""

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        heads = heads_first(kv)
        return heads[:, : kv.shape[3]], heads[:, kv.shape[3] :]


def summed_loss(model: Qwen2, factors: Factors, beside: Beside, batch: Batch, checkpoint: bool = False) -> mx.array:
    """The sum of -ln p over a batch's targets, a float32 scalar: logits and their softmax are float32.

    checkpoint: keep each layer's input alone, and compute the layer once more for its gradient. The logits of ROWS
    predictions exist at a time, and are computed once more in any case; positions without a target have none.
    """
    hidden = _hidden(model, factors, beside, batch, checkpoint)
    hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.positions)]
    targets = mx.array(batch.targets)

    def loss(piece: slice) -> mx.array:
        def of_rows(rows: mx.array) -> mx.array:
            logits = model.head(rows).astype(mx.float32)
            return nn.losses.cross_entropy(logits, targets[piece], reduction="sum")

        several = hidden.shape[0] > ROWS
        value: mx.array = (mx.checkpoint(of_rows) if several or checkpoint else of_rows)(hidden[piece])
        return value

    pieces = [slice(start, start + ROWS) for start in range(0, hidden.shape[0], ROWS)]
    total: mx.array = sum(map(loss, pieces), mx.array(0.0))
    return total


def _hidden(model: Qwen2, factors: Factors, beside: Beside, batch: Batch, checkpoint: bool) -> mx.array:
    """model.model(batch.inputs) with factors beside its matrices, layer by layer for `checkpoint`."""
    body, cache, inputs = model.model, _NoCache(), mx.array(batch.inputs)
    rotation, masks = body.positions(inputs.shape[1], [cache])
    if batch.segments is not None:
        masks = {window: _within(batch.segments, mask) for window, mask in masks.items()}
    hidden = body.embed_tokens(inputs)
    for i, layer in enumerate(body.layers):
        own = {name: pair for name, pair in factors.items() if name.startswith(f"model.layers.{i}.")}

        def run(x: mx.array, own: Factors, layer: nn.Module = layer) -> mx.array:
            put_beside(model, own, beside, inputs.shape)
            result: mx.array = layer(x, rotation, cache, masks[layer.self_attn.sliding_window])
            return result

        hidden = (mx.checkpoint(run) if checkpoint and own else run)(hidden, own)
    return body.norm(hidden)


def _within(segments: np.ndarray, mask: mx.array | str | None) -> mx.array:
    """A causal mask that shows a token nothing of other segments (B, L). Rotary positions are relative and go on."""
    before = mask if isinstance(mask, mx.array) else mx.array(np.tri(segments.shape[1], dtype=bool))
    own = mx.array(segments)
    seen: mx.array = (own[:, None, :, None] == own[:, None, None, :]) & before
    return seen


def n_parameters(factors: Mapping[str, Mapping[str, mx.array]]) -> int:
    """Numbers that are trained."""
    return sum(array.size for pair in factors.values() for array in pair.values())
