"""The BLAS loaded before MLX: found, used, chosen, switched off, never in the way; and no compiler is called."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_mlx.backend import blas
from reference.small_models import RandomModel, write_gguf

pytestmark = [pytest.mark.linux, pytest.mark.heavy]  # MLX needs no help on macOS; each test starts processes

# MLX is for Linux on aarch64 too, where no wheel of OpenBLAS is for every CPU.
with_wheel = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the extra 'cpu' brings OpenBLAS on x86-64 alone"
)
# Shapes: one row (a decoding step), several rows, a stack with a broadcast operand.
PRODUCTS = """
import numpy as np
from qwen_mlx import backend
from qwen_mlx.backend import blas
mx = backend.mx
rng = np.random.default_rng(0)
for left, right in [((1, 896), (1152, 896)), ((33, 65), (70, 65)), ((2, 1, 7, 64), (2, 1, 300, 64))]:
    a, b = rng.standard_normal(left).astype(np.float32), rng.standard_normal(right).astype(np.float32)
    ours = np.array(mx.array(a) @ mx.array(b).swapaxes(-1, -2))
    exact = a.astype(np.float64) @ b.astype(np.float64).swapaxes(-1, -2)
    bound = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)).swapaxes(-1, -2)
    assert (np.abs(ours - exact) <= bound * left[-1] * 2**-24).all()  # Higham 2002, eq. 3.5
print(blas.report())
"""


def run(code: str, **variables: str) -> str:
    """The last line that a fresh Python prints."""
    unset = {"QWEN_MLX_BLAS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LD_PRELOAD"}
    environment = {key: value for key, value in os.environ.items() if key not in unset} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def bound_to(folder: Path, **variables: str) -> tuple[str, str]:
    """preload()'s report, and the file that gave MLX `cblas_sgemm`, in the dynamic linker's own words."""
    report = run(PRODUCTS, LD_DEBUG="bindings", LD_DEBUG_OUTPUT=str(folder / "ld"), **variables)
    lines = "\n".join(file.read_text(errors="replace") for file in folder.glob("ld.*")).splitlines()
    found = {line.split(" to ")[1].split(" ")[0] for line in lines if "libmlx.so" in line and "`cblas_sgemm'" in line}
    assert len(found) == 1, found
    return report, Path(found.pop()).name


@with_wheel
def test_mlx_calls_the_library_that_the_extra_brings(tmp_path: Path):
    report, file = bound_to(tmp_path, OMP_NUM_THREADS="1")
    version = importlib.metadata.version(blas.WHEEL)
    assert report == f"OpenBLAS {version} ({blas.WHEEL}), 1 thread"  # the user's own setting
    assert file == Path(blas._file(blas.WHEEL, "libopenblas")).name


ONE_CPU = """
const char *openblas_get_config(void) { return "OpenBLAS 0.3.31 NO_AFFINITY SKYLAKEX"; }
int openblas_get_num_threads(void) { return 2; }
void cblas_sgemm(void) { __builtin_trap(); }
"""


def test_a_library_for_one_cpu_is_not_taken(tmp_path: Path):
    """It ends the process on other CPUs; two of three wheels of OpenBLAS on PyPI are so."""
    (tmp_path / "one.c").write_text(ONE_CPU)
    for name in blas._SYSTEM:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / name, tmp_path / "one.c"], check=True)
    report = run(HIDE.replace("VISIBLE", "['mlx-cpu']") + PRODUCTS, LD_LIBRARY_PATH=str(tmp_path))
    assert report == "MLX's reference BLAS, slow (no fast one found; install OpenBLAS)"


def test_switched_off(tmp_path: Path):
    report, file = bound_to(tmp_path, QWEN_MLX_BLAS="off")
    assert report == "MLX's reference BLAS (QWEN_MLX_BLAS=off)"
    assert file.startswith("libblas")


@with_wheel
def test_a_library_by_its_path(tmp_path: Path):
    own = shutil.copy(blas._file(blas.WHEEL, "libopenblas"), tmp_path / "own.so")
    report, file = bound_to(tmp_path, QWEN_MLX_BLAS=str(own))
    assert report.startswith(f"{own}, ")
    assert file == "own.so"


@pytest.mark.parametrize("choice", ["/nonexistent/libblas.so", "no-such-package", "libm.so.6"])
def test_what_is_no_blas_is_said_and_does_no_harm(choice: str):
    assert run(PRODUCTS, QWEN_MLX_BLAS=choice) == f"MLX's reference BLAS, slow ({choice} cannot be loaded)"


def test_a_library_that_the_user_preloads_is_left_alone():
    own = blas._file("mlx-cpu", "libblas")
    assert run(PRODUCTS, LD_PRELOAD=own) == "not preloaded: the process has one already"


def test_mlx_imported_first_is_said():
    assert run("import mlx.core" + PRODUCTS) == "not preloaded: MLX was imported before qwen_mlx"
    code = "import mlx.core, qwen_mlx.backend"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "UserWarning: MLX was imported before qwen_mlx" in said
    assert "Import qwen_mlx.backend, or anything from qwen_mlx, first." in said
    quiet = {**os.environ, "QWEN_MLX_BLAS": "off"}
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, env=quiet, check=True).stderr


HIDE = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name not in VISIBLE:
        raise metadata.PackageNotFoundError(name)
    return real(name)
def files(name):
    raise metadata.PackageNotFoundError(name)
metadata.version, metadata.files = version, files
"""


def test_without_any_library_everything_works():
    report = run(HIDE.replace("VISIBLE", "['mlx-cpu']") + PRODUCTS)
    assert report.startswith(("MLX's reference BLAS, slow (no fast one found", "OpenBLAS (the system's"))


def test_beside_a_gpu_backend_it_does_nothing():
    """mlx-cpu is the distribution that a GPU backend replaces."""
    assert run(HIDE.replace("VISIBLE", "['mlx-cuda-12']") + PRODUCTS) == "not preloaded: MLX has a GPU backend"


@pytest.mark.torch
def test_torch_beside_it_computes_right():
    """PyTorch's calls reach the same library when it is imported later."""
    code = """
import torch
a, b = rng.standard_normal((2, 200, 64)).astype(np.float32)
assert np.allclose((torch.tensor(a) @ torch.tensor(b).T).numpy(), a.astype(np.float64) @ b.T, rtol=0, atol=1e-4)
square = torch.tensor(a.T @ a)
assert torch.allclose(torch.linalg.inv(square) @ square, torch.eye(64), atol=1e-3)
"""
    run(PRODUCTS + code + "print()")


def test_generating_calls_no_compiler(tmp_path: Path):
    """mx.compile would start g++, which is missing or too new on many machines."""
    marker, compiler = tmp_path / "called", tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\n: > {marker}\nexit 1\n")
    compiler.chmod(0o755)
    model = write_gguf(tmp_path / "small.gguf", RandomModel())
    command = [sys.executable, "-m", "qwen_mlx.generate", "--model", model, "--prompt", "hello", "--max-tokens", "6"]
    # MLX keeps what it compiled in the folder for temporary files.
    environment = os.environ | {"PATH": str(compiler.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, "--temp", "0.8"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "generation: 6 tokens" in done.stderr
    assert not marker.exists()


MANY = """
for _ in range(200):
    m, n, k = rng.integers(1, 9), rng.integers(64, 600), rng.integers(32, 600)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (n, k)))
    assert np.abs(np.array(mx.array(a) @ mx.array(b).T) - a.astype(np.float64) @ b.T).max() < 1e-3
print("right")
"""


@pytest.mark.torch
def test_right_beside_pytorch_whichever_comes_first():
    """PyTorch brings an OpenMP of its own; two of them in one product make it wrong, in some runs and some shapes."""
    for _ in range(3):
        run("import torch\n" + PRODUCTS + MANY)
    run(PRODUCTS + "import torch\ntorch.ones(99, 99) @ torch.ones(99, 99)\n" + MANY)
