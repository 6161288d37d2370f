"""Runs Metal kernels of mx.fast.metal_kernel on a CPU, and checks them while they run."""

from __future__ import annotations

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
]
