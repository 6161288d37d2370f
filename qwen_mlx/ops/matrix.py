"""The one type for a matrix that operations read, dense or packed."""

from __future__ import annotations

from typing import NamedTuple

from ..backend import mx
from ..gguf.packing import BLOCK_SIZES, DENSE, Packing

BLOCKS = ("q4_k", "q6_k")  # GGUF's own that the GPU's kernels read
_OTHER_BLOCKS = set(BLOCK_SIZES) - set(BLOCKS)


def template_names(kind: str, number: str, tiled: bool) -> list[str]:
    """The names of a reader's own template values: Matrix.template's keys."""
    names = {"affine": ["GROUP"] if tiled else ["BITS", "GROUP"], "q6_k": ["ROWS"] * tiled}.get(kind, [])
    return [f"{name}{number}" for name in names]


class LowRank(NamedTuple):
    """The form that an adapter gives a matrix W: row_scale W + b a, without touching the arrays of W.

    a: (rank, columns), b: (rows, rank), row_scale: (rows,) or None for 1, all of the activations' dtype. keep: of x's
    shape, in training: dropout's factors of what a multiplies.
    """

    a: mx.array
    b: mx.array
    row_scale: mx.array | None = None
    keep: mx.array | None = None

    @property
    def factors(self) -> tuple[Matrix, Matrix]:
        """a and b as dense matrices."""
        a, b = self.a, self.b
        return Matrix(DENSE, a.shape[0], a.shape[1], (a,)), Matrix(DENSE, b.shape[0], b.shape[1], (b,))


class Matrix(NamedTuple):
    """A matrix (rows, columns): how it is packed, the arrays that hold it, and what an adapter makes of it.

    dense: (w,); affine: (codes, scales, biases) as mx.quantize makes them; q4_k: (blocks,), GGUF's bytes as uint32
    (rows, columns / 256, 36); q6_k: (low, high, scales, d), the fields of GGUF's blocks each in an array of its own,
    uint32 (rows, columns / 8), (rows, columns / 16) and (rows, columns / 64), float16 (rows, columns / 256); others of
    GGUF's: (blocks,), uint8 (rows, bytes of a row), which a CPU reads.
    """

    packing: Packing
    rows: int
    columns: int
    arrays: tuple[mx.array, ...]
    low_rank: LowRank | None = None

    @property
    def base(self) -> Matrix:
        """The matrix without its adapter."""
        return self._replace(low_rank=None)

    def template(self, number: str = "", tiled: bool = False) -> dict[str, int]:
        """The template values that a kernel's reader of this matrix needs."""
        packing = self.packing
        known = {"BITS": packing.bits, "GROUP": packing.group_size, "ROWS": self.rows}
        return {name: known[name.rstrip("2")] for name in template_names(packing.kind, number, tiled)}

    @property
    def supported(self) -> bool:
        """True if the GPU's matrix-vector kernels read it."""
        if self.packing.kind == "affine":
            return self.packing.bits in (2, 3, 4, 5, 6, 8) and self.columns % 32 == 0
        if self.packing.kind in _OTHER_BLOCKS:
            return False
        return self.columns % (256 if self.packing.kind in BLOCKS else 16) == 0


def rows_of(matrix: Matrix, start: int, stop: int) -> Matrix:
    """Rows start to stop of a matrix, as a view."""
    stop = min(stop, matrix.rows)
    low_rank = matrix.low_rank
    if low_rank is not None:
        a, b, row_scale, keep = low_rank
        low_rank = LowRank(a, b[start:stop], None if row_scale is None else row_scale[start:stop], keep)
    return Matrix(matrix.packing, stop - start, matrix.columns, tuple(x[start:stop] for x in matrix.arrays), low_rank)
