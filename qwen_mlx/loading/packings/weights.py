"""Matrices in another library's packing: their values, and MLX's affine form of those that have one.

Integers with a scale and a zero point a group are affine quantization. Where a scale has 16 bits, scale * code and
scale * zero are exact in float32, and so is their difference: MLX's `scale * code + bias` is the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ...gguf import blocks
from ...gguf.packing import Packing
from ...gguf.unpack import pack
from ...parallel.shards import ALL
from ..parameters import Parameter, as_float32
from ..safetensors_files import FLOATS, StoredTensor
from ..small_floats import E4M3, E8M0

GROUP_SIZES = (128, 64, 32)  # MLX's, the fewest scales first
Rows = Callable[[int, int], np.ndarray]
RowsOfTwo = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class TableWeights:
    """Floats of few bits with scales, which affine quantization cannot express. values(start, stop): float32
    (rows, columns). kind: the packing's name for people."""

    kind: str
    tensors: tuple[StoredTensor, ...]
    values: Rows
    packing: Packing | None = None


@dataclass(frozen=True, eq=False)
class IntegerWeights:
    """w[i, k] = scales[i, g] * (codes[i, k] - zeros[i, g]) with g = groups[k].

    codes(start, stop): uint8 (rows, columns); scales(start, stop): scales and zeros, float32 (rows, groups).
    groups: the group of each column, int (columns,). exact: the scales have 16 bits.
    """

    kind: str
    tensors: tuple[StoredTensor, ...]
    bits: int
    groups: np.ndarray
    codes: Rows
    scales: RowsOfTwo
    exact: bool

    @property
    def run(self) -> int:
        """Columns that follow one another in one group everywhere, as many as MLX can have in a group; else 1."""
        for size in GROUP_SIZES:
            if len(self.groups) % size == 0:
                runs = self.groups.reshape(-1, size)
                if (runs == runs[:, :1]).all():
                    return size
        return 1

    @property
    def packing(self) -> Packing | None:
        """MLX's packing of exactly these values, if there is one."""
        return Packing("affine", self.bits, self.run) if self.exact and self.run > 1 else None

    def values(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, float32 (rows, columns)."""
        codes, (scales, zeros), run = self.codes(start, stop), self.scales(start, stop), self.run
        groups = self.groups[::run]
        values = codes.reshape(len(codes), -1, run).astype(np.float32)
        with np.errstate(all="ignore"):
            values -= zeros[:, groups, None]
            values *= scales[:, groups, None]
        return values.reshape(codes.shape)

    def affine_scales(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The scales and biases of `packing`, float32 (rows, columns / group_size)."""
        scales, zeros = self.scales(start, stop)
        groups = self.groups[:: self.run]
        with np.errstate(all="ignore"):
            return np.ascontiguousarray(scales[:, groups]), (-zeros * scales)[:, groups]


@dataclass(frozen=True, eq=False)
class ForeignParameter(Parameter):
    """A matrix in another library's packing, or a part of it, which begins at `first_row`."""

    weights: IntegerWeights | TableWeights
    first_row: int = 0

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], weights: IntegerWeights | TableWeights) -> ForeignParameter:
        """The parameter `name` (Hugging Face's) of `shape` whose values are `weights`."""
        packings = () if weights.packing is None else (weights.packing,)
        source = weights.tensors[0].name
        return cls(name, source, shape, weights.kind, packings, (), shape[1], 1, ALL, weights)

    @property
    def nbytes(self) -> int:
        """Bytes of the file; of a part its share."""
        columns = len(range(*self.columns.indices(self.width)))
        return sum(tensor.nbytes for tensor in self.weights.tensors) * columns // self.width

    def release(self) -> None:
        for tensor in self.weights.tensors:
            tensor.release()

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.weights.values(*self._rows(start, stop))[:, self.columns]

    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        if not np.isfinite(out).all():
            raise QwenMLXError(
                f"{self.weights.tensors[0].file}: tensor {self.source_name!r} ({self.type_name}) has a value that is "
                "inf or NaN; the file is damaged, download it again."
            )

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        weights, (first, last) = self.weights, self._rows(start, stop)
        assert isinstance(weights, IntegerWeights)
        scales, biases = weights.affine_scales(first, last)
        if finite and not (np.isfinite(scales).all() and np.isfinite(biases).all()):
            raise QwenMLXError(
                f"{weights.tensors[0].file}: tensor {self.source_name!r} ({self.type_name}) has a scale that is inf or "
                "NaN; the file is damaged, download it again."
            )
        codes = np.empty((last - first, self.width * packing.bits // 32), np.uint32)

        def work(rows: slice) -> None:
            part = range(first, last)[rows]
            codes[rows] = pack(np.ascontiguousarray(weights.codes(part.start, part.stop)), packing.bits)

        blocks.in_chunks(work, last - first, self.width)
        left, right, _ = self.columns.indices(self.width)
        words = slice(left * packing.bits // 32, right * packing.bits // 32)
        groups = slice(left // packing.group_size, right // packing.group_size)
        return codes[:, words], scales[:, groups], biases[:, groups]

    def scale_dtype(self) -> str:
        assert isinstance(self.weights, IntegerWeights)
        arrays = self.weights.affine_scales(*self._rows(0, None))
        with np.errstate(over="ignore"):
            halves = all(np.array_equal(a, a.astype(np.float16).astype(np.float32), equal_nan=True) for a in arrays)
        if halves:
            return "float16"
        return "float32" if any((a.view(np.uint32) & 0xFFFF).any() for a in arrays) else "bfloat16"

    def part(self, rows: slice, columns: slice) -> Parameter:
        start, stop, _ = rows.indices(self.shape[0])
        left, right, _ = columns.indices(self.shape[1])
        packings = tuple(p for p in self.packings if left % p.block_size == right % p.block_size == 0)
        offset = self.columns.indices(self.width)[0]
        return replace(
            self,
            shape=(stop - start, right - left),
            packings=packings,
            columns=slice(offset + left, offset + right),
            first_row=self.first_row + start,
        )

    def _rows(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        return self.first_row + start, self.first_row + stop


# ---------------------------------------------------------------------------------------------------------------------
# Shared by the formats


def floats(tensor: StoredTensor, at: Any = ...) -> np.ndarray:
    """The elements `at` an index of a tensor of floats or bytes, as float32."""
    array: np.ndarray = tensor.array[at]
    if tensor.dtype in ("F8_E4M3", "F8_E8M0"):
        array = (E4M3 if tensor.dtype == "F8_E4M3" else E8M0)[array]
    return as_float32(array) if tensor.dtype == "BF16" else array.astype(np.float32, copy=False)


def has_exact_products(scales: StoredTensor) -> bool:
    """True if the product of a scale and an integer of up to 9 bits is exact in float32."""
    return scales.dtype in FLOATS and scales.dtype != "F32"


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 2, 4 or 8 bits, the lowest first, from 32-bit integers (n, m): uint8 (n, m * 32 / bits)."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return bytes_
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes: np.ndarray = (bytes_[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(len(words), -1)


def check_group_size(settings: dict[str, Any], columns: int, scales: StoredTensor) -> None:
    """Raises QwenMLXError where the configuration says another group than the scales (groups, rows) have."""
    said, own = settings.get("group_size", settings.get("q_group_size")), columns // max(scales.shape[0], 1)
    if not settings.get("dynamic") and type(said) is int and said > 0 and said != own:
        raise QwenMLXError(
            f"{scales.file}: tensor {scales.name!r} has groups of {own}, but the configuration says {said}; download "
            "the folder again."
        )


def even_groups(columns: int, n_groups: int) -> np.ndarray | None:
    """The group of each column where all groups are equally wide; None if they cannot be."""
    if n_groups < 1 or columns % n_groups:
        return None
    return np.arange(columns) // (columns // n_groups)
