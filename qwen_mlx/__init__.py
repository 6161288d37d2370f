"""Qwen2.5 on Apple's MLX.

    from qwen_mlx import load, generate, stream_generate
    model, tokenizer = load()
    print(generate(model, tokenizer, "Reverse a string in Python."))

Names are imported when first used (PEP 562), so that `--help` never waits for MLX.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import BatchResult, batch_generate
    from .config import ModelConfig
    from .conversion import convert
    from .errors import GGUFError, QwenMLXError
    from .generation import GenerationChunk, generate, stream_generate
    from .loading import load
    from .model import Qwen2
    from .prompt_cache import PromptCache
    from .sampling import SamplingSettings
    from .session import Chat
    from .tokenizer import Tokenizer

__version__ = "0.1.0"

_MODULES = {
    "BatchResult": "batch",
    "Chat": "session",
    "GGUFError": "errors",
    "GenerationChunk": "generation",
    "ModelConfig": "config",
    "PromptCache": "prompt_cache",
    "Qwen2": "model",
    "QwenMLXError": "errors",
    "SamplingSettings": "sampling",
    "Tokenizer": "tokenizer",
    "batch_generate": "batch",
    "convert": "conversion",
    "generate": "generation",
    "load": "loading",
    "stream_generate": "generation",
}

__all__ = [
    "BatchResult",
    "Chat",
    "GGUFError",
    "GenerationChunk",
    "ModelConfig",
    "PromptCache",
    "Qwen2",
    "QwenMLXError",
    "SamplingSettings",
    "Tokenizer",
    "batch_generate",
    "convert",
    "generate",
    "load",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(types.ModuleType):
    """A package whose `generate` and `convert` stay functions when the commands of that name are imported: Python would
    put the submodule in their place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
