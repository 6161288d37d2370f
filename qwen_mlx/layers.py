"""Linear and embedding layers on MLX's packed affine weights: w = scale * code + bias for each group of codes."""

from __future__ import annotations

from .backend import mx, nn


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


class SideBySide(nn.Module):
    """Projections of one input whose packings differ, so that they cannot be one matrix: their outputs joined."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)
