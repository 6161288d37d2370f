"""Linear and embedding layers on dense and on packed matrices, and the joining of several in one buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .. import ops
from ..backend import mx, nn
from ..gguf.packing import BLOCK_SIZES
from ..ops import DENSE, TILE, Matrix, Packing

# Names that a module gives to the arrays of its matrix, by the kind of its packing.
ARRAYS = {
    "dense": ("weight",),
    "affine": ("weight", "scales", "biases"),
    **dict.fromkeys(BLOCK_SIZES, ("weight",)),
    "q6_k": ("weight", "high", "scales", "factors"),
}


class Linear(nn.Linear):
    """y = x W^T + b with W (out, in) dense."""

    def __call__(self, x: mx.array) -> mx.array:
        y = ops.multiply(x, matrix_of(self))
        return y + self.bias if "bias" in self else y


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed: MLX's affine form, or GGUF's Q4_K and Q6_K blocks as they are in the file.

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
        """The packed matrix."""
        rows, columns = self._shape
        return Matrix(self._packing, rows, columns, tuple(self[name] for name in ARRAYS[self._packing.kind]))

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
    return Matrix(DENSE, rows, columns, (module["weight"],))


def multiply_all(x: mx.array, matrices: Sequence[Matrix]) -> mx.array:
    """x by several matrices: the products side by side, (..., rows of all)."""
    return _side_by_side([ops.multiply(x, matrix) for matrix in matrices])


def temporary_bytes(n_vectors: int, dtype: mx.Dtype, matrices: Iterable[Matrix]) -> int:
    """Bytes of the arrays that `multiply` makes for so many vectors and such matrices: the products, and the values of
    blocks that are unpacked."""
    elements = 0
    for matrix in matrices:
        elements += matrix.rows * n_vectors
        if matrix.packing.kind not in ("dense", "affine"):
            elements += min(matrix.rows * matrix.columns, TILE)
    return elements * dtype.size


def _side_by_side(arrays: list[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=-1)


class _Joined:
    """Matrices that hold the rows of several modules, and the arrays of the modules that are views of them."""

    def __init__(self, matrices: list[Matrix], modules: Sequence[nn.Module]):
        self.matrices, self.views = matrices, [array for m in modules for array in matrix_of(m).arrays]

    def __deepcopy__(self, memo: object) -> None:
        return None  # a copy's arrays are no views


def join_rows(modules: Sequence[nn.Module]) -> list[Matrix]:
    """The matrices of several projections of one input, one above the other: a single one where they are packed alike.

    The modules' arrays become views of its rows, so that memory holds them once. While they stay that, a repeated call
    costs nothing.
    """
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
            matrix = parts[0]._replace(
                rows=sum(part.rows for part in parts), arrays=tuple(mx.concatenate(list(column)) for column in columns)
            )
            set_rows(run, matrix)
            matrices.append(matrix)
        else:
            matrices.append(matrix_of(run[0]))
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
