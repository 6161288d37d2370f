"""Products with a few vectors, a batch's tokens or a draft's, on NVIDIA's GPUs: of a dense matrix, and of GGUF's blocks
as they are. Elsewhere a dense matrix's product with any number of vectors."""

from __future__ import annotations

import functools
from typing import Any

from ..backend import mx
from ..gguf.packing import DENSE
from . import cpu
from .dispatch import Kernel, described, differentiable, executor, have_values, require, require_float
from .matrix import BLOCKS, Matrix
from .tunings import STAGE_WORDS, THREADGROUP_MEMORY
from .unpack import array_names, reader

# cuBLAS's kernels are fast, but MLX looks for the right one and records its launch anew at every call, which takes the
# CPU longer than the GPU needs for few rows and a small matrix. On Apple's GPUs MLX has its own.
ON = ("cuda",)
MOST_ROWS, MOST_BYTES = 64, 64 << 20
FACTOR = 128  # rows or columns of a factor at most: the ranks of adapters
UNIT, STEP = 16, 32  # rows of the matrix a simdgroup multiplies at once, and elements of them

# A packed matrix: rows of x; at most so many units, by tiles, to a threadgroup, whose memory holds two stages of each;
# and threadgroups, about, into which it is cut.
MOST_PACKED, GROUP_UNITS, GROUPS = 32, {1: 8, 2: 8, 4: 6}, 264

_HEADERS = ("nvidia/instructions.h", "rows.h", "nvidia/matmul.h")
_MATMUL = Kernel("nvidia/matmul", ("x", "w"), ("out",), _HEADERS, aligned=("x", "w"))


def matmul(x: mx.array, w: mx.array) -> mx.array:
    """x W^T.

    x: (..., K), w: (N, K) of the same dtype; returns (..., N). Rounding: summed in float32, rounded once. Raises
    ValueError if shapes or dtypes do not agree.
    """
    require_float("x", x)
    require(
        isinstance(w, mx.array) and w.ndim == 2 and x.ndim > 0 and w.dtype == x.dtype and w.shape[1] == x.shape[-1],
        lambda: f"x {described(x)}, w {described(w)}, expected (..., K) and (N, K) of one dtype.",
    )
    return differentiable(_launch, _fallback, x, w) if supports(x, w) else _fallback(x, w)


def _fallback(x: mx.array, w: mx.array) -> mx.array:
    # MLX's wheels for Linux compute products by the reference BLAS, some 50 times slower.
    by_numba = executor("matmul") == "cpu" and x.dtype == mx.float32 and x.size and w.size and w.shape[1] % 8 == 0
    if by_numba and have_values(x, w):
        return differentiable(lambda x, w: cpu.matmul(x, w), _plain, x, w, vjp=_cotangents)
    return _plain(x, w)


def _plain(x: mx.array, w: mx.array) -> mx.array:
    y: mx.array = x @ w.T
    return y


def _cotangents(primals: Any, cotangent: mx.array, _: object) -> tuple[mx.array, mx.array]:
    """Those of x and w. The one of w is MLX's own product, slow but lazy, for nobody asks for it where w is frozen; but
    not that of a factor of an adapter, which costs little."""
    x, w = primals
    rows, columns = cotangent.reshape(-1, w.shape[0]).T, x.reshape(-1, w.shape[1]).T
    return _times(cotangent, w), (_fallback if min(w.shape) <= FACTOR else _plain)(rows, columns)


def _times(y: mx.array, w: mx.array) -> mx.array:
    """y W, with a gradient."""
    if not (executor("matmul") == "cpu" and y.dtype == mx.float32 and cpu.supports(_dense(w)) and have_values(y, w)):
        return _fallback(y, w.T)

    def cotangents(primals: Any, cotangent: mx.array, _: object) -> tuple[mx.array, mx.array]:
        y, w = primals
        return _fallback(cotangent, w), _plain(y.reshape(-1, y.shape[-1]).T, cotangent.reshape(-1, w.shape[1]).T)

    def plain(y: mx.array, w: mx.array) -> mx.array:
        product: mx.array = y @ w
        return product

    return differentiable(lambda y, w: cpu.multiply_transposed(y, _dense(w)), plain, y, w, vjp=cotangents)


def _dense(w: mx.array) -> Matrix:
    return Matrix(DENSE, w.shape[0], w.shape[1], (w,))


def supports(x: mx.array, w: mx.array) -> bool:
    """True if the kernel computes this product."""
    rows, (outputs, columns) = x.size // max(x.shape[-1], 1), w.shape
    return (
        executor("matmul") in ON
        and x.dtype != mx.float32
        and 1 < rows <= MOST_ROWS
        and columns > 0
        and columns % STEP == 0
        and outputs > 0
        and w.nbytes <= MOST_BYTES
    )


def _launch(x: mx.array, w: mx.array) -> mx.array:
    outputs, columns = w.shape
    count = x.size // columns
    units, tiles = -(-outputs // UNIT), _tiles(count)
    # About 2000 simdgroups, at most 16 to a threadgroup, whose sums fit its memory (32 KiB).
    split = max(1, min(round(2112 / units), 16, 64 // tiles, columns // STEP))
    per_group = max(1, min(4, 64 // tiles) // split)
    n_threads = 32 * split * per_group
    template = (
        ("K", columns),
        ("N", outputs),
        ("TILES", tiles),
        ("SPLIT", split),
        ("DEPTH", 2),
        ("THREADS", n_threads),
    )
    grid, shape = (-(-units // per_group) * n_threads, 1, 1), (*x.shape[:-1], outputs)
    return _MATMUL([x.reshape(count, columns), w], template, grid, (n_threads, 1, 1), [shape])[0]


def _tiles(count: int) -> int:
    """Tiles of 8 rows: 1, 2, 4 or 8, each of which is compiled."""
    return 1 << (-(-count // 8) - 1).bit_length()


def reads_packed(matrix: Matrix, count: int, dtype: mx.Dtype) -> bool:
    """True if `matmul_packed` multiplies so many vectors of `dtype`."""
    return (
        executor("matmul") in ON
        and dtype != mx.float32
        and 1 < count <= MOST_PACKED
        and matrix.packing.kind in BLOCKS
        and matrix.supported
    )


_ARRANGE = Kernel(
    "nvidia/arrange",
    ("x",),
    ("arranged",),
    (*_HEADERS, *(f"nvidia/{name}.h" for name in ("tiles", "packed_rows"))),
    aligned=("x",),
)
_ADD_PARTS = Kernel("nvidia/add_parts", ("parts",), ("out",))
_GROUPS = {"q4_k": 32, "q6_k": 16}  # elements with one scale


@functools.cache
def _packed(kind: str) -> Kernel:
    names = array_names(kind)
    parts = ("rows.h", f"{kind}.h", *(f"nvidia/{name}.h" for name in ("tiles", f"{kind}_tiles", "matmul")))
    headers = ("nvidia/instructions.h", *parts, "nvidia/packed_rows.h", f"nvidia/{kind}_rows.h")
    definitions = (("matrix", reader(kind, tiled=True)),)
    inputs = ("arranged", *names)
    return Kernel("nvidia/matmul_packed", inputs, ("parts",), headers, kind, definitions, names)


def matmul_packed(x: mx.array, matrix: Matrix) -> mx.array:
    """x W^T for x (..., columns) of few rows and W of GGUF's blocks, which are read as they are, once.

    See reads_packed for what it takes. Returns (..., rows). Rounding: the codes' products are summed in float32 and
    multiplied by their scales there, rounded once.
    """
    outputs, columns, kind = matrix.rows, matrix.columns, matrix.packing.kind
    count = x.size // columns
    tiles, group, ring = _tiles(count), _GROUPS[kind], STAGE_WORDS[kind]
    words = tiles * (512 + 1024 // group)  # of half a stage of x
    template: tuple[tuple[str, Any], ...] = (("K", columns), ("GROUP", group), ("TILES", tiles))
    threads, shape = (columns // group * tiles * 32, 1, 1), (columns // 128, words)
    arranged = _ARRANGE([x.reshape(count, columns)], template, threads, (64, 1, 1), [shape], mx.uint32)[0]
    room = THREADGROUP_MEMORY[executor("matmul")] - 8 * words
    simds = min(GROUP_UNITS[tiles], room // (8 * ring))
    rows, stages = UNIT * simds, columns // 256
    blocks = -(-outputs // rows)
    per = -(-stages // max(1, min(round(GROUPS / blocks), stages)))
    splits = -(-stages // per)
    template = (
        *(("T", x.dtype), ("K", columns), ("N", outputs), ("GROUP", group), ("TILES", tiles)),
        *(("PER", per), ("RING", ring), ("THREADS", 32 * simds), *matrix.template(tiled=True).items()),
    )
    grid, out_type = (blocks * 32 * simds, splits, 1), x.dtype if splits == 1 else mx.float32
    shapes = [(splits, tiles * 8, outputs)]
    parts = _packed(kind)([arranged, *matrix.arrays], template, grid, (32 * simds, 1, 1), shapes, out_type)[0]
    if splits == 1:
        return parts[0, :count].reshape(*x.shape[:-1], outputs)
    template = (("T", x.dtype), ("N", outputs), ("ROWS", tiles * 8), ("SPLITS", splits))
    grid = (-(-outputs // 256) * 256, count, 1)
    return _ADD_PARTS([parts], template, grid, (256, 1, 1), [(*x.shape[:-1], outputs)], x.dtype)[0]
