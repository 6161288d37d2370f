"""Qwen2.5 on Apple's MLX.

    from qwen_mlx import load, generate, stream_generate
    model, tokenizer = load()
    print(generate(model, tokenizer, "Reverse a string in Python."))

Names are imported when first used (PEP 562), so that `--help` never waits for MLX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion.convert import convert
    from .conversion.export import export
    from .encoding.embed import embed
    from .encoding.encoder import Encoder
    from .encoding.score import score, step_scores
    from .errors import GGUFError, QwenMLXError
    from .generation.batch import BatchResult, batch_generate
    from .generation.chat import Chat
    from .generation.fill import fill, stream_fill
    from .generation.prompt_cache import PromptCache
    from .generation.sampling import SamplingSettings
    from .generation.text import GenerationChunk, generate, stream_generate
    from .loading.encoder import load_encoder
    from .loading.load import load
    from .model.activations import activations, hidden_states
    from .model.config import ModelConfig
    from .model.qwen2 import Qwen2
    from .text.tokenizer import Tokenizer

__version__ = "0.2.0.dev0"

_MODULES = {
    "BatchResult": "generation.batch",
    "Chat": "generation.chat",
    "Encoder": "encoding.encoder",
    "GGUFError": "errors",
    "GenerationChunk": "generation.text",
    "ModelConfig": "model.config",
    "PromptCache": "generation.prompt_cache",
    "Qwen2": "model.qwen2",
    "QwenMLXError": "errors",
    "SamplingSettings": "generation.sampling",
    "Tokenizer": "text.tokenizer",
    "activations": "model.activations",
    "batch_generate": "generation.batch",
    "convert": "conversion.convert",
    "embed": "encoding.embed",
    "export": "conversion.export",
    "fill": "generation.fill",
    "generate": "generation.text",
    "hidden_states": "model.activations",
    "load": "loading.load",
    "load_encoder": "loading.encoder",
    "score": "encoding.score",
    "step_scores": "encoding.score",
    "stream_fill": "generation.fill",
    "stream_generate": "generation.text",
}

__all__ = [
    "BatchResult",
    "Chat",
    "Encoder",
    "GGUFError",
    "GenerationChunk",
    "ModelConfig",
    "PromptCache",
    "Qwen2",
    "QwenMLXError",
    "SamplingSettings",
    "Tokenizer",
    "activations",
    "batch_generate",
    "convert",
    "embed",
    "export",
    "fill",
    "generate",
    "hidden_states",
    "load",
    "load_encoder",
    "score",
    "step_scores",
    "stream_fill",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
