"""Stores a tensor in an MLX model folder, and measures the error against the source's values."""

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
from ..gguf.packing import DENSE, Packing
from ..gguf.unpack import pack, unpack
from ..loading.parameters import Parameter
from ..loading.safetensors_files import DTYPES
from .write import ShardedWriter, TensorSpec

SAFETENSORS = {name: safetensors for safetensors, name in DTYPES.items()}
FLOATS = ("bfloat16", "float16", "float32")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The arguments of convert() that decide how tensors are stored. Raises QwenMLXError for a value not offered."""

    dtype: str = "bfloat16"
    scales: str = "auto"
    requantize: int | None = None
    quantize: int | None = None
    group_size: int = 64
    allow_nan: bool = False
    dense: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", FLOATS),
            ("scales", ("auto", *FLOATS)),
            ("requantize", (None, *BITS)),
            ("quantize", (None, *BITS)),
            ("group_size", GROUP_SIZES),
        ):
            value = getattr(self, name)
            if value not in allowed:
                choices = ", ".join(map(str, allowed))
                raise QwenMLXError(f"{name} is {value!r}, expected one of {choices}.")
            object.__setattr__(self, name, allowed[allowed.index(value)])  # NumPy's 4 becomes Python's
        if self.requantize and self.quantize:
            raise QwenMLXError("quantize packs every matrix, requantize only some; give one of them.")
        if self.dense and (self.requantize or self.quantize):
            raise QwenMLXError("dense unpacks every matrix, quantize and requantize pack some; give one of them.")


@dataclass(frozen=True)
class Form:
    """The stored form of a tensor: dense in `dtype`, or packed with scales (and biases) in it. from_source: the codes
    are the source's own, not quantized here."""

    packing: Packing
    dtype: str
    from_source: bool = False

    def specs(self, tensor: Parameter) -> list[TensorSpec]:
        """The tensors of the safetensors file, in the order of the arrays that are written."""
        if self.packing == DENSE:
            return [TensorSpec(tensor.name, SAFETENSORS[self.dtype], tensor.shape)]
        rows, columns = tensor.shape
        module, groups = tensor.name.removesuffix(".weight"), (rows, columns // self.packing.group_size)
        specs = [TensorSpec(f"{module}.weight", "U32", (rows, columns * self.packing.bits // 32))]
        for kind in ("scales",) if self.packing.kind == "mxfp4" else ("scales", "biases"):
            specs.append(TensorSpec(f"{module}.{kind}", SAFETENSORS[self.dtype], groups))
        return specs

    def config(self) -> dict[str, object]:
        """The layer's entry under `quantization` in config.json, as mlx-lm reads it."""
        mode = {} if self.packing.kind == "affine" else {"mode": self.packing.kind}
        return {"group_size": self.packing.group_size, "bits": self.packing.bits, **mode}

    def __str__(self) -> str:
        if self.packing == DENSE:
            return self.dtype
        return f"{self.packing}, {self.dtype} scales" if self.packing.kind == "affine" else str(self.packing)


def choose_form(tensor: Parameter, options: Options) -> Form:
    """The source's own codes where MLX has their arithmetic, unless `quantize` or `dense` is given; else dense, or
    quantized as the user asked. Matrices whose rows the group size does not divide stay as they would be without being
    asked.
    """
    if options.dense:
        return Form(DENSE, options.dtype)
    divided = len(tensor.shape) == 2 and tensor.shape[1] % options.group_size == 0
    own = next((packing for packing in tensor.packings if packing.kind in ("affine", "mxfp4")), None)
    if own is not None and not (options.quantize and divided):
        dtype = options.scales
        if own.kind == "mxfp4" or dtype == "auto":
            dtype = tensor.scale_dtype()
            tensor.release()
        return Form(own, dtype, from_source=True)
    quantized = not tensor.stored_dtype and tensor.type_name not in ("F64", "float64")
    bits = options.quantize or (options.requantize if quantized else None)
    if bits and divided:
        dtype = options.dtype if options.scales == "auto" else options.scales
        return Form(Packing("affine", bits, options.group_size), dtype)
    return Form(DENSE, options.dtype)


@dataclass(frozen=True)
class Stored:
    """One tensor as it was stored, and the error: relative_l2 = ||stored - source|| / ||source|| and max_abs, the
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
        """True if the stored values are the source's, all of them finite."""
        return not self.max_abs and not self.not_finite


def store(
    tensor: Parameter, form: Form, writer: ShardedWriter, pool: ThreadPoolExecutor, allow_nan: bool = False
) -> Stored:
    """Writes one tensor in pieces of some rows, encoded by the pool's threads, and measures its error.

    Raises QwenMLXError naming the tensor: for values or scales that are not finite, unless allow_nan; for values that
    the form's dtype cannot hold.
    """
    specs = form.specs(tensor)
    cost = Cost()
    jobs = (lambda a=a, b=b: _encode(tensor, form, a, b, allow_nan) for a, b in pieces(tensor))
    for arrays, piece_cost in in_order(pool, jobs):
        for spec, array in zip(specs, arrays):
            writer.write(spec.name, array)
        cost += piece_cost
    tensor.release()
    return Stored(
        tensor.name,
        tensor.source_name,
        tensor.type_name,
        str(form),
        tensor.shape,
        sum(spec.nbytes for spec in specs),
        cost.relative_l2,
        cost.max_abs,
        cost.not_finite,
    )


def pieces(tensor: Parameter) -> Iterator[tuple[int, int]]:
    """The first row of each piece that a thread works on, and the row after its last."""
    step = max(1, CHUNK_WEIGHTS // tensor.shape[-1])
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


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
class Cost:
    """The error of storing a tensor's rows; see Stored. squares, reference: sums of squares of the differences and of
    the source's values."""

    squares: float = 0.0
    reference: float = 0.0
    max_abs: float = 0.0
    not_finite: int = 0

    @property
    def relative_l2(self) -> float:
        """||stored - source|| / ||source||."""
        return math.sqrt(self.squares / self.reference) if self.reference else 0.0

    def __iadd__(self, other: Cost) -> Cost:
        self.squares += other.squares
        self.reference += other.reference
        self.max_abs = max(self.max_abs, other.max_abs)
        self.not_finite += other.not_finite
        return self

    def compare(self, source: np.ndarray, stored: np.ndarray) -> None:
        """Adds the error of `stored` against `source`, arrays of one shape."""
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
    tensor: Parameter, form: Form, start: int, stop: int, allow_nan: bool
) -> tuple[tuple[np.ndarray, ...], Cost]:
    """Rows start to stop as they are written, and their error."""
    cost = Cost()
    wide: Sequence[np.ndarray]
    if form.from_source:
        codes, *wide = tensor.arrays(form.packing, start, stop, finite=False)
        bad = _bad_values(tensor, form, start, stop, wide)
        cost.not_finite = _check_bad(tensor, bad, allow_nan)
        if form.packing.kind == "mxfp4":
            return (codes, *wide), cost
        source, unpacked = None, None
    else:
        source = tensor.values(start, stop)
        cost.not_finite = _check_bad(tensor, source.size - int(np.isfinite(source).sum()), allow_nan)
        if form.packing == DENSE:
            stored, rounded = _narrowed(tensor, source, form.dtype, "--dtype")
            if rounded is not source:
                cost.compare(source, rounded)
            return (stored,), cost
        values = _narrowed(tensor, source, "float32", "--scales")[1]
        wide = affine_range(values, form.packing.bits, form.packing.group_size)
        if not cost.not_finite and not math.isfinite(_largest(wide[0])):
            raise QwenMLXError(
                f"tensor {tensor.source_name!r} ({tensor.type_name}) has groups of weights whose range is beyond "
                "float32; convert it without --quantize."
            )
    (scales, rounded_scales), (biases, rounded_biases) = (
        _narrowed(tensor, array, form.dtype, "--scales") for array in wide
    )
    if source is not None:
        unpacked = affine_codes(values, rounded_scales, rounded_biases, form.packing.bits)
        codes = pack(unpacked, form.packing.bits)
    elif all(np.array_equal(*pair, equal_nan=True) for pair in zip(wide, (rounded_scales, rounded_biases))):
        return (codes, scales, biases), cost
    else:
        source, unpacked = tensor.values(start, stop), unpack(codes, form.packing.bits)
    groups = unpacked.reshape(*rounded_scales.shape, form.packing.group_size).astype(np.float32)
    with np.errstate(all="ignore"):
        groups *= rounded_scales[..., None]
        groups += rounded_biases[..., None]
    cost.compare(source, groups.reshape(source.shape))
    return (codes, scales, biases), cost


def count_bad(tensor: Parameter, form: Form, start: int, stop: int) -> int:
    """Counts the values of rows start to stop that are not finite, which store() refuses."""
    if form.from_source:
        return _bad_values(tensor, form, start, stop, tensor.arrays(form.packing, start, stop, finite=False)[1:])
    values = tensor.values(start, stop)
    return values.size - int(np.isfinite(values).sum())


def _bad_values(tensor: Parameter, form: Form, start: int, stop: int, scales: Sequence[np.ndarray]) -> int:
    """The same for packed rows: every value of a group whose scale or bias is not finite."""
    if form.packing.kind == "affine":
        finite: np.ndarray = np.isfinite(scales[0])
        finite &= np.isfinite(scales[1])
        return (finite.size - int(finite.sum())) * form.packing.group_size
    if scales[0].max(initial=0) < 253:  # 6 * 2^(252 - 127) is the last that float32 holds whatever the codes
        return 0
    values = tensor.values(start, stop).reshape(*scales[0].shape, form.packing.group_size)
    bad = (scales[0] == 255)[..., None] | ~np.isfinite(values)  # 255 is NaN in MLX, 2^128 in ggml
    return int(bad.sum())


def _check_bad(tensor: Parameter, bad: int, allow_nan: bool) -> int:
    if bad and not allow_nan:
        raise QwenMLXError(
            f"tensor {tensor.source_name!r} ({tensor.type_name}) holds values or scales that are not finite: the file "
            "is damaged, download it again (--allow-nan converts it all the same)."
        )
    return bad


def _narrowed(tensor: Parameter, array: np.ndarray, dtype: str, option: str) -> tuple[np.ndarray, np.ndarray]:
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
