"""The parameters of a checkpoint: where each lies in its files, its values, and its exact packings."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import QwenMLXError
from ..gguf import blocks
from ..gguf.blocks import BlockType
from ..gguf.packing import Packing
from ..gguf.stored import StoredRows
from ..gguf.unpack import mxfp4_values, unpack
from ..parallel.shards import ALL
from .safetensors_files import DTYPES, FLOATS
from .small_floats import E2M1, E4M3, E8M0


class Delta(NamedTuple):
    """The form that adapters give a matrix W: row_scale W + b a.

    a: (rank, columns), b: (rows, rank), row_scale: (rows,) or None for 1, all float32.
    """

    a: np.ndarray
    b: np.ndarray
    row_scale: np.ndarray | None = None

    def part(self, rows: slice, columns: slice) -> Delta:
        """The form that they give the matrix's part in these rows and columns."""
        return Delta(self.a[:, columns], self.b[rows], None if self.row_scale is None else self.row_scale[rows])


@dataclass(frozen=True, eq=False)
class Parameter(abc.ABC):
    """One parameter, or the part of it that a rank loads. A vector is read as a matrix of one row.

    name: Hugging Face's. source_name and type_name: the file's. packings: the exact packings in which `arrays` returns
    it, the one for the fastest kernels first; none where it can only be dense. stored: where the file has it, each of
    these matrices with the same rows; their `width` columns are stored in blocks of `block_size`. `columns` says which
    of these columns are the parameter's: a rank's part may begin within a block.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    type_name: str
    packings: tuple[Packing, ...]
    stored: tuple[StoredRows, ...]
    width: int
    block_size: int
    columns: slice

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def nbytes(self) -> int:
        """Bytes that this parameter takes in the file."""
        return sum(rows.nbytes for rows in self.stored)

    @property
    def stored_dtype(self) -> str:
        """ "float32", "float16" or "bfloat16" if the file stores plain elements of that type, else ""."""
        return ""

    def release(self) -> None:  # noqa: B027 (most keep nothing)
        """Forgets what was read, if it was kept; it is read again if it is asked for."""

    @abc.abstractmethod
    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop as float32, of GGUF's F64 as float64: (rows, columns)."""

    @abc.abstractmethod
    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        """Rows start to stop in one of `packings`: codes, scales and biases (none for mxfp4), bfloat16 as uint16; or,
        for q4_k and q6_k, the blocks, uint8 (rows, bytes of a row). `finite`: GGUFError for a scale that is not."""

    @abc.abstractmethod
    def scale_dtype(self) -> str:
        """The narrowest dtype that represents every scale and bias of MLX's packing exactly; reads them all."""

    def fill(self, out: np.ndarray) -> None:
        """Writes the values, by several threads, into contiguous float32 (rows, columns), which may be MLX's memory; or
        what the file has, as it is: elements of a `stored_dtype` of two bytes into uint16, GGUF's blocks into uint8."""

        def work(rows: slice) -> None:
            out[rows] = self.values(rows.start, rows.stop)

        blocks.in_chunks(work, self.rows, self.width)

    def part(self, rows: slice, columns: slice) -> Parameter:
        """The part in these rows and columns; of a vector, in these rows."""
        if len(self.shape) == 1:
            rows, columns = ALL, rows
        start, stop, _ = columns.indices(self.width)
        first, last = start // self.block_size * self.block_size, -(-stop // self.block_size) * self.block_size
        within = slice(start - first, stop - first)
        sizes = (range(self.rows)[rows], range(self.width)[columns])
        return replace(
            self,
            shape=tuple(map(len, sizes[-len(self.shape) :])),
            packings=tuple(p for p in self.packings if within.start % p.block_size == within.stop % p.block_size == 0),
            stored=tuple(
                each.part(rows, _share(slice(first, last), each.shape[1], self.width)) for each in self.stored
            ),
            width=last - first,
            columns=ALL if within == slice(0, last - first) else within,
        )


@dataclass(frozen=True, eq=False)
class BlockParameter(Parameter):
    """A parameter in one of GGUF's types, which safetensors' floats are too. stored: uint8 (rows, bytes of a row)."""

    kind: BlockType

    @property
    def stored_dtype(self) -> str:
        return DTYPES[self.kind.name] if self.kind.name in FLOATS else ""

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        raw = self.stored[0].read(start, stop)
        values = raw.view("<f8") if self.kind.name == "F64" else blocks.dequantize(raw, self.kind)
        return values[:, self.columns]

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        raw = self.stored[0].read(start, stop)
        if packing.kind == "mxfp4":
            arrays: tuple[np.ndarray, ...] = blocks.mxfp4(raw, finite)
        elif packing.kind == "affine":
            arrays = blocks.affine(raw, self.kind, np.float32, finite)
        else:
            arrays = (raw,)
        return tuple(array[:, _share(self.columns, array.shape[1], self.width)] for array in arrays)

    def scale_dtype(self) -> str:
        if self.kind.packing.kind != "affine":
            return "uint8"
        step = max(1, blocks.CHUNK_WEIGHTS // self.width)
        starts = range(0, self.rows, step)
        dtypes = (blocks.exact_scales(self.stored[0].read(start, start + step), self.kind) for start in starts)
        return next((dtype for dtype in dtypes if dtype != "float16"), "float16")

    def fill(self, out: np.ndarray) -> None:
        as_stored = out.dtype != np.float32 or self.kind.name == "F32"

        def work(rows: slice) -> None:
            part = out[rows]
            if as_stored:
                self.stored[0].read_into(part.view(np.uint8), rows.start)
            elif self.columns == ALL:
                blocks.dequantize(self.stored[0].read(rows.start, rows.stop), self.kind, part)
            else:
                part[...] = self.values(rows.start, rows.stop)

        blocks.in_chunks(work, self.rows, self.width)


@dataclass(frozen=True, eq=False)
class ScaledParameter(BlockParameter):
    """A parameter whose values are those of its blocks times a factor, as NVFP4's are in GGUF."""

    factor: np.float32

    @property
    def stored_dtype(self) -> str:
        return ""

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        values: np.ndarray = super().values(start, stop) * self.factor
        return values

    def fill(self, out: np.ndarray) -> None:
        step = max(1, blocks.CHUNK_WEIGHTS // self.width)
        for start in range(0, self.rows, step):
            out[start : start + step] = self.values(start, start + step)


class PackedParameter(Parameter):
    """A matrix as mlx-lm packs it. stored: codes uint32 (rows, columns * bits / 32), scales and biases (rows, groups)
    in any float dtype, or for mxfp4, mxfp8 and nvfp4 scales uint8 alone."""

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        codes, scales, *biases = (each.read(start, stop) for each in self.stored)
        bits = 32 * codes.shape[1] // self.width
        if not biases and (bits, self.block_size) == (4, 32):
            return mxfp4_values(codes, scales)[:, self.columns]
        if not biases:
            table, factors = (E2M1, E4M3[scales]) if bits == 4 else (E4M3, E8M0[scales])
            small: np.ndarray = table[unpack(codes, bits)].reshape(*scales.shape, self.block_size)
            small *= factors[..., None]
            return small.reshape(len(codes), -1)[:, self.columns]
        values = unpack(codes, bits).reshape(*scales.shape, self.block_size).astype(np.float32)
        with np.errstate(all="ignore"):
            values *= as_float32(scales)[..., None]
            values += as_float32(biases[0])[..., None]
        return values.reshape(len(codes), -1)[:, self.columns]

    def fill(self, out: np.ndarray) -> None:
        super().fill(out)
        self._check(out)

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        arrays = tuple(each.read(start, stop) for each in self.stored)
        for scales in arrays[1:] if finite and len(arrays) > 2 else ():
            self._check(as_float32(scales))
        return arrays

    def _check(self, values: np.ndarray) -> None:
        """Raises QwenMLXError for inf or NaN among the values or the scales."""
        file = self.stored[0].file
        if file is not None and not np.isfinite(values).all():
            raise QwenMLXError(
                f"{file.path}: tensor {self.source_name!r} has a scale or a value that is inf or NaN; the file is "
                "damaged, download it again."
            )

    def scale_dtype(self) -> str:
        return {"uint16": "bfloat16"}.get(self.stored[1].dtype.name, self.stored[1].dtype.name)


def _share(columns: slice, items: int, width: int) -> slice:
    """Those of a row's items, of which there is one for every so many of `width` columns, that belong to `columns`."""
    return columns if columns == ALL else slice(columns.start * items // width, columns.stop * items // width)


def as_float32(array: np.ndarray) -> np.ndarray:
    """Stored floats as float32; uint16 is bfloat16."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)
