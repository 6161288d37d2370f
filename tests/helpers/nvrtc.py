"""Compiles what mx.fast.cuda_kernel would compile, with NVIDIA's run-time compiler from PyPI: no GPU is needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from qwen_mlx import ops

# The declarations that kernels use from the header that MLX puts before a custom kernel; the header itself comes only
# with MLX's CUDA wheels.
PREAMBLE = """
#include <cuda_fp16.h>
#include <cuda_bf16.h>
typedef int int32_t;
typedef unsigned int uint32_t;
struct Shape { int32_t sizes[10]; __device__ int32_t operator[](int i) const { return sizes[i]; } };
namespace mlx::core::cu {  // where a kernel's body stands: it hides a name of ours
template <int N, typename T> __device__ bool is_aligned(T* x);
}
"""
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}


@contextmanager
def compiled_kernels(optimized: bool = True) -> Iterator[list[str]]:
    """Within it, operations "run" as CUDA kernels that are only compiled; the list collects their PTX.

    optimized: as MLX has them; without, the compiler reads as strictly and takes half the time.
    """
    ptx: list[str] = []

    def cuda_kernel(name, input_names, output_names, source, header):
        def launch(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            arguments = []
            for array, argument in zip(inputs, input_names):
                arguments.append(f"const {TYPES[array.dtype]}* {argument}")
                if f"{argument}_shape" in source:
                    arguments.append(f"const __grid_constant__ Shape {argument}_shape")
            arguments += [f"{TYPES[dtype]}* {argument}" for dtype, argument in zip(output_dtypes, output_names)]
            values = [f"{value}".removeprefix("mlx.core.") for _, value in template]
            constants = "".join(
                f"  using {key} = {TYPES[value]};\n"
                if isinstance(value, mx.Dtype)
                else f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {int(value)};\n"
                for key, value in template
            )
            kernel = f"custom_kernel_{'_'.join([name, *values])}"  # MLX's name: a negative value would not compile
            text = f"__global__ void {kernel}({', '.join(arguments)}) {{\n{constants}{source}\n}}\n"
            ptx.append(compile_cuda(f"{PREAMBLE}{header}namespace mlx::core::cu {{\n{text}}}\n", optimized))
            assert all(size % group == 0 for size, group in zip(grid, threadgroup)), "CUDA would launch more threads"
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return launch

    with pytest.MonkeyPatch.context() as patch, ops.forced("cuda"):
        patch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
        yield ptx


@functools.cache
def compile_cuda(source: str, optimized: bool) -> str:
    """The PTX for compute capability 8.0; AssertionError with NVRTC's log if it does not compile or warns."""
    import nvidia.cu13

    root = Path(next(iter(nvidia.cu13.__path__)))
    nvrtc = ctypes.CDLL(str(next(root.glob("lib/libnvrtc.so*"))))
    program = ctypes.c_void_p()
    assert _succeeded(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    options = ["--gpu-architecture=compute_80", "--std=c++17", f"-I{root}/include", *["-Ofc=max"] * (not optimized)]
    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    )
    log = _text(nvrtc, "ProgramLog", program)
    assert status == 0, log
    assert "warning" not in log, log
    ptx = _text(nvrtc, "PTX", program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx


def _succeeded(status: int) -> bool:
    return status == 0


def _text(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    assert _succeeded(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    assert _succeeded(getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.value.decode()
