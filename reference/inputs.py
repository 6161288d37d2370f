"""Inputs of a comparison: the prompt, a file's configuration and tokenizer without its weights, and the runs."""

from __future__ import annotations

from pathlib import Path

from qwen_mlx.gguf.reader import GGUFFile
from qwen_mlx.model.config import ModelConfig
from qwen_mlx.text.tokenizer import Tokenizer

from .taps import Run

PROMPT = "def fibonacci(n):\n    # 返回第 n 个斐波那契数\n"


def config_of(path: Path) -> ModelConfig:
    return ModelConfig.from_folder(path) if path.is_dir() else ModelConfig.from_gguf(GGUFFile(path))


def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(GGUFFile(path).metadata)


def runs_of(ids: list[int]) -> dict[str, Run]:
    """The runs that can be asked for, on the same ids."""
    n = len(ids)
    return {
        "prefill": Run.prefill(ids),
        "chunked": Run.chunked(ids, max(1, n // 3)),
        "decode": Run.decode(ids, max(1, n - 8)),
        "padded": Run.padded([ids[: max(1, n // part)] for part in (1, 2, 4)], min(4, max(0, n // 4 - 1))),
    }


def load_tokens(path: Path, count: int) -> list[int]:
    """The first `count` ids of PROMPT repeated, by the model's own tokenizer, without loading the model."""
    ids = tokenizer_of(path).encode(PROMPT)
    return (ids * -(-count // len(ids)))[:count]
