"""Which executor computes an operation: the Metal kernel, the same kernel in CUDA, or plain MLX ("reference").

The kernels' sources are in qwen_mlx/metal. On Metal a part of the model is computed by its kernels only after they have
proved themselves on this machine (trial/). QWEN_MLX_KERNELS, read once, trusts them without a trial, or switches them
off, all or one by one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backend import mx
from ..errors import QwenMLXError
from . import cpu

SOURCES = Path(__file__).resolve().parent.parent / "metal"
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Parts that can be switched off; "step" is the decoding step as a whole, of which "matvec" and "attend" are parts.
PARTS = ("step", "matvec", "matmul", "attend", "unpack", "rms_norm", "rope", "swiglu", "best_token")
MAX_ELEMENTS = 2**31 - 1  # the kernels index with 32 bits
R = TypeVar("R")

_refused: dict[str, str] = {}  # what the trials of this process's models said: parts, and why not
_proven: set[str] = set()
_forced: str | None = None  # "metal", "cuda", "cpu" or "reference": overrides the choice, for tests and comparisons


class _Gradients(threading.local):
    """True where kernels get a gradient, for each thread: one may generate while another trains."""

    wanted = True


_gradients = _Gradients()


def executor(part: str = "") -> str:
    """ "metal", "cuda", "cpu" or "reference": what runs on the default device, or what computes one of PARTS."""
    if _forced is not None:
        return _forced
    off = part in switched_off() if part else len(switched_off()) == len(PARTS)
    if off:
        return "reference"
    if mx.default_device() == mx.cpu:
        return "cpu" if have_numba() else "reference"
    if on_trial() and (refusal(part) if part else not _proven):
        return "reference"
    return device()


def device() -> str:
    """The kernels' language on a GPU of this machine, "metal" or "cuda"."""
    return _forced or ("metal" if mx.metal.is_available() else "cuda")


def on_gpu(part: str) -> bool:
    """True if a GPU's kernel computes one of PARTS."""
    return executor(part) in ("metal", "cuda")


def on_cpu(part: str, dtype: mx.Dtype) -> bool:
    """True if the CPU's own functions compute one of PARTS: they take float32 and keep nothing for a gradient."""
    return dtype == mx.float32 and not _gradients.wanted and executor(part) == "cpu"


@functools.cache
def have_numba() -> bool:
    """True if numba is installed, which compiles the CPU's own functions. It is not imported here."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def setting() -> tuple[str, frozenset[str]]:
    """QWEN_MLX_KERNELS, read once: "on", "off", "try", or "" where it says none of these; and the parts that it
    switches off, see switched_off."""
    value = os.environ.get("QWEN_MLX_KERNELS")
    if value in (None, "on", "off", "try"):
        return value or "", frozenset(PARTS if value == "off" else ())
    names = value.split(",")
    if not all(name.startswith("-") and name[1:] in PARTS for name in names):
        choices = ", ".join(f"-{part}" for part in PARTS)
        raise QwenMLXError(
            f"QWEN_MLX_KERNELS is {value!r}, expected on, off, or some of {choices}, with commas between, or try."
        )
    return "", frozenset(name[1:] for name in names)


def switched_off() -> frozenset[str]:
    """Parts that QWEN_MLX_KERNELS switches off: "off" all PARTS, "-step,-rope" these two; "on", "try" or unset none.

    Raises QwenMLXError for anything else.
    """
    return setting()[1]


def on_trial() -> bool:
    """True where kernels have to prove themselves first: on Metal unless QWEN_MLX_KERNELS is "on", elsewhere only where
    it is "try". An executor that is forced, and the CPU, need no proof."""
    if _forced is not None or mx.default_device() == mx.cpu or len(switched_off()) == len(PARTS):
        return False
    value = setting()[0]
    return value == "try" or (value != "on" and mx.metal.is_available())


def adopt(proven: Iterable[str], refused: Mapping[str, str]) -> None:
    """Takes a trial's verdict: parts whose kernels proved themselves, and the others with the reason. A part that one
    model's trial refused stays refused in this process."""
    _refused.update(refused)
    _proven.update(proven)
    _proven.difference_update(_refused)


def forget() -> None:
    """Forgets every verdict."""
    _refused.clear()
    _proven.clear()


def refusal(part: str) -> str | None:
    """Why the trials keep one of PARTS from its kernels, None where it has proved itself."""
    return None if part in _proven else _refused.get(part, "not tried")


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
    """Within it, operations have no gradient (kernels and SwiGLU: zero), which saves Python's time at every call: for
    generation."""
    before, _gradients.wanted = _gradients.wanted, False
    try:
        yield
    finally:
        _gradients.wanted = before


def recording() -> bool:
    """True if operations keep what a gradient needs (see no_grad)."""
    return _gradients.wanted


def compiled(
    function: Callable[..., list[mx.array]], constants: Callable[[], Iterable[mx.array]] | None = None
) -> Callable[..., list[mx.array]]:
    """mx.compile(function), whose graph is built once. On a CPU, whose functions compute at once, these are recorded
    once where the arrays are known that they read beside the arguments, the `constants`. Where an executor is forced,
    the function itself: a stand-in for MLX's kernels has to be called each time."""
    fast = mx.compile(function)
    replayed = None if constants is None else functools.cache(lambda: cpu.Replayed(function, constants))

    def call(*arrays: mx.array) -> list[mx.array]:
        if _forced is None and on_gpu("step"):
            return fast(*arrays)
        if replayed is not None and on_cpu("step", arrays[-1].dtype):
            return replayed()(*arrays)
        return function(*arrays)

    return call


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel's file in qwen_mlx/metal, without its suffix, the names of its inputs and outputs, and its headers.

    variant: tells kernels of one file apart; definitions: names that the body uses, with what each stands for in terms
    of the inputs; aligned: arrays that are 16-byte aligned in most calls, for which CUDA compiles the body once more.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    variant: str = ""
    definitions: tuple[tuple[str, str], ...] = ()
    aligned: tuple[str, ...] = ()

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
        """The text before the kernel in "metal" or "cuda".

        CUDA's compiler reads the files itself, because MLX hashes a kernel's whole text at each launch. Their digest
        tells MLX's caches when they have changed.
        """
        files = ("metal_prelude.h" if dialect == "metal" else "nvidia/cuda_prelude.h", *self.headers)
        text = "".join(source_text(file) for file in files)
        if dialect == "cuda":
            text = f"// {hashlib.sha256(text.encode()).hexdigest()}\n"
            text += "".join(f'#include "{SOURCES / file}"\n' for file in files)
        return text

    def source(self, dialect: str) -> str:
        """The kernel's body, with the definitions in its first empty line, which follows its threadgroup memory.

        In CUDA the body may stand there twice: with pointers that are known to be aligned, and with others.
        """
        file = f"{self.name}.metal"
        number = (SOURCES / file).read_text(encoding="utf-8").partition("\n\n")[0].count("\n") + 2
        lines = source_text(file).split("\n")  # its #line first
        memory, body = "\n".join(lines[:number]), "\n".join(lines[number + 1 :])
        body = f"{' '.join(f'const auto {name} = {value};' for name, value in self.definitions)}\n{body}"
        if dialect == "cuda" and self.aligned:
            originals = " ".join(f"const auto any_{name} = {name};" for name in self.aligned)
            pointers = " ".join(f"const auto {name} = aligned(any_{name});" for name in self.aligned)
            start = f'#line {number} "{_label(file)}"\n'
            body = (
                f"{originals} if (all_aligned({', '.join(self.aligned)})) {{ {pointers} {body}}} else {{\n"
                f"{start}{body}}}\n"
            )
        return f"{memory}\n{body}"


def source_text(file: str) -> str:
    """A file of qwen_mlx/metal without comments and indentation, because MLX hashes the text at every launch, but with
    every line, so that a compiler's error names the file and the line."""
    text = (SOURCES / file).read_text(encoding="utf-8")
    return f'#line 1 "{_label(file)}"\n' + re.sub(r"[ \t]*//.*|^[ \t]+", "", text, flags=re.MULTILINE)


def _label(file: str) -> str:
    return f"qwen_mlx/metal/{file}"


# Keyed on the factory too: a stand-in for mx.fast.metal_kernel must not be handed MLX's own kernels, nor leave its own.
@functools.lru_cache(maxsize=64)
def _compiled(factory: Callable[..., Any], kernel: Kernel) -> Callable[..., list[mx.array]]:
    dialect = "metal" if factory is mx.fast.metal_kernel else "cuda"
    launch: Callable[..., list[mx.array]] = factory(
        name="_".join(filter(None, ("qwen", Path(kernel.name).name, kernel.variant))),
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=kernel.header(dialect),
        source=kernel.source(dialect),
    )
    return launch


def differentiable(
    kernel: Callable[..., R], fallback: Callable[..., R], *arrays: mx.array, vjp: Callable[..., Any] | None = None
) -> R:
    """kernel(*arrays), with the derivatives of `fallback`, the same function in plain MLX, or with a vjp of its own."""
    if not _gradients.wanted:
        return kernel(*arrays)
    function: Any = mx.custom_function(kernel)  # an object, to its stub

    def plain(*arrays: mx.array) -> list[mx.array]:
        return _as_list(fallback(*arrays))

    def vjp_of_plain(primals: Any, cotangents: Any, _: object) -> tuple[mx.array, ...]:
        return tuple(mx.vjp(plain, _as_list(primals), _as_list(cotangents))[1])

    def jvp_of_plain(primals: Any, tangents: Any) -> Any:
        primals = _as_list(primals)
        known = [mx.zeros_like(x) if t is None else t for x, t in zip(primals, _as_list(tangents))]
        found = mx.jvp(plain, primals, known)[1]
        return found if len(found) > 1 else found[0]

    function.vjp(vjp or vjp_of_plain)
    function.jvp(jvp_of_plain)
    result: R = function(*arrays)
    return result


def have_values(*arrays: mx.array) -> bool:
    """False where MLX traces, within mx.compile, mx.vmap or mx.export_function; else computes the arrays."""
    try:
        mx.eval(*arrays)
    except ValueError:
        return False
    return True


def _as_list(value: Any) -> list[mx.array]:
    return list(value) if isinstance(value, list | tuple) else [value]


def pack_size(n: int, dtype: mx.Dtype) -> int:
    """Elements of one 16-byte access, or the largest power of two of them that divides n."""
    size = 16 // dtype.size
    while n % size:
        size //= 2
    return size


def threads(n: int, most: int) -> int:
    """Simdgroups' threads for n items, at most `most` and with as few idle ones as an equal number of rounds allows."""
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


def require_like(name: str, x: mx.array | None, shape: Sequence[int | str], dtype: mx.Dtype) -> None:
    """Raises ValueError unless x is an array of this dtype and shape; a str in the shape is the name of any size."""
    require(
        isinstance(x, mx.array)
        and x.dtype == dtype
        and x.ndim == len(shape)
        and all(isinstance(want, str) or size == want for size, want in zip(x.shape, shape)),
        lambda: f"{name} {described(x)}, expected {_shown(shape)} and {dtype}.",
    )


def require_position(position: mx.array | None) -> None:
    """Raises ValueError unless position is a decoding step's: int32 (2,) or longer."""
    require(
        isinstance(position, mx.array) and position.ndim == 1 and position.size >= 2 and position.dtype == mx.int32,
        lambda: f"position {described(position)}, expected (2,) and {mx.int32}.",
    )


def _shown(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


def described(x: object) -> str:
    """ "has shape (2, 3) and dtype mlx.core.float32", or "is of type list" for what is no array."""
    if isinstance(x, mx.array):
        return f"has shape {x.shape} and dtype {x.dtype}"
    return "is None" if x is None else f"is of type {type(x).__name__}"


def explain() -> str:
    """Says what computes the operations on the current default device, and why, a line each."""
    kind = executor()
    if _forced is not None:
        why = "forced"
    elif len(switched_off()) == len(PARTS):
        why = "QWEN_MLX_KERNELS=off"
    elif mx.default_device() == mx.cpu:
        why = "the default device is the CPU"
        if kind == "reference" and not have_numba():
            why += "; with numba, which the extra 'cpu' brings, it would be several times as fast"
    elif kind == "reference":
        why = "no kernel has proved itself here"
    else:
        why = f"the default device is a GPU with {'Metal' if kind == 'metal' else 'CUDA'}"
    if kind == "cpu":
        from .cpu import threads  # which imports numba

        count = threads.count()
        on = f"{count} thread{'s' * (count > 1)}"
        return f"float32 without gradients: compiled by numba, on {on} ({why})\nall else: plain MLX"
    what = {"metal": "Metal kernels", "cuda": "the Metal kernels compiled as CUDA", "reference": "plain MLX"}[kind]
    lines = [f"rms_norm, add_rms_norm, rope, qkv_rope, swiglu, swiglu_joined: {what} ({why})"]
    if kind != "reference":
        lines += [
            "plain MLX for rows above 16384 (rms_norm) and arrays of 2^31 elements or more",
            "one token after others: fused kernels on dense, affine, Q4_K and Q6_K matrices; else MLX's products",
        ]
        if kind == "cuda":
            lines.append("2 to 64 rows of 16 bits: an own product on dense matrices of up to 64 MiB")
            lines.append("2 to 32 rows of 16 bits: an own product on Q4_K and Q6_K matrices")
        if switched_off():
            lines.append(f"but {', '.join(sorted(switched_off()))}: plain MLX (QWEN_MLX_KERNELS)")
    if on_trial():
        for part in sorted(set(PARTS) - switched_off()):
            reason = refusal(part)
            if reason is None:
                lines.append(f"{part}: proved itself on this machine")
            elif part in _refused:
                lines.append(f"{part}: plain MLX, for its kernels were refused ({reason})")
    rest = "attention" if kind == "reference" else "else attention"
    return "\n".join([*lines, f"{rest}: MLX's scaled_dot_product_attention; on the CPU products in float32"])
