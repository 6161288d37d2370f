"""A fast BLAS for MLX on Linux CPUs, loaded before MLX.

MLX's CPU wheel links the reference BLAS, 50 to 140 times slower. The dynamic linker binds MLX's `cblas_sgemm` to the
first library in the process's global scope that has it, so loading a real one there before `mlx.core` is enough.
Libraries imported later that call BLAS by the same names, PyTorch among them, then use it too.

QWEN_MLX_BLAS chooses: off, or a library's path or name.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator

WHEEL = "ngsolve-openblas"  # the only one on PyPI with the usual names and functions for every x86-64 CPU
_SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0")  # Fedora's threaded one; Debian's, Arch's and conda's

_report = "not looked for yet"
_library: ctypes.CDLL | None = None


def preload() -> None:
    """Loads the fastest installed BLAS, once. Without one everything works, only slower."""
    global _report
    choice = os.environ.get("QWEN_MLX_BLAS", "")
    if _library is not None:
        return
    if not sys.platform.startswith("linux"):
        _report = "MLX's own"
    elif _version("mlx-cpu") is None:
        _report = "not preloaded: MLX has a GPU backend"
    elif choice.lower() == "off":
        _report = "MLX's reference BLAS (QWEN_MLX_BLAS=off)"
    elif "mlx.core" in sys.modules:
        _report = "not preloaded: MLX was imported before qwen_mlx"
        warnings.warn(
            "MLX was imported before qwen_mlx, which then cannot bring a fast BLAS: products on this CPU may take 50 "
            "times as long. Import qwen_mlx.backend, or anything from qwen_mlx, first.",
            stacklevel=3,
        )
    elif hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        _report = "not preloaded: the process has one already"  # LD_PRELOAD, for example
    elif not any(_load(name, file, bool(choice)) for name, file in _candidates(choice)):
        missing = f"{choice} cannot be loaded" if choice else "no fast one found; install OpenBLAS"
        _report = f"MLX's reference BLAS, slow ({missing})"


def report() -> str:
    """The library that preload() loaded, or why it loaded none: "OpenBLAS 0.3.33 (ngsolve-openblas), 2 threads"."""
    if _library is None or not hasattr(_library, "openblas_get_num_threads"):
        return _report
    count: int = _library.openblas_get_num_threads()
    return f"{_report}, {count} thread{'s' if count > 1 else ''}"


def _candidates(choice: str) -> Iterator[tuple[str, str]]:
    """(name, library), the best first."""
    if choice:
        yield choice, choice
        return
    if file := _file(WHEEL, "libopenblas"):
        yield f"OpenBLAS {_version(WHEEL)} ({WHEEL})", file
    yield from ((f"OpenBLAS (the system's {library})", library) for library in _SYSTEM)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file(distribution: str, prefix: str) -> str:
    """An installed library of a distribution whose name starts with `prefix`, or "" if there is none."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    paths = sorted(str(file.locate()) for file in files if file.name.startswith(prefix) and ".so" in file.name)
    return next(filter(os.path.isfile, paths), "")


def _load(name: str, file: str, chosen: bool) -> bool:
    """Loads a library into the global scope; true if it is a BLAS, and one for every CPU unless the user chose it."""
    global _report, _library
    try:
        library = _open(file)
    except OSError:
        return False
    if not hasattr(library, "cblas_sgemm") or not (chosen or _is_for_every_cpu(library)):
        return False
    _report, _library = name, ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
    return True


def _is_for_every_cpu(library: ctypes.CDLL) -> bool:
    """True if an OpenBLAS chooses its functions by the CPU that it runs on.

    Some builds hold those of one CPU alone and end the process on others, by an illegal instruction.
    """
    if not hasattr(library, "openblas_get_config"):
        return False
    library.openblas_get_config.restype = ctypes.c_char_p
    return b"DYNAMIC_ARCH" in library.openblas_get_config()


def _open(file: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(file)
    except OSError as error:
        if "libgfortran.so.5" not in str(error):
            raise
    _provide_libgfortran()
    return ctypes.CDLL(file)


def _provide_libgfortran() -> None:
    """Loads a copy of MLX's libgfortran under its common name, which OpenBLAS's wheels want and many machines lack."""
    import tempfile

    file = _file("mlx-cpu", "libgfortran")
    if quadmath := _file("mlx-cpu", "libquadmath"):  # it needs this one on x86-64
        ctypes.CDLL(quadmath)
    own, common = os.path.basename(file).encode() + b"\0", b"libgfortran.so.5"
    with open(file, "rb") as source, tempfile.NamedTemporaryFile() as copy:
        copy.write(source.read().replace(own, common.ljust(len(own), b"\0")))
        copy.flush()
        ctypes.CDLL(copy.name)
