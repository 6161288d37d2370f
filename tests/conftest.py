"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct Q4_K_M, the default model, fetched as a user's machine fetches it."""
    from qwen_mlx import hub

    return hub.resolve()
