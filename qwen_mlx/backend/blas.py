"""A fast BLAS for MLX on Linux CPUs, loaded before MLX.

MLX's CPU wheel links the reference BLAS, 50 to 140 times slower. The dynamic linker binds MLX's `cblas_sgemm` to the
first library in the process's global scope that has it, so loading a real one there before `mlx.core` is enough.
Libraries imported later that call BLAS by the same names, PyTorch among them, then use it too.

QWEN_MLX_BLAS chooses: off, one of the distributions below, or a library's path or name.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Iterator

# Distribution: (name, the files to load in order), the fastest first (benchmarks/cpu_primitives.py compares).
_DISTRIBUTIONS = {
    "mkl": ("MKL", [("intel-openmp", "libiomp5.so"), ("mkl", "libmkl_rt.so")]),
    "ngsolve-openblas": ("OpenBLAS", [("ngsolve-openblas", "libopenblas")]),
    "cmeel-openblas": ("OpenBLAS", [("cmeel-openblas", "libopenblas")]),
}
_SYSTEM = ("libopenblasp.so.0", "libopenblas.so.0")  # Fedora's threaded one; Debian's, Arch's and conda's
_LAYERS = ("MKL_THREADING_LAYER", "MKL_INTERFACE_LAYER")
_THREADS = ("MKL_Get_Max_Threads", "openblas_get_num_threads")

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
    elif not any(_load(name, files) for name, files in _candidates(choice)):
        missing = f"{choice} cannot be loaded" if choice else "no fast one found; install the extra 'cpu'"
        _report = f"MLX's reference BLAS, slow ({missing})"


def report() -> str:
    """The library that preload() loaded, or why it loaded none: "MKL 2026.2.0, 2 threads"."""
    count = next((getattr(_library, name)() for name in _THREADS if hasattr(_library, name)), None)
    return _report if count is None else f"{_report}, {count} thread{'s' if count > 1 else ''}"


def _candidates(choice: str) -> Iterator[tuple[str, list[str]]]:
    """(name, libraries to load in order), the fastest first."""
    if choice and choice not in _DISTRIBUTIONS:
        yield choice, [choice]
        return
    for distribution in [choice] if choice else _DISTRIBUTIONS:
        name, wanted = _DISTRIBUTIONS[distribution]
        files = [_file(owner, prefix) for owner, prefix in wanted]
        if all(files):
            source = "" if name.lower() == distribution else f" ({distribution})"
            yield f"{name} {_version(distribution)}{source}", files
    if not choice:
        yield from ((f"OpenBLAS (the system's {library})", [library]) for library in _SYSTEM)


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


def _load(name: str, files: list[str]) -> bool:
    """Loads the files into the global scope; true if the last of them is a BLAS."""
    global _report, _library
    try:
        library = [_open(file) for file in files][-1]
    except OSError:
        return False
    if not hasattr(library, "cblas_sgemm"):
        return False
    if hasattr(library, "MKL_Get_Max_Threads"):
        _let_mkl_choose(library)
    _report, _library = name, library
    return True


def _let_mkl_choose(mkl: ctypes.CDLL) -> None:
    """Lets MKL choose its layers now, whatever the environment says: it ends the process for a layer that is not there.

    Its own choice follows the OpenMP that the process has already. Intel's beside the GNU one that PyTorch brings would
    make products wrong without an error.
    """
    layers = {name: os.environ.pop(name) for name in _LAYERS if name in os.environ}
    mkl.MKL_Get_Max_Threads()
    os.environ.update(layers)


def _open(file: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        if "libgfortran.so.5" not in str(error):
            raise
    _provide_libgfortran()
    return ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)


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
