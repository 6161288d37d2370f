"""Which executor computes an operation: the Metal kernel, the same kernel in CUDA, or plain MLX ("reference").

The kernels' sources are in qwen_mlx/metal. QWEN_MLX_KERNELS, read once, switches them off, all or one by one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backend import mx
from ..errors import QwenMLXError

SOURCES = Path(__file__).resolve().parent.parent / "metal"
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# What can be switched off by itself; "step" is the decoding step as a whole, of which "matvec" and "attend" are parts.
PARTS = ("step", "matvec", "matmul", "attend", "unpack", "rms_norm", "rope", "swiglu", "best_token")
MAX_ELEMENTS = 2**31 - 1  # the kernels index with 32 bits
R = TypeVar("R")

_forced: str | None = None  # "metal", "cuda" or "reference": overrides the choice, for tests and comparisons


class _Gradients(threading.local):
    """Whether kernels get a gradient, for each thread: one may generate while another trains."""

    wanted = True


_gradients = _Gradients()


def executor(part: str = "") -> str:
    """ "metal", "cuda" or "reference": what runs on the current default device, or what computes one of PARTS."""
    if _forced is not None:
        return _forced
    if (part in switched_off() if part else len(switched_off()) == len(PARTS)) or mx.default_device() == mx.cpu:
        return "reference"
    return "metal" if mx.metal.is_available() else "cuda"


@functools.cache
def switched_off() -> frozenset[str]:
    """What QWEN_MLX_KERNELS switches off: "on" (the default) nothing, "off" all PARTS, "-step,-rope" these two.

    Raises QwenMLXError for anything else.
    """
    value = os.environ.get("QWEN_MLX_KERNELS", "on")
    if value in ("on", "off"):
        return frozenset(PARTS if value == "off" else ())
    names = value.split(",")
    if not all(name.startswith("-") and name[1:] in PARTS for name in names):
        choices = ", ".join(f"-{part}" for part in PARTS)
        raise QwenMLXError(
            f"QWEN_MLX_KERNELS is {value!r}, expected on, off, or some of {choices}, with commas between."
        )
    return frozenset(name[1:] for name in names)


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Within it, operations run on this executor; None restores the choice by device."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def no_grad() -> Iterator[None]:
    """Within it, operations have no gradient (kernels and SwiGLU: zero), which saves about 10 microseconds of Python a
    call: for generation."""
    before, _gradients.wanted = _gradients.wanted, False
    try:
        yield
    finally:
        _gradients.wanted = before


def recording() -> bool:
    """Whether operations keep what a gradient needs (see no_grad)."""
    return _gradients.wanted


def compiled(function: Callable[..., R]) -> Callable[..., R]:
    """mx.compile(function), whose graph is built once. Where an executor is forced the function itself: a stand-in for
    MLX's kernels has to be called each time."""
    fast = mx.compile(function)
    return lambda *arrays: (fast if _forced is None else function)(*arrays)


@dataclass(frozen=True, eq=False)
class Kernel:
    """One file of qwen_mlx/metal with the names of its inputs and outputs and the helper headers it needs.

    variant: tells kernels of one file apart that differ in a header or in `macros`, names and texts.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    variant: str = ""
    macros: tuple[tuple[str, str], ...] = ()

    def __call__(
        self,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, object]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        shapes: Sequence[tuple[int, ...]],
        dtype: mx.Dtype | Sequence[mx.Dtype] | None = None,
    ) -> list[mx.array]:
        """Launches a thread for each grid element. An empty grid gives zeros.

        template: constants of the kernel; "T", if it is not the first of them, is the first input's dtype.
        dtype: of the outputs, or each one's; None for the first input's.
        """
        dtype = dtype or inputs[0].dtype
        dtypes = [dtype] * len(shapes) if isinstance(dtype, mx.Dtype) else list(dtype)
        if 0 in grid:
            return [mx.zeros(shape, kind) for shape, kind in zip(shapes, dtypes)]
        factory = mx.fast.metal_kernel if executor() == "metal" else mx.fast.cuda_kernel
        return _compiled(factory, self)(
            inputs=list(inputs),
            template=[*([] if template[0][0] == "T" else [("T", inputs[0].dtype)]), *template],
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=list(shapes),
            output_dtypes=dtypes,
        )

    def header(self, dialect: str) -> str:
        """The text before the kernel in "metal" or "cuda". CUDA's compiler reads the files itself: MLX hashes a CUDA
        kernel's whole text at each launch, which took a fifth of a decoding step of 0.5B. Their digest tells MLX's
        caches when they have changed."""
        files = (f"{dialect}_prelude.h", *self.headers)
        texts = [_without_comments(file) for file in files]
        if dialect == "cuda":
            digest = hashlib.sha256("".join(texts).encode()).hexdigest()
            texts = [f"// {digest}", *(f'#include "{SOURCES / file}"' for file in files)]
        return "\n".join(texts + [f"#define {name} {text}" for name, text in self.macros]) + "\n"

    def source(self) -> str:
        """The kernel's body, the same in both dialects."""
        return _without_comments(f"{self.name}.metal")


def _without_comments(file: str) -> str:
    # MLX looks at the whole text at every call of a kernel.
    return re.sub(r"^\s+|\s*//.*", "", (SOURCES / file).read_text(encoding="utf-8"), flags=re.MULTILINE)


# Keyed on the factory too: a stand-in for mx.fast.metal_kernel must not be handed MLX's own kernels, nor leave its own.
@functools.lru_cache(maxsize=64)
def _compiled(factory: Callable[..., Any], kernel: Kernel) -> Callable[..., list[mx.array]]:
    dialect = "metal" if factory is mx.fast.metal_kernel else "cuda"
    made: Callable[..., list[mx.array]] = factory(
        name=f"qwen_{kernel.name}{kernel.variant and '_'}{kernel.variant}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=kernel.header(dialect),
        source=kernel.source(),
    )
    return made


def differentiable(kernel: Callable[..., R], fallback: Callable[..., R], *arrays: mx.array) -> R:
    """kernel(*arrays), with the gradient of `fallback`, the same function in plain MLX."""
    if not _gradients.wanted:
        return kernel(*arrays)
    function: Any = mx.custom_function(kernel)  # an object, to its stub
    function.vjp(lambda primals, cotangents, _: _twin_gradients(fallback, primals, cotangents))
    result: R = function(*arrays)
    return result


def _twin_gradients(
    fallback: Callable[..., Any], primals: Sequence[mx.array], cotangents: Sequence[mx.array]
) -> tuple[mx.array, ...]:
    return tuple(mx.vjp(lambda *x: _as_list(fallback(*x)), _as_list(primals), _as_list(cotangents))[1])


def _as_list(value: Any) -> list[mx.array]:
    return list(value) if isinstance(value, list | tuple) else [value]


def pack_size(n: int, dtype: mx.Dtype) -> int:
    """Elements of one 16-byte access, or the largest power of two of them that divides n."""
    size = 16 // dtype.size
    while n % size:
        size //= 2
    return size


def threads(n: int, most: int) -> int:
    """Whole simdgroups for n items, at most `most` threads and as few idle ones as an equal number of rounds allows."""
    rounds = -(-n // most)
    return -(-n // (rounds * 32)) * 32


def float_bits(value: float) -> int:
    """The float32 nearest to `value` as an int32 with the same bits: kernels take integers as template values only."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raises ValueError(message()) unless the condition holds."""
    if not condition:
        raise ValueError(message())


def require_float(name: str, x: mx.array) -> None:
    """Raises ValueError unless x is an array of one of FLOATS."""
    require(
        isinstance(x, mx.array) and x.dtype in FLOATS,
        lambda: f"{name} {described(x)}, expected an array of float32, float16 or bfloat16.",
    )


def require_like(name: str, x: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    """Raises ValueError unless x is an array of this shape and dtype."""
    require(
        isinstance(x, mx.array) and x.shape == shape and x.dtype == dtype,
        lambda: f"{name} {described(x)}, expected {shape} and {dtype}.",
    )


def require_place(place: mx.array | None) -> None:
    """Raises ValueError unless place is a decoding step's: int32 (2,) or longer."""
    require(
        isinstance(place, mx.array) and place.ndim == 1 and place.size >= 2 and place.dtype == mx.int32,
        lambda: f"place {described(place)}, expected (2,) and {mx.int32}.",
    )


def described(x: object) -> str:
    """ "has shape (2, 3) and dtype mlx.core.float32", or "is of type list" for what is no array."""
    if isinstance(x, mx.array):
        return f"has shape {x.shape} and dtype {x.dtype}"
    return "is None" if x is None else f"is of type {type(x).__name__}"


def explain() -> str:
    """What computes the operations on the current default device, and why, a line each."""
    kind = executor()
    if _forced is not None:
        why = "forced"
    elif len(switched_off()) == len(PARTS):
        why = "QWEN_MLX_KERNELS=off"
    elif mx.default_device() == mx.cpu:
        why = "the default device is the CPU"
    else:
        why = f"the default device is a GPU with {'Metal' if kind == 'metal' else 'CUDA'}"
    what = {"metal": "Metal kernels", "cuda": "the Metal kernels compiled as CUDA", "reference": "plain MLX"}[kind]
    lines = [f"rms_norm, add_rms_norm, rope, qkv_rope, swiglu, swiglu_joined: {what} ({why})"]
    if kind != "reference":
        lines += [
            "plain MLX for rows above 16384 (rms_norm) and arrays of 2^31 elements or more",
            "one token after others: fused kernels on dense, affine, Q4_K and Q6_K matrices; else MLX's products",
        ]
        if kind == "cuda":
            lines.append("2 to 64 rows of 16 bits: an own product on dense matrices of up to 64 MiB")
        if switched_off():
            lines.append(f"but {', '.join(sorted(switched_off()))}: plain MLX (QWEN_MLX_KERNELS)")
    rest = "attention" if kind == "reference" else "else attention"
    return "\n".join([*lines, f"{rest}: MLX's scaled_dot_product_attention; on the CPU products in float32"])
