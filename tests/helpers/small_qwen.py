"""Small random models in every form of weights, and what two of them are compared by."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qwen_mlx import ModelConfig, Qwen2, ops
from qwen_mlx.model.layers import GGUFEmbedding, GGUFLinear, MergedLinear, QuantizedEmbedding, QuantizedLinear
from tests.helpers.packed import raw_blocks


def model_of(form: str, tied: bool) -> Qwen2:
    """A small random model whose matrices are stored in one format, or in two side by side."""
    config = ModelConfig(256, 512, 2, 4, 2, 64, 300, 1e-6, 1e6, 512, tied)
    model = Qwen2(config)
    keys = iter(mx.random.split(mx.random.key(3), 100))
    weights = [
        (name, mx.random.normal(array.shape, key=next(keys)) * 0.05) for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights([(name, array + ("norm" in name)) for name, array in weights])
    embeddings = {"model.embed_tokens"}
    for name, module in model.named_modules():
        if form == "dense" or not hasattr(module, "weight") or module.weight.ndim != 2:
            continue
        new = packed(form, module.weight, name in embeddings)
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
        setattr(parent, last, new)
    return model


def packed(form: str, weight: mx.array, embedding: bool) -> nn.Module:
    rows, columns = weight.shape
    if form == "affine":
        arrays = mx.quantize(weight, group_size=32, bits=4)
        return QuantizedEmbedding(*arrays, 32, 4, mx.float32) if embedding else QuantizedLinear(*arrays, 32, 4)
    kinds = {"mixed": ("q4_k", "q6_k")}.get(form, (form,))
    if embedding:
        return GGUFEmbedding(ops.raw_matrix(raw_blocks(rows, columns, kinds[-1], 7)[0], kinds[-1]), mx.float32)
    # Cut where v begins, and between gate and up; o_proj and down_proj stay whole.
    cut = {512: 384, 1024: 512}.get(rows, rows) if len(kinds) > 1 else rows
    parts = [
        GGUFLinear(ops.raw_matrix(raw_blocks(size, columns, kind, 7)[0], kind))
        for kind, size in zip(kinds, (cut, rows - cut))
        if size
    ]
    return parts[0] if len(parts) == 1 else MergedLinear(parts)


def same(found: mx.array, expected: mx.array) -> None:
    """Of one shape, and equal but for the order of sums in float32, which makes 3.3e-6 here."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5 * float(mx.abs(expected).max()))


def leaves_no_memory(held: list[object], size: int) -> None:
    """`held` has the last references to what takes at least `size` bytes, which go with them."""
    mx.synchronize()
    gc.collect()
    gc.disable()  # what it would free later must not be what frees the model
    try:
        before = mx.get_active_memory()
        held.clear()
        assert before - mx.get_active_memory() >= size
    finally:
        gc.enable()


def nbytes(model: Qwen2) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
