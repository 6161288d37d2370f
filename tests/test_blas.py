"""The BLAS that is loaded before MLX: found, used, switched off, never in the way."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

PRODUCT = (
    "import numpy as np; from qwen_mlx import backend, blas; mx = backend.mx\n"
    "rng = np.random.default_rng(0); a, b = rng.standard_normal((2, 33, 65)).astype(np.float32)\n"
    "ours = np.array(mx.array(a) @ mx.array(b).T)\n"
    "assert np.allclose(ours, a.astype(np.float64) @ b.T, rtol=0, atol=2e-5)\n"
    "print(blas.report())\n"
)
# The object that a lookup of cblas_sgemm in the whole process finds, which is what MLX's own call is bound to.
OWNER = (
    "import ctypes\nP, V = ctypes.c_char_p, ctypes.c_void_p\n"
    "class Info(ctypes.Structure):\n"
    "    _fields_ = [('file', P), ('base', V), ('name', P), ('at', V)]\n"
    "process, info = ctypes.CDLL(None), Info()\n"
    "ctypes.CDLL('libdl.so.2').dladdr(ctypes.cast(process.cblas_sgemm, ctypes.c_void_p), ctypes.byref(info))\n"
    "print(info.file.decode())\n"
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX needs no help on macOS")


def run(code: str, **variables: str) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "QWEN_MLX_BLAS"} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_installed_library_is_the_one_that_mlx_calls():
    version = importlib.metadata.version("mkl")
    report, owner = run(PRODUCT + OWNER)
    assert report == f"MKL {version}"
    assert "libmkl_rt" in owner


def test_mlx_s_own_call_arrives_there():
    """MKL_VERBOSE prints a line for each call that MKL itself executes."""
    lines = run(PRODUCT, MKL_VERBOSE="1")
    assert any("SGEMM" in line for line in lines)
    assert not any("SGEMM" in line for line in run(PRODUCT, MKL_VERBOSE="1", QWEN_MLX_BLAS="off"))


def test_switched_off():
    assert run(PRODUCT, QWEN_MLX_BLAS="off") == ["MLX's reference BLAS (QWEN_MLX_BLAS=off)"]


def test_a_path_that_is_no_library_is_said_and_does_no_harm():
    (report,) = run(PRODUCT, QWEN_MLX_BLAS="/nonexistent/libblas.so")
    assert "/nonexistent/libblas.so cannot be loaded" in report


def test_a_library_without_blas_is_not_taken():
    (report,) = run(PRODUCT, QWEN_MLX_BLAS="libm.so.6")
    assert "libm.so.6 cannot be loaded" in report


def test_mlx_imported_first_is_said():
    (report,) = run("import mlx.core\n" + PRODUCT)
    assert "MLX was imported before qwen_mlx" in report


def test_without_any_library_everything_works():
    """A finder hides every distribution but MLX's."""
    hide = (
        "import importlib.metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name != 'mlx-cpu': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "def files(name): raise m.PackageNotFoundError(name)\n"
        "m.files = files\n"
    )
    (report,) = run(hide + PRODUCT)
    assert "no fast one found" in report or "the system's" in report
