"""A child that os.fork made has none of MLX's threads."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qwen_mlx import PromptCache, QwenMLXError, generate, load
from reference.small_models import RandomModel, write_gguf


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_what_to_do(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    model, tokenizer = load(path)
    cache = PromptCache(model)
    generate(model, tokenizer, [1, 2], max_tokens=2, prompt_cache=cache)
    cache.save(tmp_path / "cache")
    calls = {
        "load": lambda: load(path),
        "generate": lambda: generate(model, tokenizer, [1], max_tokens=1),
        "the model": lambda: model([1]).tolist(),
        "reading a cache": lambda: PromptCache.load(tmp_path / "cache", model),
        "writing a cache": lambda: cache.save(tmp_path / "other"),
    }
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(10)  # it would wait for ever
        for name, call in calls.items():
            try:
                call()
            except QwenMLXError as error:
                os.write(writer, f"{name}: {error}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        told = dict(line.split(": ", 1) for line in answer)
    os.waitpid(child, 0)
    assert told.keys() == calls.keys()
    assert all("spawn" in text for text in told.values())
