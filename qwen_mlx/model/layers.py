"""Linear and embedding layers on dense weights, on MLX's packed affine ones (w = scale * code + bias for each group of
codes), and on a GGUF file's blocks."""

from __future__ import annotations

from collections.abc import Sequence

from .. import ops
from ..backend import mx, nn
from ..ops import Matrix, Packing


class Linear(nn.Linear):
    """y = x W^T + b with W (out, in) dense."""

    def __call__(self, x: mx.array) -> mx.array:
        if "bias" in self or x.dtype != self.weight.dtype:
            y: mx.array = super().__call__(x)
            return y
        return ops.matmul(x, self.weight)


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W (out, in) packed.

    weight: uint32 (out, in * bits / 32); scales, biases: (out, in / group_size). Scales may be wider than the
    activations (a GGUF's are exact in float16 or float32 only): the product is then formed in float32 and rounded once.
    """

    def __init__(self, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int):
        super().__init__()
        self.weight, self.scales, self.biases = weight, scales, biases
        self.group_size, self.bits = group_size, bits
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )
        y = y.astype(x.dtype)
        return y + self.bias if "bias" in self else y

    def _extra_repr(self) -> str:
        rows, words = self.weight.shape
        return f"{words * 32 // self.bits} -> {rows}, {self.bits} bits, group {self.group_size}"


class QuantizedEmbedding(nn.Module):
    """Rows of a packed (vocabulary, hidden) matrix in `dtype`; `as_linear` multiplies by it for a tied head."""

    def __init__(
        self, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int, dtype: mx.Dtype
    ):
        super().__init__()
        self.weight, self.scales, self.biases = weight, scales, biases
        self.group_size, self.bits, self.dtype = group_size, bits, dtype
        self.freeze()

    def __call__(self, ids: mx.array) -> mx.array:
        rows = mx.dequantize(
            self.weight[ids], self.scales[ids], self.biases[ids], group_size=self.group_size, bits=self.bits
        )
        return rows.astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        y = mx.quantized_matmul(
            x, self.weight, self.scales, self.biases, transpose=True, group_size=self.group_size, bits=self.bits
        )
        return y.astype(x.dtype)


class MergedLinear(nn.Module):
    """Projections of one input whose packings differ, so that they cannot be one matrix: their outputs joined."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


class GGUFLinear(nn.Module):
    """y = x W^T + b with W (out, in) as GGUF's Q4_K or Q6_K blocks, which stay in memory as they are in the file.

    One vector is multiplied by the blocks; more are multiplied by values unpacked, `TILE` rows of W at a time.
    """

    TILE = 16384

    def __init__(self, matrix: Matrix):
        super().__init__()
        self._packing, self._shape = matrix.packing, (matrix.rows, matrix.columns)
        self.weight, *self.more = matrix.arrays
        self.freeze()

    @property
    def matrix(self) -> Matrix:
        """The blocks."""
        return Matrix(self._packing, *self._shape, (self.weight, *self.more))

    def __call__(self, x: mx.array) -> mx.array:
        if x.size == self._shape[1]:
            y = ops.matvec(x, self.matrix).reshape(*x.shape[:-1], self._shape[0])
        else:
            y = _product(x, self.matrix, self.TILE)
        return y + self.bias if "bias" in self else y

    def _extra_repr(self) -> str:
        return f"{self._shape[1]} -> {self._shape[0]}, {self._packing}"


class GGUFEmbedding(GGUFLinear):
    """Rows of such a matrix in `dtype`; `as_linear` multiplies by it for a tied head."""

    def __init__(self, matrix: Matrix, dtype: mx.Dtype):
        super().__init__(matrix)
        self.dtype = dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return ops.unpack(self.matrix, self.dtype, ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return GGUFLinear.__call__(self, x)


def _product(x: mx.array, matrix: Matrix, tile: int) -> mx.array:
    parts = []
    for start in range(0, matrix.rows, tile):
        rows = tuple(array[start : start + tile] for array in matrix.arrays)
        part = matrix._replace(rows=rows[0].shape[0], arrays=rows)
        parts.append(x @ ops.unpack(part, x.dtype).T)
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def matrices(module: nn.Module) -> Sequence[Matrix]:
    """The matrices of a projection or an embedding, one above the other: more than one where packings differ."""
    if isinstance(module, MergedLinear):
        return [matrix for part in module["parts"] for matrix in matrices(part)]
    if isinstance(module, GGUFLinear):
        return [module.matrix]
    weight = module["weight"]
    if "scales" in module:
        packing = Packing("affine", module.bits, module.group_size)
        columns = weight.shape[1] * 32 // module.bits
        return [Matrix(packing, weight.shape[0], columns, (weight, module["scales"], module["biases"]))]
    rows, columns = weight.shape
    return [Matrix(Packing("dense"), rows, columns, (weight,))]
