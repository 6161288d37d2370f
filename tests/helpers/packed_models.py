"""Small random models whose matrices are packed in one way or another, and what is asked of them."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qwen_mlx import ModelConfig, Qwen2, ops
from qwen_mlx.model.layers import QuantizedEmbedding, QuantizedLinear

from .packed import raw_blocks


def model_of(packing: str, tied: bool, **changes: object) -> Qwen2:
    """A small random model in one packing; "mixed": v, up and the embedding in Q6_K, the rest in Q4_K; "three": k in
    MLX's packing besides."""
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 300, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    fields |= {"max_position_embeddings": 512, "tie_word_embeddings": tied}
    config = ModelConfig(**fields | changes)
    model = Qwen2(config)
    keys = iter(mx.random.split(mx.random.key(3), 400))
    weights = [
        (name, mx.random.normal(array.shape, key=next(keys)) * 0.05) for name, array in tree_flatten(model.parameters())
    ]
    model.load_weights([(name, array + ("norm" in name)) for name, array in weights])
    for name, module in model.named_modules():
        if packing != "dense" and hasattr(module, "weight") and module.weight.ndim == 2:
            *path, last = name.split(".")
            kind = packing
            if packing in ("mixed", "three"):
                finer = last in ("v_proj", "up_proj", "embed_tokens")
                kind = "affine" if packing == "three" and last == "k_proj" else "q6_k" if finer else "q4_k"
            parent = model
            for step in path:
                parent = parent[int(step)] if step.isdigit() else getattr(parent, step)
            setattr(parent, last, packed(kind, module))
    return model


def packed(kind: str, module: nn.Module) -> nn.Module:
    """A projection or an embedding of the same shape and bias, packed."""
    rows, columns = module.weight.shape
    if kind == "affine":
        arrays = mx.quantize(module.weight, group_size=32, bits=4)
        matrix = ops.Matrix(ops.Packing("affine", 4, 32), rows, columns, tuple(arrays))
    else:
        matrix = ops.raw_matrix(raw_blocks(rows, columns, kind, 7)[0], kind)
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(matrix, mx.float32)
    new = QuantizedLinear(matrix)
    if "bias" in module:
        new.bias = module.bias
    return new


def same(got: mx.array, expected: mx.array) -> None:
    """Asserts one shape, and equality but for the order of sums in float32, which makes 3.3e-6 here."""
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=1e-5 * float(mx.abs(expected).max()))


def leaves_no_memory(last_references: list[object], size: int) -> None:
    """Asserts that the objects in the list, which has the last references to them, take `size` bytes with them."""
    mx.synchronize()
    gc.collect()
    gc.disable()  # what it would free later must not be what frees the model
    try:
        before = mx.get_active_memory()
        last_references.clear()
        assert before - mx.get_active_memory() >= size
    finally:
        gc.enable()


def nbytes(model: Qwen2) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))
