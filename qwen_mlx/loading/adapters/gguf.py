"""LoRA adapters in a GGUF, as llama.cpp's convert_lora_to_gguf.py writes them.

Source of names and scales: llama.cpp's src/llama-adapter.cpp. A matrix NAME has the factors NAME.lora_a (rank, columns)
and NAME.lora_b (rows, rank); the embedding's lie on their sides: (vocabulary, rank) and (hidden, rank).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import GGUFError
from ...gguf.names import to_hf
from ...gguf.reader import GGUFFile
from .change import EMBEDDING, Change, Factors, gguf_array, require_factors

_PARTS = ("lora_a", "lora_b")


def read_gguf(path: Path, digest: str, shapes: Mapping[str, tuple[int, ...]]) -> Change:
    """The change that a GGUF adapter makes to a model with parameters of these shapes, the head among them.

    Raises GGUFError naming the file, the field or tensor, what it is and what was expected.
    """
    file = GGUFFile(path)
    for field, expected in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", "qwen2"),
    ):
        if file.metadata.get(field) != expected:
            raise GGUFError(
                f"{path}: {field} is {file.metadata.get(field)!r}, expected {expected!r}; give a LoRA adapter of Qwen2."
            )
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or abs(alpha) > 1e9:
        raise GGUFError(f"{path}: adapter.lora.alpha is {alpha!r}, expected a number.")
    modules: dict[str, set[str]] = {}
    for tensor in file.tensors:
        name, _, part = tensor.rpartition(".")
        own = to_hf(name)
        if part not in _PARTS or own is None or len(shapes.get(own, ())) != 2:
            raise GGUFError(f"{path}: tensor {tensor!r} is no factor of a matrix of this model; it belongs to another.")
        modules.setdefault(name, set()).add(part)
    factors = {}
    for name, parts in modules.items():
        own = to_hf(name)
        where = f"{path}: {name!r}"
        if own is None or parts != set(_PARTS):
            raise GGUFError(f"{where} has {' and '.join(sorted(parts))} alone; convert the adapter again.")
        a, b = (gguf_array(file, f"{name}.{part}") for part in _PARTS)
        if own == EMBEDDING:
            a, b = b.T, a
        require_factors(where, a, b, shapes[own])
        scale = np.float32(alpha / a.shape[0] if alpha else 1.0)
        factors[own] = Factors(np.ascontiguousarray(a), b * scale)
    return Change(path, digest, factors)
