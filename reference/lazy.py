"""Peers that are imported at first use: a test file that compares some results with one is collected, and its other
tests run, without it.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """A module that its first attribute imports."""

    __test__ = False  # pytest asks every name of a test file for it, which would import all peers

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch = Lazy("torch")
transformers = Lazy("transformers")
modeling_qwen2 = Lazy("transformers.models.qwen2.modeling_qwen2")
bitsandbytes_functional = Lazy("bitsandbytes.functional")
compressors = Lazy("compressed_tensors.compressors")
quantization = Lazy("compressed_tensors.quantization")
sentence_transformers = Lazy("sentence_transformers")
st_modules = Lazy("sentence_transformers.sentence_transformer.modules")
safetensors_torch = Lazy("safetensors.torch")
peft = Lazy("peft")
mlx_lm = Lazy("mlx_lm")
mlx_lm_utils = Lazy("mlx_lm.utils")
mlx_lm_sample_utils = Lazy("mlx_lm.sample_utils")
mlx_lm_tuner = Lazy("mlx_lm.tuner.utils")
mlx_lm_cache = Lazy("mlx_lm.models.cache")
