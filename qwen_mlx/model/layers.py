"""Linear and embedding layers on dense and on packed matrices, and the joining of several in one buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .. import ops
from ..backend import mx, nn
from ..gguf.packing import BLOCK_SIZES
from ..ops import DENSE, TILE, LowRank, Matrix, Packing

RANK_UNIT = 32  # the CPU's functions and every kernel multiply by matrices of such widths
# Names that a module gives to the arrays of its matrix, by the kind of its packing.
ARRAYS = {
    "dense": ("weight",),
    "affine": ("weight", "scales", "biases"),
    **dict.fromkeys(BLOCK_SIZES, ("weight",)),
    "q6_k": ("weight", "high", "scales", "factors"),
}


class Linear(nn.Linear):
    """y = x W^T + b with W (out, in) dense, or what an adapter beside it makes of W."""

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.multiply(x, matrix_of(self))
        return y + self.bias if "bias" in self else y


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed, or what an adapter beside it makes of W: MLX's affine form, or GGUF's
    blocks as they are in the file.

    Scales may be wider than the activations (a GGUF's are exact in float16 or float32 only): the product is then formed
    in float32 and rounded once.
    """

    def __init__(self, matrix: Matrix):
        super().__init__()
        self._packing, self._shape = matrix.packing, (matrix.rows, matrix.columns)
        for name, array in zip(ARRAYS[matrix.packing.kind], matrix.arrays, strict=True):
            self[name] = array
        self.freeze()

    @property
    def matrix(self) -> Matrix:
        """The packed matrix, with its adapter."""
        rows, columns = self._shape
        arrays = tuple(self[name] for name in ARRAYS[self._packing.kind])
        return Matrix(self._packing, rows, columns, arrays, low_rank_of(self))

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.multiply(x, self.matrix)
        return y + self.bias if "bias" in self else y

    def _extra_repr(self) -> str:
        rows, columns = self._shape
        return f"{columns} -> {rows}, {self._packing}"


class QuantizedEmbedding(QuantizedLinear):
    """Rows in `dtype` of a (vocabulary, hidden) matrix, packed or in another dtype; `as_linear` multiplies by it for a
    tied head."""

    def __init__(self, matrix: Matrix, dtype: mx.Dtype):
        super().__init__(matrix)
        self.dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return ops.unpack(self.matrix, self.dtype, ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return ops.multiply(x, self.matrix)


def matrix_of(module: nn.Module) -> Matrix:
    """The matrix of a projection or an embedding."""
    if isinstance(module, QuantizedLinear):
        return module.matrix
    rows, columns = module["weight"].shape
    return Matrix(DENSE, rows, columns, (module["weight"],), low_rank_of(module))


def low_rank_of(module: nn.Module) -> LowRank | None:
    """The adapter beside a module's matrix, where it has one: its arrays `lora_a` (rank, in), `lora_b` (out, rank) and
    perhaps `lora_row_scale` (out,), and in training `lora_keep`."""
    if "lora_a" not in module:
        return None
    return LowRank(module["lora_a"], module["lora_b"], module.get("lora_row_scale"), module.get("lora_keep"))


def temporary_bytes(n_vectors: int, dtype: mx.Dtype, matrices: Iterable[Matrix]) -> int:
    """Bytes of the arrays that `multiply` makes for so many vectors and such matrices: the products, and the values of
    blocks that are unpacked."""
    elements = 0
    for matrix in matrices:
        elements += matrix.rows * n_vectors
        if ops.unpacks(matrix, n_vectors, dtype):
            elements += min(matrix.rows * matrix.columns, TILE)
    return elements * dtype.size


class _Joined:
    """Matrices that hold the rows of several modules, and the arrays of the modules that are views of them."""

    def __init__(self, matrices: list[Matrix], modules: Sequence[nn.Module]):
        self.matrices, self.views = matrices, [array for m in modules for array in matrix_of(m).arrays]

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy's arrays are no views


def join_rows(modules: Sequence[nn.Module]) -> list[Matrix]:
    """The matrices of several projections of one input, one above the other: a single one where they are packed alike.

    The modules' arrays become views of its rows, so that memory holds them once. While they stay that, a repeated call
    costs nothing but the joining of their adapters.
    """
    matrices = _join_bases(modules)
    if all(low_rank_of(module) is None for module in modules):
        return matrices
    ends = list(itertools.accumulate(matrix_of(module).rows for module in modules))
    adapted, start = [], 0
    for matrix in matrices:
        stop = start + matrix.rows
        run = [module for module, end in zip(modules, ends) if start < end <= stop]
        adapted.append(matrix._replace(low_rank=_join_low_rank(run)))
        start = stop
    return adapted


def _join_low_rank(modules: Sequence[nn.Module]) -> LowRank | None:
    """The adapters of modules whose rows stand one above the other: b's blocks lie on the diagonal."""
    matrices = [matrix_of(module) for module in modules]
    given = [matrix.low_rank for matrix in matrices if matrix.low_rank is not None]
    if not given:
        return None
    dtype, n_rows = given[0].a.dtype, sum(matrix.rows for matrix in matrices)
    rank = sum(low_rank.a.shape[0] for low_rank in given)
    padded = -(-rank // RANK_UNIT) * RANK_UNIT
    a = mx.concatenate([*(low_rank.a for low_rank in given), mx.zeros((padded - rank, matrices[0].columns), dtype)])
    b, row_scale = mx.zeros((n_rows, padded), dtype), mx.ones((n_rows,), dtype)
    row = column = 0
    for matrix in matrices:
        if matrix.low_rank is not None:
            width = matrix.low_rank.a.shape[0]
            b[row : row + matrix.rows, column : column + width] = matrix.low_rank.b
            if matrix.low_rank.row_scale is not None:
                row_scale[row : row + matrix.rows] = matrix.low_rank.row_scale
            column += width
        row += matrix.rows
    scaled = any(low_rank.row_scale is not None for low_rank in given)
    mx.eval(a, b, row_scale)
    return LowRank(a, b, row_scale if scaled else None)


def _join_bases(modules: Sequence[nn.Module]) -> list[Matrix]:
    """join_rows without adapters."""
    joined: _Joined | None = getattr(modules[0], "_joined", None)
    arrays = [array for module in modules for array in matrix_of(module).arrays]
    if joined is not None and len(arrays) == len(joined.views) and all(map(_is, arrays, joined.views)):
        return joined.matrices
    matrices = []
    for _, group in itertools.groupby(modules, _alike):
        run = list(group)
        if len(run) > 1:
            parts = [matrix_of(module) for module in run]
            columns = zip(*(part.arrays for part in parts))
            joint = tuple(mx.concatenate(list(column)) for column in columns)
            matrix = Matrix(parts[0].packing, sum(part.rows for part in parts), parts[0].columns, joint)
            set_rows(run, matrix)
            matrices.append(matrix)
        else:
            matrices.append(matrix_of(run[0]).base)
    return remember_joined(modules, matrices)


def set_rows(modules: Iterable[nn.Module], matrix: Matrix) -> None:
    """Lets the arrays of `modules`, of which the matrix holds the rows, one above the other, be views of it."""
    start = 0
    for module in modules:
        rows = matrix_of(module).rows
        part = ops.rows_of(matrix, start, start + rows)
        for name, array in zip(ARRAYS[matrix.packing.kind], part.arrays, strict=True):
            module[name] = array
        start += rows
    mx.eval(matrix.arrays, [matrix_of(module).arrays for module in modules])


def remember_joined(modules: Sequence[nn.Module], matrices: list[Matrix]) -> list[Matrix]:
    """Tells join_rows that the modules' arrays are views of `matrices`, which it will return."""
    modules[0]._joined = _Joined(matrices, modules)
    return matrices


def _alike(module: nn.Module) -> tuple[Packing, tuple[mx.Dtype, ...]]:
    matrix = matrix_of(module)
    return matrix.packing, tuple(array.dtype for array in matrix.arrays)


def _is(a: mx.array, b: mx.array) -> bool:
    return a is b
