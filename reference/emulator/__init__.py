"""Runs Metal kernels of mx.fast.metal_kernel on a CPU, and checks them while they run. Needs Linux x86-64 and g++ 12.

    from reference.emulator import emulate

    with emulate(order="random", seed=1):
        y = function_that_makes_and_calls_metal_kernels(x)

What runs is the text that MLX would hand to Metal's compiler: its preamble from the installed mlx, the header, the
signature it generates and the body; metal_source returns that text. Threads are fibers of one CPU thread: a
threadgroup at a time, each thread until its next barrier or simd operation. Grid, threadgroup, template and array
shapes are those of the call, so the host code is tested with the kernel.

Every access to memory is classified before it happens. Errors are Python exceptions with kernel, line and thread:
OutOfBounds, ReadOnly, DataRace (whatever the order the threads ran in), UninitialisedRead, UnwrittenOutput, Divergence
and Deadlock at barriers and simd operations, ThreadgroupMemory above 32 KiB, UndefinedBehaviour, Runaway, CompileError,
InvalidLaunch. lint(metal_source(...)) finds what Metal's compiler refuses and g++ does not, above all wrong address
spaces. `python -m reference.emulator --help` does all of it for a file.

Stricter than Metal: a simd operation must be reached by all threads of its simdgroup; two threads that store the same
value to one place race. Local variables that nothing has set: where g++ warns of one, or everywhere with
unset_locals=True (the command does), a kernel runs a second time with another value in them, and must give the same.
Not modelled: the accuracy of Apple's functions (these are rounded from double), its choice
where to contract (contract=True contracts everywhere), memory order between threadgroups, and the number of threads
that a kernel's registers allow (max_threads=384 is always allowed). flush=True flushes subnormal numbers as Apple's
GPUs do. Unknown, and so compile errors: matrices (float4x4, simdgroup_matrix), textures, arithmetic on packed vectors
without a conversion (float3(p[i]) * 2.0f works), swizzles of swizzles. strict(metal_source(...)) is a second reading,
as C++14. Kernels run as native code with the rights of this process: run only what you would run yourself.
"""

from __future__ import annotations

from .build import unavailable
from .errors import (
    CompileError,
    DataRace,
    Deadlock,
    Divergence,
    EmulatorError,
    InvalidLaunch,
    OutOfBounds,
    ReadOnly,
    Runaway,
    ThreadgroupMemory,
    Unavailable,
    UndefinedBehaviour,
    UninitialisedRead,
    UnwrittenOutput,
)
from .lint import Finding, lint
from .standin import MetalKernel, emulate, metal_kernel, metal_source
from .strict import strict

__all__ = [
    "CompileError",
    "DataRace",
    "Deadlock",
    "Divergence",
    "EmulatorError",
    "Finding",
    "InvalidLaunch",
    "MetalKernel",
    "OutOfBounds",
    "ReadOnly",
    "Runaway",
    "ThreadgroupMemory",
    "Unavailable",
    "UndefinedBehaviour",
    "UninitialisedRead",
    "UnwrittenOutput",
    "emulate",
    "lint",
    "metal_kernel",
    "metal_source",
    "strict",
    "unavailable",
]
