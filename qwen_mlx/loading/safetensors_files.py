"""The safetensors of a model folder: the tensors' names, dtypes and shapes, and their bytes, read when asked for."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import QwenMLXError
from ..gguf.safetensors_header import SafetensorError, read_header
from ..gguf.stored import ALL, StoredFile, StoredRows
from ..text.files import read_json

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "U32": "uint32", "U8": "uint8"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "I8": "int8", "I32": "int32", "I64": "int64"}
FLOATS = ("F32", "F16", "BF16")
NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "U32": "<u4", "U8": "u1"}
NUMPY |= {"F8_E4M3": "u1", "F8_E8M0": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a file, where it begins at byte `offset`."""

    stored: StoredFile
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    _kept: list[np.ndarray] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def file(self) -> Path:
        return self.stored.path

    @property
    def array(self) -> np.ndarray:
        """The elements in `shape`; bfloat16 as uint16, floats of 8 bits as uint8. They are read once, until release(),
        for packings whose rows are not together in the file."""
        with self._lock:
            if not self._kept:
                self._kept.append(self.read().view(NUMPY[self.dtype]).reshape(self.shape))
            return self._kept[0]

    def release(self) -> None:
        """Forgets what `array` has read."""
        with self._lock:
            self._kept.clear()

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes start to stop, uint8 (bytes,)."""
        first, last, _ = slice(start, stop).indices(self.nbytes)
        return self.stored.read(self.offset + first, max(0, last - first))

    def rows(self, dtype: str, count: int) -> StoredRows:
        """The tensor as a matrix of so many rows, its items of a dtype of NumPy's."""
        kind = np.dtype(dtype)
        return StoredRows(self.stored, self.offset, kind, count, self.nbytes // kind.itemsize // max(1, count), ALL)


def safetensors_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise QwenMLXError(f"{index}: has no 'weight_map'; download the folder again.")
        files = sorted({folder / Path(str(name)).name for name in weight_map.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        hint = "; it holds PyTorch .bin files, save it again as safetensors" if list(folder.glob("*.bin")) else ""
        raise QwenMLXError(f"{folder}: no .safetensors file{hint}.")
    for file in files:
        if not os.path.exists(file):  # False, too, for a name that no disk can hold
            raise QwenMLXError(
                f"{folder}: {file.name} is missing, which {index.name} names; download the folder again."
            )
    return files


def open_files(files: list[Path]) -> list[StoredFile]:
    """Opens files. Raises QwenMLXError for one that cannot be opened, or is none."""
    opened = []
    for file in files:
        if file.exists() and not file.is_file():
            raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
        try:
            opened.append(StoredFile.open(file))
        except OSError as error:
            raise QwenMLXError(f"{file}: cannot be read ({error.strerror or error}).") from None
    return opened


def read_tensors(files: list[StoredFile]) -> dict[str, StoredTensor]:
    """The tensors of a folder's files by name.

    Raises QwenMLXError for a file that is not safetensors, and a name in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _tensors_of(file).items():
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name in tensors:
                raise QwenMLXError(
                    f"{file.path.parent}: tensor {name!r} is in {tensors[name].file.name} and in {file.path.name}; "
                    "remove the file that does not belong to the model."
                )
            tensors[name] = tensor
    return tensors


def _tensors_of(file: StoredFile) -> dict[str, StoredTensor]:
    try:
        header, start = read_header(file)
    except (OSError, SafetensorError) as error:
        raise QwenMLXError(f"{file.path}: not a readable safetensors file ({error}); download it again.") from None
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = StoredTensor(file, name, entry["dtype"], shape, start + first, last - first)
    return tensors
