"""The block formats of GGUF: one table, their float32 values, and the same numbers as MLX quantization.

`BLOCK_TYPES` is the table that the reader, the loader, the converter, the tests and the docs share. `dequantize` gives
gguf-py's values bit for bit; `affine` and `mxfp4` re-express the formats for which MLX has the same arithmetic.
Neither imports MLX.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import GGUFError
from .packing import BLOCK_SIZES, DENSE, Packing
from .unpack import FORMATS, mxfp4_codes, pack

CHUNK_WEIGHTS = 1 << 20  # weights a thread works on at once: with fewer, threads wait for each other between calls
LARGEST_HALF = 65504.0
MAX_THREADS = 8  # memory bandwidth is spent by then
_worker = threading.local()  # has `is_one` in the threads of _pool


@dataclass(frozen=True)
class BlockType:
    """One tensor type of GGUF: `block_size` weights in `type_size` bytes; rows are whole blocks.

    packing: how MLX stores the type without changing a value, DENSE if it has no such arithmetic. scale_dtype: the
    narrowest dtype that represents every scale and bias of that packing exactly: "float16" (float32 if a bias overflows
    float16), "float32", or "uint8" for mxfp4's E8M0 exponents. exact: stored so, or dense in float32, MLX's float32
    values equal the format's own (a zero may lose its sign, no other bit changes).
    """

    name: str
    type_id: int
    block_size: int
    type_size: int
    description: str
    packing: Packing = DENSE
    scale_dtype: str = ""
    exact: bool = True

    @property
    def packings(self) -> tuple[Packing, ...]:
        """The packings that keep every value: the blocks themselves where kernels read them, then MLX's own."""
        own = (Packing(self.name.lower()),) if self.name.lower() in BLOCK_SIZES else ()
        return own if self.packing == DENSE else (*own, self.packing)


_4_BITS, _5_BITS, _8_BITS = (Packing("affine", bits, 32) for bits in (4, 5, 8))
_TABLE = (
    BlockType("F32", 0, 1, 4, "IEEE float32"),
    BlockType("F16", 1, 1, 2, "IEEE float16"),
    BlockType("BF16", 30, 1, 2, "bfloat16"),
    BlockType("F64", 28, 1, 8, "IEEE float64, rounded to float32", exact=False),
    BlockType("I8", 24, 1, 1, "int8 data"),
    BlockType("I16", 25, 1, 2, "int16 data"),
    BlockType("I32", 26, 1, 4, "int32 data, rounded to float32 above 2^24", exact=False),
    BlockType("I64", 27, 1, 8, "int64 data, rounded to float32 above 2^24", exact=False),
    BlockType("Q4_0", 2, 32, 18, "d(q - 8); d fp16", _4_BITS, "float16"),
    BlockType("Q4_1", 3, 32, 20, "dq + m; d, m fp16", _4_BITS, "float16"),
    BlockType("Q5_0", 6, 32, 22, "d(q - 16); d fp16", _5_BITS, "float16"),
    BlockType("Q5_1", 7, 32, 24, "dq + m; d, m fp16", _5_BITS, "float16"),
    BlockType("Q8_0", 8, 32, 34, "dq, q int8; d fp16", _8_BITS, "float16"),
    BlockType("Q2_K", 10, 256, 84, "16 groups of 16: (d s)q - (dmin m); s, m 4 bits"),
    BlockType("Q3_K", 11, 256, 110, "16 groups of 16: d(s - 32)(q - 4); s 6 bits"),
    BlockType("Q4_K", 12, 256, 144, "8 groups of 32: (d s)q - (dmin m); s, m 6 bits", _4_BITS, "float32"),
    BlockType("Q5_K", 13, 256, 176, "8 groups of 32: (d s)q - (dmin m); s, m 6 bits", _5_BITS, "float32"),
    BlockType("Q6_K", 14, 256, 210, "16 groups of 16: (d s)(q - 32); s int8"),
    BlockType("IQ1_S", 19, 256, 50, "8 groups of 32; 8 weights are one of 2048 vectors"),
    BlockType("IQ1_M", 29, 256, 56, "16 groups of 16; 8 weights are one of 2048 vectors"),
    BlockType("IQ2_XXS", 16, 256, 66, "8 groups of 32; 8 weights are one of 256 vectors"),
    BlockType("IQ2_XS", 17, 256, 74, "16 groups of 16; 8 weights are one of 512 vectors"),
    BlockType("IQ2_S", 22, 256, 82, "16 groups of 16; 8 weights are one of 1024 vectors"),
    BlockType("IQ3_XXS", 18, 256, 98, "8 groups of 32; 4 weights are one of 256 vectors"),
    BlockType("IQ3_S", 21, 256, 110, "8 groups of 32; 4 weights are one of 512 vectors"),
    BlockType("IQ4_NL", 20, 32, 18, "d t[q], t of 16 int8; d fp16", _8_BITS, "float16"),
    BlockType("IQ4_XS", 23, 256, 136, "8 groups of 32: d(s - 32) t[q]; s 6 bits", _8_BITS, "float32"),
    BlockType("TQ1_0", 34, 256, 54, "d q, q in -1, 0, 1, five to a byte; d fp16"),
    BlockType("TQ2_0", 35, 256, 66, "d(q - 1), q of 2 bits; d fp16"),
    BlockType("MXFP4", 39, 32, 17, "2^(e - 127) E2M1[q]; e 8 bits", Packing("mxfp4", 4, 32), "uint8"),
    BlockType("NVFP4", 40, 64, 36, "4 groups of 16: UE4M3 scale, E2M1[q]"),
)
BLOCK_TYPES: dict[int, BlockType] = {block.type_id: block for block in _TABLE}
BY_KIND = {block.name.lower(): block for block in _TABLE}  # as Packing.kind names those that stay packed
# Types that ggml once had; the numbers stay unused.
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
REMOVED_TYPES |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}

_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


def dequantize(raw: np.ndarray, kind: BlockType, out: np.ndarray | None = None) -> np.ndarray:
    """The float32 values of a tensor's bytes: gguf.quants.dequantize's, bit for bit.

    raw: uint8 (rows, bytes of a row). Returns float32 (rows, columns), which is `out` if given (contiguous; it may be a
    view of an MLX array). An inf or NaN scale gives what IEEE arithmetic gives. Temporary memory: under 4 MB a thread.
    Raises GGUFError if raw is not rows of whole blocks or out does not fit.
    """
    blocks, shape = _blocks(raw, kind)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not (out.flags.c_contiguous and out.flags.writeable):
        raise GGUFError(f"{kind.name}: out is {out.dtype} {out.shape}, expected contiguous writable float32 {shape}.")
    values = out.reshape(len(blocks), kind.block_size)
    into = _dequantizer(kind)
    in_chunks(lambda part: into(blocks[part], values[part]), len(blocks), kind.block_size)
    return out


def affine(
    raw: np.ndarray, kind: BlockType, scale_dtype: type[np.floating] | None = None, finite: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A tensor's bytes as MLX affine quantization, w = scale * code + bias, for kinds with an affine `kind.packing`.

    raw: uint8 (rows, bytes of a row). Returns codes uint32 (rows, columns * bits / 32), scales and biases
    (rows, columns / 32), for mx.dequantize and mx.quantized_matmul(transpose=True) with the packing's bits and
    group_size.
    scale_dtype: np.float16 or np.float32; None is the narrower in which this tensor's scales and biases are all exact.
    MLX dequantizes in the dtype of the scales: cast them to float32 for exact values.
    Raises GGUFError for another kind or scale_dtype, for a scale that overflows the one asked for and, if `finite`, for
    one that is inf or NaN.
    """
    bits = _require_affine(kind).bits
    if scale_dtype not in (None, np.float16, np.float32):
        raise GGUFError(f"{kind.name}: scale_dtype is {scale_dtype!r}, expected np.float16, np.float32 or None.")
    blocks, (rows, _) = _blocks(raw, kind)
    unpack = FORMATS[kind.name]
    groups = kind.block_size // 32
    codes = np.empty((len(blocks), groups * bits), np.uint32)
    scales = np.empty((len(blocks), groups), np.float32)
    biases = np.empty_like(scales)

    def work(part: slice) -> None:
        bytes_ = np.empty((len(blocks[part]), kind.block_size), np.uint8)
        scale, minimum = unpack.decode(blocks[part], bytes_)
        codes[part] = pack(bytes_, bits)
        scales[part] = scale
        biases[part] = np.float32(-unpack.offset) * scale if minimum is None else minimum

    in_chunks(work, len(blocks), kind.block_size)
    largest = float(np.maximum(np.abs(scales).max(initial=0), np.abs(biases).max(initial=0)))  # NaN if one is
    if finite and not np.isfinite(largest):
        raise GGUFError(f"{kind.name}: a scale is inf or NaN; the file is damaged, download it again.")
    if (scale_dtype or exact_scales(raw, kind)) in (np.float16, "float16"):
        if largest > LARGEST_HALF:
            raise GGUFError(f"{kind.name}: a scale or bias is {largest:g}, too large for float16; use float32 scales.")
        scales, biases = scales.astype(np.float16), biases.astype(np.float16)
    return codes.reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1)


def _require_affine(kind: BlockType) -> Packing:
    if kind.packing.kind != "affine":
        raise GGUFError(f"{kind.name} has no exact affine form in MLX; dequantize it instead.")
    return kind.packing


def exact_scales(raw: np.ndarray, kind: BlockType) -> str:
    """The narrower dtype, "float16" or "float32", in which the scales and biases that affine() returns are all exact.

    raw: uint8 (rows, bytes of a row) of a kind with an affine packing. Scales that are inf or NaN do not count.
    Raises GGUFError for another kind.
    """
    _require_affine(kind)
    offset = FORMATS[kind.name].offset
    # Only offset * scale can overflow; a block of these kinds begins with its scale.
    if kind.scale_dtype == "float16" and offset:
        scales = np.abs(np.ascontiguousarray(_blocks(raw, kind)[0][:, :2]).view("<f2"))
        largest = float(scales.max(initial=0, where=np.isfinite(scales)))
        return "float32" if offset * largest > LARGEST_HALF else "float16"
    return kind.scale_dtype


def mxfp4(raw: np.ndarray, finite: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """MXFP4 bytes as MLX stores them in mode "mxfp4".

    raw: uint8 (rows, bytes of a row). Returns codes uint32 (rows, columns / 8) and scales uint8 (rows, columns / 32).
    Raises GGUFError, if `finite`, for the exponent 255: NaN in the OCP specification and in MLX, 2^128 in ggml.
    """
    kind = BLOCK_TYPES[39]
    blocks, (rows, _) = _blocks(raw, kind)
    codes = np.empty((len(blocks), 4), np.uint32)
    scales = np.empty((len(blocks), 1), np.uint8)

    def work(part: slice) -> None:
        bytes_, scales[part] = mxfp4_codes(blocks[part])
        codes[part] = pack(bytes_, 4)

    in_chunks(work, len(blocks), kind.block_size)
    if finite and scales.max(initial=0) == 255:
        raise GGUFError(f"{kind.name}: a scale is NaN (exponent 255); the file is damaged, download it again.")
    return codes.reshape(rows, -1), scales.reshape(rows, -1)


def markdown_table() -> str:
    """The table for the docs, in Markdown."""
    lines = [
        "| type | id | weights / bytes a block | bits a weight | values | in MLX | scales | exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in BLOCK_TYPES.values():
        packing = kind.packing
        stored = str(packing)
        if packing != DENSE:
            stored = f"{packing.kind}, {packing.bits} bits, groups of {packing.group_size}"
        cells = (
            kind.name,
            kind.type_id,
            f"{kind.block_size} / {kind.type_size}",
            f"{8 * kind.type_size / kind.block_size:g}",
            kind.description,
            stored,
            kind.scale_dtype,
            "yes" if kind.exact else "no",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _blocks(raw: np.ndarray, kind: BlockType) -> tuple[np.ndarray, tuple[int, int]]:
    """The bytes as (blocks, type_size), and the (rows, columns) of their values."""
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] % kind.type_size:
        raise GGUFError(
            f"{kind.name}: the bytes are {raw.dtype} {raw.shape}, expected uint8 rows of n * {kind.type_size} bytes."
        )
    rows, columns = raw.shape[0], raw.shape[1] // kind.type_size * kind.block_size
    return raw.reshape(rows * columns // kind.block_size, kind.type_size), (rows, columns)


def _dequantizer(kind: BlockType) -> Callable[[np.ndarray, np.ndarray], None]:
    """A function that fills float32 (blocks, block_size) from uint8 (blocks, type_size)."""
    if kind.name in _DTYPES:
        return functools.partial(_cast, np.dtype(_DTYPES[kind.name]))
    if kind.name == "BF16":
        return _bfloat16
    if kind.name in FORMATS:
        return functools.partial(_scale_codes, kind)
    return functools.partial(_gguf_py, kind)


def _cast(dtype: np.dtype, blocks: np.ndarray, values: np.ndarray) -> None:
    np.copyto(values, blocks.view(dtype), casting="same_kind" if dtype.kind == "f" else "unsafe")


def _bfloat16(blocks: np.ndarray, values: np.ndarray) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=values.view(np.uint32), dtype=np.uint32)


def _scale_codes(kind: BlockType, blocks: np.ndarray, values: np.ndarray) -> None:
    unpack = FORMATS[kind.name]
    codes = np.empty(values.shape, np.uint8)
    scale, minimum = unpack.decode(blocks, codes)
    if unpack.offset:
        codes -= np.uint8(unpack.offset)  # wraps to the int8 difference
    values[...] = codes.view(np.int8)
    groups = values.reshape(-1, unpack.group)
    groups *= scale.reshape(-1, 1)
    if minimum is not None:
        groups += minimum.reshape(-1, 1)


def _gguf_py(kind: BlockType, blocks: np.ndarray, values: np.ndarray) -> None:
    from gguf import GGMLQuantizationType, quants  # 0.1 s to import, and only rare types need it

    values[...] = quants.dequantize(blocks, GGMLQuantizationType(kind.type_id))


def in_chunks(work: Callable[[slice], None], n_blocks: int, block_size: int) -> None:
    """Calls work(slice of blocks) for all blocks, chunk by chunk; on several threads if there are several chunks.

    A call within `work` goes through its chunks in the same thread.
    """
    step = max(1, CHUNK_WEIGHTS // block_size)
    starts = iter(range(0, n_blocks, step))  # shared: the thread that is free takes the next chunk

    def run() -> None:
        with np.errstate(all="ignore"):  # inf and NaN scales are data
            for start in starts:
                work(slice(start, start + step))

    workers = min(threads(), -(-n_blocks // step))
    if workers < 2 or hasattr(_worker, "is_one"):  # the pool's threads would wait for one another
        run()
        return
    for future in [_pool().submit(run) for _ in range(workers)]:
        future.result()


def threads() -> int:
    """The number of threads to work with: the cores this process may use, up to MAX_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), "dequantize", setattr, (_worker, "is_one", True))
