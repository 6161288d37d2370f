"""The one place that imports MLX: `from .backend import mx, nn`.

A Linux machine without one of MLX's backends deserves a sentence instead of a linker's message.
"""

import os

import numpy as np

from ..errors import QwenMLXError

try:
    import mlx.core as mx
    from mlx import nn, optimizers
    from mlx.utils import tree_flatten
except ImportError as error:
    raise QwenMLXError(
        f"MLX cannot be loaded ({error}); install qwen_mlx with exactly one of its extras cpu, cuda12 and cuda13 on "
        "Linux (pip install '.[cpu]' in its folder), with none of them on macOS."
    ) from None

__all__ = [
    "check_process",
    "describe",
    "exact_float32",
    "float32_products",
    "in_gpu_memory",
    "mx",
    "named_arrays",
    "nn",
    "optimizers",
]


_PROCESS = os.getpid()


def check_process() -> None:
    """Raises QwenMLXError in a child that os.fork made: MLX's threads are not in it, and it would wait for ever."""
    if os.getpid() != _PROCESS:
        raise QwenMLXError(
            "This process was forked from one that had loaded MLX, whose threads a fork leaves behind; start it with "
            "multiprocessing.set_start_method('spawn'), or import qwen_mlx in the child only."
        )


def describe() -> str:
    """The backend in words, for statistics lines: "CPU", "Metal (Apple M3 Pro)" or "CUDA (NVIDIA H100)"."""
    if mx.default_device() == mx.cpu:
        return "CPU"
    name = "Metal" if mx.metal.is_available() else "CUDA"
    device = mx.device_info().get("device_name", "")
    return f"{name} ({device})" if device else name


def exact_float32() -> None:
    """Keeps products of float32 numbers from being computed in TF32 on a GPU, which MLX does by default: 2.9e-4 off.

    MLX asks the environment at its first product, so that this has to come before; a user's own MLX_ENABLE_TF32 stays.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def float32_products() -> str:
    """The way in which a GPU multiplies float32 numbers in this process, in words."""
    if mx.default_device() == mx.cpu or os.environ.get("MLX_ENABLE_TF32", "1") == "0":
        return "float32"
    return "TF32 where the GPU has it (MLX_ENABLE_TF32=0 for float32)"


def named_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """A module's parameters by their dotted names."""
    named: list[tuple[str, mx.array]] = []
    tree_flatten(module.parameters(), destination=named)
    return named


def in_gpu_memory(array: np.ndarray) -> mx.array:
    """Copies an array to where the GPU's kernels read it at once.

    With CUDA an array that Python wrote lies in the host's memory, and each kernel fetches it across the bus. An array
    that a kernel wrote lies in the GPU's memory, unless it has at most 8 bytes: MLX keeps those on the host.
    """
    if mx.default_device() == mx.cpu or not mx.cuda.is_available():
        return mx.array(array)
    if array.nbytes > 8:
        moved = mx.array(array) + 0
    else:
        moved = (mx.array(np.pad(array.reshape(-1), (0, 8))) + 0)[: array.size].reshape(array.shape)
    mx.async_eval(moved)  # or every compiled function that uses it would move it again
    return moved


def peak_memory() -> int:
    """The most memory used so far, in bytes: of the process on a CPU, of MLX's allocator on a GPU."""
    if mx.default_device() != mx.cpu:
        return int(mx.get_peak_memory())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
