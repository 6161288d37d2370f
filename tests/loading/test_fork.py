"""A child that os.fork made has none of MLX's threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_mlx import QwenMLXError, load
from reference.small_models import RandomModel, write_gguf


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_what_to_do(tmp_path: Path):
    path = write_gguf(tmp_path / "m.gguf", RandomModel())
    load(path)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            load(path)
        except QwenMLXError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        assert "spawn" in answer.read()
    os.waitpid(child, 0)
