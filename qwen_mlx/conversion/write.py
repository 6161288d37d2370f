"""Writes safetensors files piece by piece, so that no tensor has to be in memory at once.

The format: 8 bytes of header length (little-endian), a JSON header with each tensor's dtype, shape and byte range, then
the bytes. Source: the specification in the safetensors repository's README.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype ("F32", "F16", "BF16", "U32", "U8") and shape of a tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def shard(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Groups tensors, in order, into files of at most `limit` bytes (a larger tensor gets a file of its own)."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in specs:
        if not shards or size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


class ShardedWriter:
    """Writes `model.safetensors`, or `model-0000N-of-0000M.safetensors` with an index, into a folder.

    Each tensor is given in pieces, in the order of its bytes; different tensors may be interleaved. Leaving the block
    raises ValueError if a tensor is not complete.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], limit: int):
        shards = shard(specs, limit)
        self._files: list[BinaryIO] = []
        self._positions: dict[str, tuple[BinaryIO, int, int]] = {}  # name -> file, next byte, end
        weight_map = {}
        for number, group in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            ends = list(itertools.accumulate(spec.nbytes for spec in group))
            header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
            for spec, end in zip(group, ends):
                offsets = [end - spec.nbytes, end]
                header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
                weight_map[spec.name] = name
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            start = 8 + len(text)
            file = open(folder / name, "wb")  # noqa: SIM115 (closed by __exit__)
            self._files.append(file)
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(start + ends[-1])
            self._positions |= {s.name: (file, start + end - s.nbytes, start + end) for s, end in zip(group, ends)}
        if len(shards) > 1:
            total = sum(spec.nbytes for group in shards for spec in group)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, piece: np.ndarray) -> None:
        """Appends the bytes of an array to tensor `name`."""
        file, position, end = self._positions[name]
        data = np.ascontiguousarray(piece).data.cast("B")
        if position + len(data) > end:
            raise ValueError(f"Tensor {name!r} is given more bytes than its shape holds.")
        file.seek(position)
        file.write(data)
        self._positions[name] = (file, position + len(data), end)

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        for file in self._files:
            file.close()
        short = [name for name, (_, position, end) in self._positions.items() if position != end]
        if short and kind is None:
            raise ValueError(f"Tensor {short[0]!r} was not written whole.")
