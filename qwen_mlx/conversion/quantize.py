"""How the converter stores a tensor in an MLX model folder, and what that costs against the source's values."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import QwenMLXError
from ..gguf.blocks import CHUNK_WEIGHTS, threads
from ..gguf.unpack import pack
from ..loading.sources import SourceTensor
from .write import ShardedWriter, TensorSpec

PIECE_WEIGHTS = CHUNK_WEIGHTS  # a thread works on whole rows of about this many weights
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}  # ours -> safetensors'
DENSE_TYPES = ("F32", "F16", "BF16", "F64")  # of GGUF: not quantized
FLOATS = ("bfloat16", "float16", "float32")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the user chose; see conversion.convert. Raises QwenMLXError for a value that is not offered."""

    dtype: str = "bfloat16"
    scales: str = "auto"
    requantize: int | None = None
    quantize: int | None = None
    group_size: int = 64
    allow_nan: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", FLOATS),
            ("scales", ("auto", *FLOATS)),
            ("requantize", (None, *BITS)),
            ("quantize", (None, *BITS)),
            ("group_size", GROUP_SIZES),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(str, allowed))
                raise QwenMLXError(f"{name} is {getattr(self, name)!r}, expected one of {choices}.")
        if self.requantize and self.quantize:
            raise QwenMLXError("quantize packs every matrix, requantize only some; give one of them.")


@dataclass(frozen=True)
class Form:
    """How a tensor is stored. mode "dense": in `dtype`; "affine" or "mxfp4": as codes with scales (and biases) in
    `dtype`, and from_source says that they are the source's own, not quantized here.
    """

    mode: str
    dtype: str
    bits: int = 0
    group_size: int = 0
    from_source: bool = False

    def specs(self, tensor: SourceTensor) -> list[TensorSpec]:
        """The tensors of the safetensors file, in the order of encode's arrays."""
        if self.mode == "dense":
            return [TensorSpec(tensor.name, DTYPES[self.dtype], tensor.shape)]
        rows, columns = tensor.shape
        module, groups = tensor.name.removesuffix(".weight"), (rows, columns // self.group_size)
        specs = [
            TensorSpec(f"{module}.weight", "U32", (rows, columns * self.bits // 32)),
            TensorSpec(f"{module}.scales", DTYPES[self.dtype], groups),
            TensorSpec(f"{module}.biases", DTYPES[self.dtype], groups),
        ]
        return specs if self.mode == "affine" else specs[:2]

    def config(self) -> dict[str, object]:
        """The layer's entry under `quantization` in config.json, as mlx-lm reads it."""
        mode = {} if self.mode == "affine" else {"mode": self.mode}
        return {"group_size": self.group_size, "bits": self.bits, **mode}

    def __str__(self) -> str:
        if self.mode == "dense":
            return self.dtype
        if self.mode == "mxfp4":
            return "mxfp4"
        return f"{self.bits} bits, group {self.group_size}, {self.dtype} scales"


def choose_form(tensor: SourceTensor, options: Options) -> Form:
    """The source's own codes where MLX has their arithmetic, unless `quantize` is given; else dense, or quantized as
    the user asked. Matrices whose rows the group size does not divide stay as they would be without being asked.
    """
    divided = len(tensor.shape) == 2 and tensor.shape[1] % options.group_size == 0
    if tensor.form is not None and not (options.quantize and divided):
        form = tensor.form
        dtype = form.scale_dtype
        if form.mode == "affine":
            dtype = tensor.scale_dtype() if options.scales == "auto" else options.scales
        return Form(form.mode, dtype, form.bits, form.group_size, from_source=True)
    bits = options.quantize or (None if tensor.type_name in DENSE_TYPES else options.requantize)
    if bits and divided:
        dtype = options.dtype if options.scales == "auto" else options.scales
        return Form("affine", dtype, bits, options.group_size)
    return Form("dense", options.dtype)


@dataclass(frozen=True)
class Stored:
    """How one tensor was stored, and what that changed: relative_l2 = ||stored - source|| / ||source|| and max_abs, the
    largest difference, over finite values; both 0.0 if nothing changed. `not_finite` counts the values that are not
    finite, or of which the file's format and MLX disagree whether they are.
    """

    name: str
    source_name: str
    source_type: str
    stored_as: str
    shape: tuple[int, ...]
    nbytes: int
    relative_l2: float
    max_abs: float
    not_finite: int

    @property
    def exact(self) -> bool:
        """Whether the stored values are the source's, all of them finite."""
        return not self.max_abs and not self.not_finite


def store(
    tensor: SourceTensor, form: Form, writer: ShardedWriter, pool: ThreadPoolExecutor, allow_nan: bool = False
) -> Stored:
    """Writes one tensor in pieces of whole rows, made by the pool's threads, and measures what its form costs.

    Raises QwenMLXError naming the tensor: for values or scales that are not finite, unless allow_nan; for values that
    the form's dtype cannot hold.
    """
    specs = form.specs(tensor)
    cost = _Cost()
    step = max(1, PIECE_WEIGHTS // tensor.shape[-1])
    pieces = ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))
    jobs = (lambda a=a, b=b: _encode(tensor, form, a, b, allow_nan) for a, b in pieces)
    for arrays, piece_cost in in_order(pool, jobs):
        for spec, array in zip(specs, arrays):
            writer.write(spec.name, array)
        cost += piece_cost
    tensor.done()
    return Stored(
        tensor.name,
        tensor.source_name,
        tensor.type_name,
        str(form),
        tensor.shape,
        sum(spec.nbytes for spec in specs),
        math.sqrt(cost.squares / cost.reference) if cost.reference else 0.0,
        cost.max_abs,
        cost.not_finite,
    )


def in_order(pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], T]]) -> Iterator[T]:
    """The jobs' results, in order; no more jobs than threads, and one, are under way or done."""
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@dataclass
class _Cost:
    squares: float = 0.0
    reference: float = 0.0
    max_abs: float = 0.0
    not_finite: int = 0

    def __iadd__(self, other: _Cost) -> _Cost:
        self.squares += other.squares
        self.reference += other.reference
        self.max_abs = max(self.max_abs, other.max_abs)
        self.not_finite += other.not_finite
        return self

    def compare(self, source: np.ndarray, stored: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            difference = (stored - source).ravel()
        flat = source.ravel()
        if self.not_finite:
            finite = np.isfinite(difference)
            difference, flat = difference[finite], flat[finite]
        largest = _largest(difference)
        self.squares += _squares(difference) if largest else 0.0
        self.reference += _squares(flat)
        self.max_abs = max(self.max_abs, largest)


def _squares(x: np.ndarray) -> float:
    """x . x, in float32 where its range is enough."""
    with np.errstate(over="ignore"):
        total = float(np.dot(x, x))
    return total if 1e-20 < total < 1e38 else float(np.einsum("i,i->", x, x, dtype=np.float64, casting="safe"))


def _largest(x: np.ndarray) -> float:
    """The largest magnitude, NaN if there is one: without a temporary array."""
    return float(np.maximum(x.max(initial=0), -x.min(initial=0)))


def _encode(
    tensor: SourceTensor, form: Form, start: int, stop: int, allow_nan: bool
) -> tuple[tuple[np.ndarray, ...], _Cost]:
    """Rows start to stop as they are written, and what that costs."""
    cost = _Cost()
    wide: Sequence[np.ndarray]
    if form.from_source and tensor.packed is not None:
        codes, *wide = tensor.packed(start, stop)
        bad = _bad_values(tensor, form, start, stop, wide)
        cost.not_finite = _check_bad(tensor, bad, allow_nan)
        if form.mode == "mxfp4":
            return (codes, *wide), cost
        source, unpacked = None, None
    else:
        source = tensor.values(start, stop)
        cost.not_finite = _check_bad(tensor, source.size - int(np.isfinite(source).sum()), allow_nan)
        if form.mode == "dense":
            stored, rounded = _narrowed(tensor, source, form.dtype, "--dtype")
            if rounded is not source:
                cost.compare(source, rounded)
            return (stored,), cost
        values = _narrowed(tensor, source, "float32", "--scales")[1]
        wide = affine_range(values, form.bits, form.group_size)
        if not cost.not_finite and not math.isfinite(_largest(wide[0])):
            raise QwenMLXError(
                f"tensor {tensor.source_name!r} ({tensor.type_name}) has groups of weights whose range is beyond "
                "float32; convert it without --quantize."
            )
    (scales, rounded_scales), (biases, rounded_biases) = (
        _narrowed(tensor, array, form.dtype, "--scales") for array in wide
    )
    if source is not None:
        unpacked = affine_codes(values, rounded_scales, rounded_biases, form.bits)
        codes = pack(unpacked, form.bits)
    elif all(np.array_equal(*pair, equal_nan=True) for pair in zip(wide, (rounded_scales, rounded_biases))):
        return (codes, scales, biases), cost
    else:
        source, unpacked = tensor.values(start, stop), unpack(codes, form.bits)
    groups = unpacked.reshape(*rounded_scales.shape, form.group_size).astype(np.float32)
    with np.errstate(all="ignore"):
        groups *= rounded_scales[..., None]
        groups += rounded_biases[..., None]
    cost.compare(source, groups.reshape(source.shape))
    return (codes, scales, biases), cost


def count_bad(tensor: SourceTensor, form: Form, start: int, stop: int) -> int:
    """How many values of rows start to stop are not finite: what store() refuses."""
    if form.from_source and tensor.packed is not None:
        return _bad_values(tensor, form, start, stop, tensor.packed(start, stop)[1:])
    values = tensor.values(start, stop)
    return values.size - int(np.isfinite(values).sum())


def _bad_values(tensor: SourceTensor, form: Form, start: int, stop: int, scales: Sequence[np.ndarray]) -> int:
    """Of packed rows: a whole group where a scale or bias is not finite."""
    if form.mode == "affine":
        finite: np.ndarray = np.isfinite(scales[0])
        finite &= np.isfinite(scales[1])
        return (finite.size - int(finite.sum())) * form.group_size
    if scales[0].max(initial=0) < 253:  # 6 * 2^(252 - 127) is the last that float32 holds whatever the codes
        return 0
    values = tensor.values(start, stop).reshape(*scales[0].shape, form.group_size)
    bad = (scales[0] == 255)[..., None] | ~np.isfinite(values)  # 255 is NaN in MLX, 2^128 in ggml
    return int(bad.sum())


def _check_bad(tensor: SourceTensor, bad: int, allow_nan: bool) -> int:
    if bad and not allow_nan:
        raise QwenMLXError(
            f"tensor {tensor.source_name!r} ({tensor.type_name}) holds values or scales that are not finite: the file "
            "is damaged, download it again (--allow-nan converts it all the same)."
        )
    return bad


def _narrowed(tensor: SourceTensor, array: np.ndarray, dtype: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """encode(); QwenMLXError for a finite element that `dtype` cannot hold."""
    stored, rounded = encode(array, dtype)
    if not math.isfinite(_largest(rounded)):
        overflow = np.isfinite(array) & ~np.isfinite(rounded)
        if overflow.any():
            hint = f"; give {option} float32." if dtype != "float32" else ", the widest there is."
            raise QwenMLXError(
                f"tensor {tensor.source_name!r} ({tensor.type_name}) holds {array[overflow][0]:g}, too much for "
                f"{dtype}{hint}"
            )
    return stored, rounded


def encode(values: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(array to store, the float32 values it stands for) of float32 or float64 `values` as "float32", "float16" or
    "bfloat16", rounded to nearest even; bfloat16 is returned as uint16. float32 is returned as it is.
    """
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    if dtype == "float32":
        return values, values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return half, half.astype(np.float32)
    bits = values.view(np.uint32)
    words = bits >> 16
    words &= 1
    words += 0x7FFF
    words += bits  # carries into the exponent as it should
    words &= 0xFFFF0000
    rounded = words.view(np.float32)
    if np.isnan(values.max(initial=0)):
        words[np.isnan(values)] = 0x7FC00000
    return np.ascontiguousarray(words.view("<u2")[..., 1::2]), rounded


def affine_range(values: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases (rows, columns / group_size) for mx.dequantize's w = scale * code + bias, chosen as mx.quantize
    does: each group's range is divided evenly, with the end of the larger magnitude and zero both hit exactly.
    """
    groups = values.reshape(len(values), -1, group_size)
    low, high, steps = groups.min(-1), groups.max(-1), np.float32(2**bits - 1)
    with np.errstate(all="ignore"):
        negative = np.abs(low) > np.abs(high)
        scales = np.maximum((high - low) / steps, np.float32(1e-7))
        scales = np.where(negative, scales, -scales)
        edge = np.where(negative, low, high)
        zero = np.rint(edge / scales)
        scales = np.where(zero == 0, scales, edge / zero)
    return scales, np.where(zero == 0, np.float32(0), edge)


def affine_codes(values: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """The nearest codes, uint8 (rows, columns), for scales and biases as they are stored: chosen after rounding these,
    unlike mx.quantize's, which at 8 bits with bfloat16 scales saves a third of the error.
    """
    groups = values.reshape(*scales.shape, -1)
    with np.errstate(all="ignore"):
        codes: np.ndarray = groups - biases[..., None]
        codes /= np.where(scales == 0, np.float32(1), scales)[..., None]
        np.rint(codes, out=codes)
        np.fmax(codes, 0, out=codes)  # NaN becomes 0
        np.fmin(codes, 2**bits - 1, out=codes)
        return codes.astype(np.uint8).reshape(values.shape)


def unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of gguf.unpack.pack: uint32 (rows, columns * bits / 32) to uint8 (rows, columns)."""
    words = np.zeros((codes.nbytes // bits, 8), np.uint8)
    words[:, :bits] = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, bits)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    unpacked: np.ndarray = (words.view(np.uint64) >> shifts) & np.uint64(2**bits - 1)
    return unpacked.astype(np.uint8).reshape(len(codes), -1)
