"""float32 is float32: TF32 is off where somebody asks for float32, and the user's own word stays."""

from __future__ import annotations

import os

import pytest

from qwen_mlx import backend, load
from qwen_mlx.backend import mx
from reference.small_models import RandomModel, write_gguf


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")  # so that it is put back
    monkeypatch.delenv("MLX_ENABLE_TF32")
    return write_gguf(tmp_path / "small.gguf", RandomModel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_asking_for_float32_turns_tf32_off(small, dtype):
    load(small, dtype=dtype)
    assert os.environ.get("MLX_ENABLE_TF32") == ("0" if dtype == "float32" else None)


def test_the_user_s_own_word_stays(small, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    load(small, dtype="float32")
    assert os.environ["MLX_ENABLE_TF32"] == "1"


def test_what_a_gpu_does_is_said(monkeypatch):
    assert backend.float32_products() == "float32"
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert backend.float32_products().startswith("TF32 where the GPU has it")
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert backend.float32_products() == "float32"
