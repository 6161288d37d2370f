"""A fast BLAS for MLX on Linux CPUs, loaded before MLX.

MLX's CPU wheel links the reference BLAS, which is 50 to 140 times slower. The dynamic linker gives `cblas_sgemm` to the
first library in the process that has it, so loading a real one globally before `mlx.core` is enough.
QWEN_MLX_BLAS=off leaves MLX as it is; QWEN_MLX_BLAS=/path/to/library.so loads that one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_report = "not looked for yet"


def preload() -> None:
    """Loads the fastest installed BLAS once. Never fails: without one everything works, only slower."""
    global _report
    choice = os.environ.get("QWEN_MLX_BLAS", "")
    if "mlx.core" in sys.modules:
        _report = "not preloaded: MLX was imported before qwen_mlx"
    elif not sys.platform.startswith("linux") or not _installed("mlx-cpu"):
        _report = "MLX's own"
    elif choice.lower() == "off":
        _report = "MLX's reference BLAS (QWEN_MLX_BLAS=off)"
    else:
        for name, libraries in [(choice, [choice])] if choice else _candidates():
            if _load(libraries):
                _report = name
                return
        missing = f"{choice} cannot be loaded" if choice else "no fast one found; pip install mkl"
        _report = f"MLX's reference BLAS, slow ({missing})"


def report() -> str:
    """What preload() did, in words."""
    return _report


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _candidates() -> Iterator[tuple[str, list[str]]]:
    """(name, libraries to load in order), the fastest first: for one row MKL is 2.5 times faster than OpenBLAS."""
    if version := _installed("mkl"):
        openmp, runtime = _files("intel-openmp", "libiomp5.so"), _files("mkl", "libmkl_rt.so")
        if openmp and runtime:
            yield f"MKL {version}", [*openmp, *runtime]
    for package in ("ngsolve-openblas", "cmeel-openblas"):
        for library in _files(package, "libopenblas"):
            yield f"OpenBLAS {_installed(package)} ({package})", [library]
    yield "OpenBLAS (the system's)", ["libopenblas.so.0"]


def _files(distribution: str, prefix: str) -> list[str]:
    """The first installed file of a distribution whose name starts with `prefix`."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [
        Path(str(file.locate())).resolve() for file in files if file.name.startswith(prefix) and ".so" in file.name
    ]
    return [str(path) for path in sorted(found) if path.exists()][:1]


def _load(libraries: list[str]) -> bool:
    try:
        for library in libraries:
            loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        return hasattr(loaded, "cblas_sgemm")
    except OSError:
        return False
