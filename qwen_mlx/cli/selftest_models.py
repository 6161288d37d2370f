"""The self-test's models: a small one whose tokens transformers has computed, and the default one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np

from .. import ops
from ..backend import mx, named_arrays
from ..loading.hub import default
from ..loading.load import load
from ..model.config import ModelConfig
from ..model.fused import FusedModel
from ..model.qwen2 import Qwen2

# A model of random numbers, which NumPy's legacy generator gives alike in every version.
SMALL = ModelConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
SMALL_PROMPT = (7, 250, 3, 99, 41, 180)
SMALL_TOKENS = (
    *(1, 275, 198, 210, 202, 210, 87, 94, 39, 207, 192, 264, 28, 124, 264, 264),
    *(108, 23, 202, 94, 287, 198, 228, 291, 42, 89, 115, 42, 23, 205, 177, 94),
)
# The default model's answer to "Write a Python function that reverses a string.", as tokens.
DEFAULT_PROMPT = (
    *(151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446),
    *(525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 7985, 264, 13027, 729),
    *(429, 17431, 288, 264, 914, 13, 151645, 198, 151644, 77091, 198),
)
DEFAULT_TOKENS = (
    *(8420, 594, 264, 4285, 13027, 729, 311, 9931, 264, 914, 1447, 73594, 12669, 198),
    *(750, 9931, 3904, 1141, 982, 262, 671, 9008, 458, 4287, 914, 311, 3553, 279),
    *(27437, 914, 198, 262),
)


def small_model() -> Qwen2:
    """The small model, in float32."""
    model, random = Qwen2(SMALL), np.random.RandomState(5)
    for name, array in sorted(named_arrays(model)):
        values = random.standard_normal(array.shape)
        scale = 0.5 if name.endswith("bias") else 1.5 / array.shape[-1] ** 0.5
        values = 1 + 0.3 * values if "norm" in name else scale * values
        model.load_weights([(name, mx.array(values.astype(np.float32)))], strict=False)
    return model


def greedy(model: Qwen2, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The likeliest `count` tokens after a prompt, as generation computes them."""
    fused, cache, ids = FusedModel.of(model), model.make_cache(), list[int]()
    tokens = mx.array([prompt], mx.int32)
    for _ in range(count):
        tokens = ops.best_token(fused(tokens, cache, 1)[:, -1])[:, None]
        ids += cast("list[int]", tokens[:, 0].tolist())
    return tuple(ids)


def small_model_fault() -> str | None:
    """The fault of the small model's tokens, None if nothing is."""
    return difference("the small model", greedy(small_model(), SMALL_PROMPT, len(SMALL_TOKENS)), SMALL_TOKENS)


def default_model_path() -> Path | None:
    """The default model's file where it is on this machine already."""
    return default.verified() or default.present()


def default_model_fault(path: Path) -> str | None:
    """The fault of the default model's first tokens in float32, None if nothing is."""
    model, _ = load(path, dtype="float32")
    return difference("the default model", greedy(model, DEFAULT_PROMPT, len(DEFAULT_TOKENS)), DEFAULT_TOKENS)


def difference(what: str, got: Sequence[int], expected: Sequence[int]) -> str | None:
    """The first token that differs, in words."""
    for number, (a, b) in enumerate(zip(got, expected), 1):
        if a != b:
            return f"token {number} of {what} is {a}, expected {b}"
    return None
