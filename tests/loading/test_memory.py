"""An Apple GPU's memory: what is kept wired, and the warning before a model that hardly fits."""

from __future__ import annotations

import pytest

from qwen_mlx import load
from qwen_mlx.backend import mx
from qwen_mlx.loading import memory
from reference.small_models import RandomModel, write_gguf

LIMIT = 10_000_000_000


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that MLX was told to keep wired, on a stand-in for a Mac."""
    told: list[int] = []
    gpu = mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": LIMIT})
    monkeypatch.setattr(mx, "set_wired_limit", told.append)
    return told


def test_all_that_macos_allows_is_wired_and_a_model_that_fits_is_no_news(wired, capsys):
    memory.prepare(int(0.9 * LIMIT))
    assert wired == [LIMIT]
    assert capsys.readouterr().err == ""


def test_a_model_that_hardly_fits_is_said(wired, capsys):
    memory.prepare(9_500_000_000)
    assert wired == [LIMIT]
    line = capsys.readouterr().err
    assert line.startswith("qwen_mlx: the model has 9.5 GB and macOS recommends at most 10.0 GB for the GPU")
    assert line.count("\n") == 1


def test_a_gpu_that_says_no_limit_is_left_alone(wired, monkeypatch, capsys):
    monkeypatch.setattr(mx, "device_info", dict)
    memory.prepare(10**15)
    assert wired == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("where", ["CPU", "CUDA"])
def test_elsewhere_nothing_happens(wired, monkeypatch, where):
    if where == "CPU":
        monkeypatch.undo()
        monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    else:
        monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    memory.prepare(10**15)
    assert wired == []


def test_loading_asks_before_it_reads_the_weights(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "small.gguf", RandomModel())
    asked: list[int] = []

    def refuse(nbytes: int) -> None:
        asked.append(nbytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "prepare", refuse)
    with pytest.raises(KeyboardInterrupt):
        load(path)
    assert 0.8 * path.stat().st_size < asked[0] < path.stat().st_size
