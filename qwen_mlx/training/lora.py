"""LoRA beside a model's matrices (Hu et al. 2021, arXiv:2106.09685): W x + alpha / rank b (a x), and its loss.

The model's own modules compute it: they add what lies beside their matrix as lora_a and lora_b (model/layers.py), so
that a loaded adapter and one in training are the same code, on dense matrices and on packed ones. Only a and b are
given to MLX's gradients; nothing of the model is copied, unpacked for good or changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..backend import mx, nn
from ..errors import QwenMLXError
from ..model.cache import KVCache, heads_first
from ..model.layers import matrix_of
from ..model.qwen2 import Qwen2
from .data import Batch

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TARGETS = (*ATTENTION, *MLP)
ROWS = 1024  # predictions whose logits exist at a time: 0.6 GB for Qwen2.5's vocabulary in float32
Factors = dict[str, dict[str, mx.array]]  # by a module's name: "a" (rank, in) and "b" (out, rank), float32


@dataclass(frozen=True)
class LoraSettings:
    """An adapter's shape. rank: rows of a; alpha: the change's scale times the rank; targets: projections that have
    one; num_layers: only the last so many, None for all. Raises QwenMLXError for values that cannot be."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS
    num_layers: int | None = None

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
    return factors


def put_beside(model: Qwen2, factors: Factors, scale: float) -> None:
    """Lets the model's modules add the factors' products, in the activations' dtype."""
    dtype = model.model.norm.weight.dtype
    for name, pair in factors.items():
        module = module_at(model, name)
        module.lora_a, module.lora_b = pair["a"].astype(dtype), (scale * pair["b"]).astype(dtype)


def take_away(model: Qwen2, factors: Factors) -> None:
    """Undoes put_beside."""
    for name in factors:
        module = module_at(model, name)
        for array in ("lora_a", "lora_b"):
            module.pop(array, None)


class _NoCache(KVCache):
    """Gives a layer the keys and values of its own call, and stores nothing."""

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        heads = heads_first(kv)
        return heads[:, : kv.shape[3]], heads[:, kv.shape[3] :]


def summed_loss(model: Qwen2, factors: Factors, scale: float, batch: Batch, checkpoint: bool = False) -> mx.array:
    """The sum of -ln p over a batch's targets, a float32 scalar: logits and their softmax are float32.

    checkpoint: keep each layer's input alone, and compute the layer once more for its gradient. The logits of ROWS
    predictions exist at a time, and are computed once more in any case; positions without a target have none.
    """
    hidden = _hidden(model, factors, scale, mx.array(batch.inputs), checkpoint)
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


def _hidden(model: Qwen2, factors: Factors, scale: float, inputs: mx.array, checkpoint: bool) -> mx.array:
    """model.model(inputs) with factors beside its matrices, layer by layer for `checkpoint`."""
    body, cache = model.model, _NoCache()
    rotation, masks = body.positions(inputs.shape[1], [cache])
    hidden = body.embed_tokens(inputs)
    for i, layer in enumerate(body.layers):
        own = {name: pair for name, pair in factors.items() if name.startswith(f"model.layers.{i}.")}

        def run(x: mx.array, own: Factors, layer: nn.Module = layer) -> mx.array:
            put_beside(model, own, scale)
            result: mx.array = layer(x, rotation, cache, masks[layer.self_attn.sliding_window])
            return result

        hidden = (mx.checkpoint(run) if checkpoint and own else run)(hidden, own)
    return body.norm(hidden)


def n_parameters(factors: Mapping[str, Mapping[str, mx.array]]) -> int:
    """Numbers that are trained."""
    return sum(array.size for pair in factors.values() for array in pair.values())
