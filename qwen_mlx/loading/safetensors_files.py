"""Reads the safetensors of a model folder: the tensors' names, dtypes and shapes, and views of their bytes.

Format: 8 bytes with the header's length, the header in JSON, the tensors' bytes. The safetensors library validates it.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import QwenMLXError
from ..gguf.reader import release_pages
from ..text.files import LARGEST_JSON, read_json

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "U32": "uint32", "U8": "uint8"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "I8": "int8", "I32": "int32", "I64": "int64"}
FLOATS = ("F32", "F16", "BF16")
_NUMPY = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8", "U32": "<u4", "U8": "u1"}
_NUMPY |= {"F8_E4M3": "u1", "F8_E8M0": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file. data: its bytes, a view of the file's memory map, uint8 (bytes,); release() gives their
    pages back to the system."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray
    release: Callable[[], None]

    @property
    def array(self) -> np.ndarray:
        """The elements in `shape`; bfloat16 as uint16, floats of 8 bits as uint8."""
        return self.data.view(_NUMPY[self.dtype]).reshape(self.shape)


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


def read_tensors(files: list[Path]) -> dict[str, StoredTensor]:
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
                    f"{file.parent}: tensor {name!r} is in {tensors[name].file.name} and in {file.name}; remove the "
                    "file that does not belong to the model."
                )
            tensors[name] = tensor
    return tensors


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    if file.exists() and not file.is_file():
        raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
    try:
        with open(file, "rb") as opened:
            if int.from_bytes(opened.read(8), "little") > LARGEST_JSON:
                raise QwenMLXError(f"{file}: its header has more than {LARGEST_JSON >> 20} MB; download it again.")
        with safe_open(file, "numpy"):
            pass
        with open(file, "rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, SafetensorError) as error:
        raise QwenMLXError(f"{file}: not a readable safetensors file ({error}); download it again.") from None
    start = 8 + int.from_bytes(mapping[:8], "little")
    tensors = {}
    for name, entry in _header(file, mapping[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            data = np.frombuffer(mapping, np.uint8, last - first, start + first)
            release = functools.partial(release_pages, mapping, start + first, last - first)
            tensors[name] = StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), data, release)
    return tensors


def _header(file: Path, text: bytes) -> dict[str, Any]:
    """The header, which the library has validated but for names that stand in it twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise QwenMLXError(f"{file}: its header names a tensor twice; download it again.")
        return names

    header: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
    return header
