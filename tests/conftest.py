"""Fixtures that several test files share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import qwen_mlx.backend  # noqa: F401  (before any test imports MLX: its fast BLAS must be in the process first)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M, the default model, fetched as a user's machine fetches it."""
    from qwen_mlx.loading import hub

    return hub.resolve()


@pytest.fixture(scope="session")
def real_hf(real_gguf: Path):
    """The same file through transformers' own GGUF reader, in float32: 2 GB, loaded once for all tests."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_gguf.parent, gguf_file=real_gguf.name, dtype=torch.float32)
    return model.eval()


def pytest_terminal_summary(terminalreporter) -> None:
    """Says plainly how many tests ran and how many were skipped."""
    ran = sum(len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error"))
    terminalreporter.write_line(f"{ran} tests ran, {len(terminalreporter.stats.get('skipped', ()))} skipped")
