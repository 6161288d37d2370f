"""Writes safetensors files piece by piece, so that no tensor has to be whole in memory.

The format: 8 bytes of header length (little-endian), a JSON header with each tensor's dtype, shape and byte range, then
the bytes. Source: the specification in the safetensors repository's README.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

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

    Each tensor is given in pieces, in the order of its bytes; different tensors may be interleaved. `close` raises
    ValueError if one was not given whole.
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], limit: int):
        shards = shard(specs, limit)
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> file, next byte, end
        self._files = []
        weight_map = {}
        for number, group in enumerate(shards):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
            at = 0
            for spec in group:
                header[spec.name] = {
                    "dtype": spec.dtype,
                    "shape": list(spec.shape),
                    "data_offsets": [at, at + spec.nbytes],
                }
                weight_map[spec.name] = name
                at += spec.nbytes
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            file = open(folder / name, "wb")  # noqa: SIM115 (closed by close)
            file.write(len(text).to_bytes(8, "little") + text)
            start = 8 + len(text)
            self._files.append(file)
            for spec in group:
                first, last = header[spec.name]["data_offsets"]
                self._places[spec.name] = (number, start + first, start + last)
            file.truncate(start + at)
        if len(shards) > 1:
            total = sum(spec.nbytes for group in shards for spec in group)
            index: Mapping[str, object] = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, piece: np.ndarray) -> None:
        """Appends the bytes of a contiguous array to tensor `name`."""
        number, at, end = self._places[name]
        data = np.ascontiguousarray(piece).data.cast("B")
        if at + len(data) > end:
            raise ValueError(f"Tensor {name!r} is given more bytes than its shape holds.")
        file = self._files[number]
        file.seek(at)
        file.write(data)
        self._places[name] = (number, at + len(data), end)

    def close(self) -> None:
        for file in self._files:
            file.close()
        short = [name for name, (_, at, end) in self._places.items() if at != end]
        if short:
            raise ValueError(f"Tensor {short[0]!r} was not written whole.")

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for file in self._files:
                file.close()
