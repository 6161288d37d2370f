"""Modules of mlx-lm whose kernels the emulator runs."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def module(name: str) -> ModuleType:
    """A fresh copy of a module of mlx_lm.models: within `emulate` its kernels are emulated ones."""
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh
