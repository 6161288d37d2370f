"""Examples for training: random ones, and files of lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qwen_mlx.training.data import Example


def random_examples(lengths: list[int], n_tokens: int = 256, seed: int = 0) -> list[Example]:
    """Examples of these lengths, whose first third is the prompt."""
    rng = np.random.default_rng(seed)
    return [Example(rng.integers(0, n_tokens, n).astype(np.int32), max(1, n // 3)) for n in lengths]


def write_lines(path: Path, lines: list[Any]) -> Path:
    """A JSONL file; a string or bytes is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str | bytes) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((t.encode() if isinstance(t, str) else t) + b"\n" for t in texts))
    return path


def chats(n: int) -> list[dict[str, Any]]:
    """Conversations of several lengths, as lines."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"count {i}"},
                {"role": "assistant", "content": "one " * (1 + i % 5)},
            ]
        }
        for i in range(n)
    ]
