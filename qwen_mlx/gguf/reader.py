"""Reads a GGUF container (versions 2 and 3, little-endian): typed metadata and views of the tensor bytes.

The file is never mapped: a tensor's bytes are read when they are asked for. Every count, length and offset is checked
against the bytes that remain before anything is allocated, so a hostile header costs no more than its own size. Tensor
dimensions are listed innermost first in the file and reversed here; the bytes are already row-major (out, in) and are
not moved.
Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..errors import GGUFError
from .blocks import BLOCK_TYPES, REMOVED_TYPES, BlockType
from .stored import ALL, StoredFile, StoredRows

MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_ARRAY_LENGTH = 1 << 24  # a hundred times the vocabulary: more is not a model
MAX_ITEMS = 1 << 22  # of all arrays of a part: seven times what the largest vocabulary needs
FIRST_READ = 1 << 20  # bytes; then as many again
MAX_HEADER = 1 << 27  # bytes before the directory of tensors; a vocabulary of 150,000 tokens needs 6 MB
MAX_ENTRIES = 1 << 16  # metadata fields; tensors
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `shape` is row-major, (out, in) for a matrix: GGUF's dimensions reversed.

    `offset` (bytes) counts from the start of part number `part`; `nbytes` is the size of its blocks.
    """

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """An open GGUF file, or all parts of a split one when given the first (`-00001-of-0000N.gguf`).

    metadata: name -> int, float, bool, str or (nested) list of these. value_types: name -> GGUF's number for its type,
    and for its items' type if it is an array. tensors: name -> TensorInfo, in file order.
    Raises GGUFError if the file cannot be read or contradicts itself; it names the file and the field.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.parts: list[StoredFile] = []
        self._tensors: dict[str, TensorInfo] = {}
        first = self._open(self.path)
        self.version: int = first.version
        self.metadata: Mapping[str, Any] = MappingProxyType(first.metadata)
        self.value_types: Mapping[str, tuple[int, int | None]] = MappingProxyType(first.value_types)
        count = self.metadata.get("split.count", 1)
        if isinstance(count, int) and count > 1:
            self._open_other_parts(count)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._tensors)

    def stored(self, name: str) -> StoredRows:
        """Where the tensor's bytes are: uint8 (rows, bytes of a row)."""
        info = self.tensors[name]
        rows = math.prod(info.shape[:-1])
        return StoredRows(self.parts[info.part], info.offset, np.dtype(np.uint8), rows, info.nbytes // rows, ALL)

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, read now: uint8 (rows, bytes of a row), read-only as the file."""
        raw = self.stored(name).read()
        raw.flags.writeable = False
        return raw

    @property
    def size(self) -> int:
        """Bytes of all parts together."""
        return sum(part.size for part in self.parts)

    def _open(self, path: Path) -> _Header:
        if path.exists() and not path.is_file():
            raise GGUFError(f"{path}: cannot be read: it is not a file.")
        try:
            file = StoredFile.open(path, GGUFError)
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read ({error.strerror or error}).") from None
        if file.size == 0:
            raise GGUFError(f"{path}: the file is empty; download it again.")
        header = _Header(file)
        part = len(self.parts)
        self.parts.append(file)
        for info in header.tensors(part):
            if info.name in self._tensors:
                raise GGUFError(f"{path}: tensor {info.name!r} appears twice; the file is damaged, download it again.")
            self._tensors[info.name] = info
        return header

    def _open_other_parts(self, count: int) -> None:
        match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        if self.metadata.get("split.no", 0) != 0 or match is None or int(match[2]) != 1 or int(match[3]) != count:
            raise GGUFError(
                f"{self.path}: one part of a file split in {count}; open the first part, named "
                f"NAME-00001-of-{count:05d}.gguf, with the others beside it."
            )
        for number in range(2, count + 1):
            path = self.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")
            if not path.exists():
                raise GGUFError(f"{self.path}: part {number} of {count} is missing; put {path.name} beside it.")
            header = self._open(path)
            for field, expected in (("split.no", number - 1), ("split.count", count)):
                if header.metadata.get(field) != expected:
                    raise GGUFError(
                        f"{path}: {field} is {header.metadata.get(field)!r}, expected {expected}; "
                        "the parts are mixed up, download them again."
                    )
        total = self.metadata.get("split.tensors.count", len(self._tensors))
        if total != len(self._tensors):
            raise GGUFError(
                f"{self.path}: the parts hold {len(self._tensors)} tensors, split.tensors.count says {total}."
            )


class _Header:
    """Parses one part's header. `position` is the read position in bytes; `data` holds the file's beginning so far."""

    def __init__(self, file: StoredFile):
        self.file, self.path, self.size, self.position = file, file.path, file.size, 4
        self.data = bytearray()
        self._items = 0  # of all arrays so far
        self._read_until(min(4, self.size))
        magic, path = bytes(self.data[:4]), self.path
        if magic != b"GGUF":
            hint = "; for safetensors give their folder" if path.suffix == ".safetensors" else ""
            raise GGUFError(f"{path}: not a GGUF file (it starts with {magic!r}, expected b'GGUF'){hint}.")
        self.version = self._scalar("I", "version")
        if self.version not in (2, 3):
            if struct.unpack("<I", struct.pack(">I", self.version))[0] in (1, 2, 3):
                raise GGUFError(
                    f"{path}: a big-endian GGUF file; convert it to little-endian (gguf-py's gguf_convert_endian)."
                )
            raise GGUFError(
                f"{path}: GGUF version {self.version}, expected 2 or 3; convert the model again with a current tool."
            )
        n_tensors = self._count("tensor count", 8 + 4 + 8 + 4 + 8)
        n_keys = self._count("metadata count", 8 + 4 + 1)
        self.metadata: dict[str, Any] = {}
        self.value_types: dict[str, tuple[int, int | None]] = {}
        for index in range(n_keys):
            key = self._string(f"name of metadata field {index}")
            if key in self.metadata:
                raise GGUFError(f"{path}: metadata field {key!r} appears twice; the file is damaged.")
            kind, start = self._scalar("I", key), self.position
            self.metadata[key] = self._value(kind, key, 0)
            items = struct.unpack_from("<I", self.data, start)[0] if kind == _ARRAY else None
            self.value_types[key] = (kind, items)
        self._directory = [self._tensor_entry(index) for index in range(n_tensors)]
        self.alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(self.alignment, int) or self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise GGUFError(f"{path}: general.alignment is {self.alignment!r}, expected a power of two.")
        self.data_start = -(-self.position // self.alignment) * self.alignment

    def tensors(self, part: int) -> list[TensorInfo]:
        """The tensors of this part, with absolute offsets, checked for size, alignment and overlap."""
        infos = []
        for name, dims, type_id, relative in self._directory:
            where = f"{self.path}: tensor {name!r}"
            block = BLOCK_TYPES.get(type_id)
            if type_id in REMOVED_TYPES:
                raise GGUFError(
                    f"{where} has the type {REMOVED_TYPES[type_id]}, which llama.cpp no longer has; take the model's "
                    "Q4_0 or another type."
                )
            if block is None:
                raise GGUFError(
                    f"{where} has type id {type_id}, which llama.cpp does not have (ik_llama.cpp has more); take the "
                    "model in one of llama.cpp's types."
                )
            if not 1 <= len(dims) <= MAX_DIMS or 0 in dims:
                raise GGUFError(f"{where} has dimensions {list(dims)}, expected 1 to {MAX_DIMS}, none of them zero.")
            if dims[0] % block.block_size:
                raise GGUFError(
                    f"{where} is {block.name} with rows of {dims[0]}, expected a multiple of {block.block_size}."
                )
            nbytes = math.prod(dims) // block.block_size * block.type_size
            if relative % self.alignment:
                raise GGUFError(f"{where} starts at {relative}, expected a multiple of the alignment {self.alignment}.")
            offset = self.data_start + relative
            if offset + nbytes > self.size:
                raise GGUFError(
                    f"{where} needs bytes {offset} to {offset + nbytes}, but the file ends at {self.size}: "
                    "it is truncated, download it again."
                )
            infos.append(TensorInfo(name, tuple(reversed(dims)), block, offset, nbytes, part))
        for before, after in itertools.pairwise(sorted(infos, key=lambda info: info.offset)):
            if before.offset + before.nbytes > after.offset:
                raise GGUFError(
                    f"{self.path}: tensors {before.name!r} and {after.name!r} overlap; the file is damaged."
                )
        return infos

    def _tensor_entry(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"name of tensor {index}")
        n_dims = self._scalar("I", f"{name}: number of dimensions")
        if n_dims > MAX_DIMS:
            raise GGUFError(f"{self.path}: tensor {name!r} has {n_dims} dimensions, expected 1 to {MAX_DIMS}.")
        dims = tuple(self._scalar("Q", f"{name}: dimensions") for _ in range(n_dims))
        return name, dims, self._scalar("I", f"{name}: type"), self._scalar("Q", f"{name}: offset")

    def _take(self, length: int, field: str) -> bytes:
        if length > self.size - self.position:
            raise GGUFError(
                f"{self.path}: {field} needs {length} bytes at {self.position}, but the file ends at {self.size}: "
                "it is truncated or damaged, download it again."
            )
        self.position += length
        self._read_until(self.position)
        return bytes(self.data[self.position - length : self.position])

    def _read_until(self, end: int) -> int:
        """Reads on until `end`, which is within the file, and some more; returns the number of bytes that are there."""
        if end > MAX_HEADER:
            raise GGUFError(f"{self.path}: its header has more than {MAX_HEADER >> 20} MB; the file is damaged.")
        if end > len(self.data):
            wanted = min(self.size, max(end, 2 * len(self.data), FIRST_READ))
            self.data += self.file.read(len(self.data), wanted - len(self.data)).data
        return len(self.data)

    def _scalar(self, code: str, field: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code), field))[0]

    def _count(self, field: str, at_least: int) -> int:
        """A number of items of at least `at_least` bytes each, refused if the rest of the file cannot hold them."""
        count: int = self._scalar("Q", field)
        if at_least > 8 and count > MAX_ENTRIES:
            raise GGUFError(f"{self.path}: {field} is {count}, expected at most {MAX_ENTRIES}; the file is damaged.")
        if count * at_least > self.size - self.position:
            raise GGUFError(
                f"{self.path}: {field} is {count}, more than the remaining {self.size - self.position} bytes hold: "
                "it is truncated or damaged, download it again."
            )
        return count

    def _string(self, field: str) -> str:
        raw = self._take(self._scalar("Q", field), field)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise GGUFError(f"{self.path}: {field} is not UTF-8 ({error.reason} at byte {error.start}).") from None

    def _value(self, kind: int, field: str, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], field)
        if kind == _STRING:
            return self._string(field)
        if kind != _ARRAY:
            raise GGUFError(f"{self.path}: metadata field {field!r} has value type {kind}, expected 0 to 12.")
        if depth == MAX_ARRAY_DEPTH:
            raise GGUFError(f"{self.path}: metadata field {field!r} nests arrays more than {MAX_ARRAY_DEPTH} deep.")
        kind = self._scalar("I", field)
        length = self._scalar("Q", field)
        if length > MAX_ARRAY_LENGTH:
            raise GGUFError(
                f"{self.path}: metadata field {field!r} has {length} items, expected at most {MAX_ARRAY_LENGTH}."
            )
        self._items += length
        if self._items > MAX_ITEMS:
            raise GGUFError(f"{self.path}: its arrays have more than {MAX_ITEMS} items; the file is damaged.")
        self.position -= 8
        if kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[kind])
            count = self._count(f"length of {field!r}", size)
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size, field)))
        count = self._count(f"length of {field!r}", 8 if kind == _STRING else 12)
        if kind == _STRING:
            return self._strings(count, field)
        return [self._value(kind, field, depth + 1) for _ in range(count)]

    def _strings(self, count: int, field: str) -> list[str]:
        """The vocabulary has 300,000 strings: this loop is why a file opens in a third of a second."""
        data, position, size, there = self.data, self.position, self.size, len(self.data)
        unpack: Callable[[Any, int], tuple[int]] = struct.Struct("<Q").unpack_from
        strings = []
        try:
            for _ in range(count):
                if position + 8 > there:
                    there = self._read_until(min(position + 8, size))
                (length,) = unpack(data, position)
                position += 8 + length
                if position > there:
                    if position > size:
                        raise struct.error
                    there = self._read_until(position)
                strings.append(data[position - length : position].decode())
        except struct.error:
            raise GGUFError(
                f"{self.path}: string {len(strings)} of {field!r} runs past the end of the file at {size}: "
                "it is truncated or damaged, download it again."
            ) from None
        except UnicodeDecodeError as error:
            raise GGUFError(
                f"{self.path}: string {len(strings)} of {field!r} is not UTF-8 ({error.reason} at byte {error.start})."
            ) from None
        self.position = position
        return strings
