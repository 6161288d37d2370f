"""Free memory and what does not fit in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_mlx import load
from qwen_mlx.errors import QwenMLXError
from qwen_mlx.loading import free_memory as memory
from tests.helpers.small_gguf import layout, small_fields, small_tensors


@pytest.fixture
def meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a container's, on a system of 8 GB of which 6 are available."""
    monkeypatch.setattr(memory, "_meminfo", lambda: {"MemTotal": 8 << 30, "MemAvailable": 6 << 30})
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_the_systems_word_counts_without_a_container(meminfo: Path):
    assert memory.available() == 6 << 30


@pytest.mark.parametrize(("limit", "used", "free"), [("max", 1, 6 << 30), (2 << 30, 1 << 30, 1 << 30), (1, 5, 0)])
def test_a_containers_limit_counts(meminfo: Path, limit: str | int, used: int, free: int):
    (meminfo / "memory.max").write_text(f"{limit}\n")
    (meminfo / "memory.current").write_text(f"{used}\n")
    assert memory.available() == free


def test_a_limit_that_cannot_be_read_is_ignored(meminfo: Path):
    (meminfo / "memory.max").write_text("much")
    (meminfo / "memory.current").write_text("1")
    assert memory.available() == 6 << 30


def test_what_linux_says_is_read_in_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total / 1000 < memory.available() <= total


@pytest.mark.parametrize(("packed", "remedy"), [(True, "smaller model or quantization"), (False, "weights packed")])
def test_what_does_not_fit_is_refused_with_both_numbers(monkeypatch, packed: bool, remedy: str):
    monkeypatch.setattr(memory, "available", lambda: 3 * 10**9)
    memory.require_memory(3 * 10**9, Path("a.gguf"), packed)
    with pytest.raises(QwenMLXError, match=rf"a.gguf: the weights take 4.0 GB.*3.0 GB are free.*{remedy}"):
        memory.require_memory(4 * 10**9, Path("a.gguf"), packed)


def test_load_looks_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "small.gguf"
    header, size = layout(small_fields(), small_tensors())
    path.write_bytes(header + bytes(size))
    monkeypatch.setattr(memory, "available", lambda: 1)
    with pytest.raises(QwenMLXError, match="GB are free"):
        load(path)
    monkeypatch.setattr(memory, "available", lambda: None)
    load(path)
