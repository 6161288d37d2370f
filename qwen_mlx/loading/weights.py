"""Where a model's parameters come from: a GGUF file, or a folder of safetensors, under Hugging Face's names.

Both know how a parameter is packed (`packing`), give it packed (`packed`), or give several stacked and dense (`dense`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from ..backend import mx
from ..errors import QwenMLXError
from ..gguf import blocks
from ..gguf.reader import GGUFFile
from ..model.config import ModelConfig
from ..parallel.shards import ALL, Cut, uncut
from ..text.files import read_json
from .sources import model_tensors

# (group_size, bits) of MLX's affine mode, "q4_k" or "q6_k" for GGUF's blocks as they are, None for dense.
Packing = tuple[int, int] | str | None
# safetensors' dtypes: as NumPy reads them, and what they are.
STORED = {
    "BF16": (np.uint16, mx.bfloat16),
    "F16": (np.float16, mx.float16),
    "F32": (np.float32, mx.float32),
    "U32": (np.uint32, mx.uint32),
}
RAW = {"Q4_K": "q4_k", "Q6_K": "q6_k"}


class Weights(Protocol):
    """What the loader needs of a source."""

    def nbytes(self, name: str) -> int:
        """Bytes in the file."""

    def packing(self, name: str) -> Packing:
        """How the parameter can be kept in memory without dequantizing it."""

    def raw(self, names: Sequence[str]) -> np.ndarray:
        """GGUF's bytes, stacked by rows: uint8 (rows, bytes of a row)."""

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        """Codes, scales and biases."""

    def expect_dense(self, groups: Sequence[Sequence[str]]) -> None:
        """Announces the calls of `dense` to come, in order."""

    def dense(self, names: Sequence[str]) -> mx.array:
        """The values, stacked by rows, in float32 or as stored."""


class GGUFWeights:
    """A GGUF's tensors, or the parts of them that `cut` says, dequantized from its memory map straight into MLX's
    memory.

    Raises GGUFError if they are not exactly those of `config`.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, cut: Cut = uncut):
        self._file, self._cut = file, cut
        self._infos = model_tensors(file, config)
        self._rooms: Iterator[mx.array] = iter(())

    def nbytes(self, name: str) -> int:
        info = self._infos[name]
        return info.nbytes * math.prod(self._shape(name)) // math.prod(info.shape)

    def packing(self, name: str) -> Packing:
        info = self._infos[name]
        if len(info.shape) != 2:
            return None
        affine, raw = info.type.affine, RAW.get(info.type.name)
        packing = raw or ((affine.group_size, affine.bits) if affine else None)
        if self._within_blocks(name, info.type.block_size):
            return packing
        # A rank's heads may end within a block of 256: Q4_K then takes MLX's groups of 32, Q6_K has none and is dense.
        return (affine.group_size, affine.bits) if affine and self._within_blocks(name, affine.group_size) else None

    def raw(self, names: Sequence[str]) -> np.ndarray:
        rows = np.concatenate([self._bytes(name)[0] for name in names])
        for name in names:
            self._file.release(self._infos[name].name)
        return rows

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        """Scales are float32 even where float16 would do: MLX would widen them for every product with bfloat16."""
        info = self._infos[name]
        raw, columns = self._bytes(name)
        parts: Sequence[np.ndarray] = blocks.affine(raw, info.type, np.float32)
        self._file.release(info.name)
        if columns != ALL:
            n = raw.shape[1] // info.type.type_size * info.type.block_size
            parts = [a[:, columns.start * a.shape[1] // n : columns.stop * a.shape[1] // n] for a in parts]
        codes, scales, biases = (mx.array(part) for part in parts)
        return codes, scales, biases

    def expect_dense(self, groups: Sequence[Sequence[str]]) -> None:
        self._rooms = _rooms([self._stacked_shape(names) for names in groups])

    def dense(self, names: Sequence[str]) -> mx.array:
        room = next(self._rooms)
        view = np.array(room, copy=False).reshape(-1, room.shape[-1])
        start = 0
        for name in names:
            info, shape = self._infos[name], self._shape(name)
            # Vectors are stacked end to end.
            out = view[0, start : start + shape[0]][None] if len(shape) == 1 else view[start : start + shape[0]]
            start += shape[0]
            raw, columns = self._bytes(name)
            if columns == ALL:
                blocks.dequantize(raw, info.type, out)
            else:
                step = max(1, blocks.CHUNK_WEIGHTS // info.shape[-1])
                for row in range(0, len(raw), step):
                    out[row : row + step] = blocks.dequantize(raw[row : row + step], info.type)[:, columns]
            self._file.release(info.name)
        return room

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(len(range(*part.indices(n))) for part, n in zip(self._cut(name), self._infos[name].shape))

    def _stacked_shape(self, names: Sequence[str]) -> tuple[int, ...]:
        shapes = [self._shape(name) for name in names]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _bytes(self, name: str) -> tuple[np.ndarray, slice]:
        """The bytes of whole blocks, uint8 (rows, bytes of a row), that hold the part, and its columns within them."""
        info, (rows, columns) = self._infos[name], self._cut(name)
        raw = self._file.raw(info.name)
        if len(info.shape) == 1:  # a row of the file, and small
            return raw, rows
        raw = raw[rows]
        if columns == ALL:
            return raw, ALL
        block = info.type.block_size
        first, last = columns.start // block, -(-columns.stop // block)
        raw = np.ascontiguousarray(raw[:, first * info.type.type_size : last * info.type.type_size])
        part = slice(columns.start - first * block, columns.stop - first * block)
        return raw, ALL if part == slice(0, (last - first) * block) else part

    def _within_blocks(self, name: str, block: int) -> bool:
        columns = self._cut(name)[1]
        return columns == ALL or columns.start % block == columns.stop % block == 0


def _rooms(shapes: list[tuple[int, ...]]) -> Iterator[mx.array]:
    """Uninitialised float32 arrays to dequantize into. The next one is allocated meanwhile: the system takes longer to
    hand out fresh memory than a core takes to fill it.
    """
    upcoming = None
    for shape in [*shapes, (1,)]:
        room, upcoming = upcoming, mx.empty(shape, mx.float32)
        mx.async_eval(upcoming)
        if room is not None:
            mx.eval(room)
            yield room


class FolderWeights:
    """A folder's safetensors, dense or packed as mlx-lm packs them, read lazily by MLX, or the parts that `cut` says,
    read through a memory map.

    Raises QwenMLXError if they are not exactly those of `config`.
    """

    def __init__(self, folder: Path, config: ModelConfig, cut: Cut = uncut):
        self._cut, tensors = cut, folder_tensors(folder)
        self._files = {name: file for name, (file, _) in tensors.items()}
        self._arrays = {name: array for name, (_, array) in tensors.items()}
        if config.tie_word_embeddings:
            self._arrays.pop("lm_head.weight", None)  # some writers store the shared matrix twice
        quantization = read_json(folder / "config.json").get("quantization") or {}
        self._packings: dict[str, tuple[int, int]] = {}
        known = set()
        self._columns = {name: shape[-1] for name, shape in config.parameter_shapes().items()}
        for name, shape in config.parameter_shapes().items():
            array = self._arrays.get(name)
            if array is None:
                raise QwenMLXError(f"{folder}: tensor {name!r} is missing from its safetensors; download it again.")
            found, module = array.shape, name.removesuffix(".weight")
            scales, biases = (self._arrays.get(f"{module}.{kind}") for kind in ("scales", "biases"))
            if scales is not None and biases is not None and len(found) == 2:
                group_size, bits = self._packings[name] = _packing(quantization, module, folder)
                found = (found[0], found[-1] * 32 // bits)
                if not scales.shape == biases.shape == (shape[0], shape[-1] // group_size):
                    raise QwenMLXError(
                        f"{folder}: {module!r} has scales {scales.shape} and biases {biases.shape}, expected "
                        f"{(shape[0], shape[-1] // group_size)} for groups of {group_size}."
                    )
                known |= {f"{module}.scales", f"{module}.biases"}
            elif scales is not None and _is_mxfp4(quantization, module, array, scales):
                array = mx.dequantize(array, scales, group_size=32, bits=4, mode="mxfp4")  # lazily
                self._arrays[name], found = array, array.shape
                del self._arrays[f"{module}.scales"], self._files[name]
            expected = (mx.uint32,) if name in self._packings else (mx.float32, mx.float16, mx.bfloat16)
            if array.dtype not in expected:
                kinds = " or ".join(str(dtype).removeprefix("mlx.core.") for dtype in expected)
                raise QwenMLXError(f"{folder}: tensor {name!r} is {array.dtype}, expected {kinds}.")
            if found != shape:
                raise QwenMLXError(f"{folder}: tensor {name!r} has shape {found}, expected {shape}.")
            known.add(name)
        extra = sorted(self._arrays.keys() - known)
        if extra:
            raise QwenMLXError(f"{folder}: tensor {extra[0]!r} is not part of this model ({len(extra)} such in all).")

    def nbytes(self, name: str) -> int:
        shape = self._arrays[name].shape
        kept = math.prod(len(range(*part.indices(n))) for part, n in zip(self._cut_of(name, shape), shape))
        return self._arrays[name].nbytes * kept // math.prod(shape)

    def packing(self, name: str) -> Packing:
        return None if self._is_loose(name) else self._packings.get(name)

    def raw(self, names: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("safetensors hold no blocks of GGUF")

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        module = name.removesuffix(".weight")
        return self._take(name), self._take(f"{module}.scales", name), self._take(f"{module}.biases", name)

    def expect_dense(self, groups: Sequence[Sequence[str]]) -> None:
        pass

    def dense(self, names: Sequence[str]) -> mx.array:
        arrays = [self._one(name) for name in names]
        return mx.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def _one(self, name: str) -> mx.array:
        if name not in self._packings:
            return self._take(name)
        group_size, bits = self._packings[name]
        codes, scales, biases = self.packed(name)
        values = _dequantized((codes, scales, biases), group_size, bits)
        return values[:, self._cut(name)[1]] if self._is_loose(name) else values

    def _is_loose(self, name: str) -> bool:
        """Whether the cut ends within a group: the parameter then is read with all its columns, and becomes dense."""
        columns = self._cut(name)[1]
        group_size = self._packings[name][0] if name in self._packings else 1
        return columns != ALL and not columns.start % group_size == columns.stop % group_size == 0

    def _take(self, name: str, parameter: str | None = None) -> mx.array:
        """A stored array, or the part of it that belongs to the cut of `parameter`."""
        array = self._arrays.pop(name)
        cut = self._cut_of(parameter or name, array.shape)
        if all(part == slice(0, n) for part, n in zip(cut, array.shape)):
            return array
        return mapped(self._files[name], name, cut) if name in self._files else array[cut]

    def _cut_of(self, parameter: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The cut in elements of an array that is the parameter, or its codes, scales or biases."""
        rows, columns = self._cut(parameter)
        if self._is_loose(parameter):
            columns = ALL
        if columns != ALL:
            n = self._columns[parameter]
            columns = slice(columns.start * shape[1] // n, columns.stop * shape[1] // n)
        return tuple(slice(*part.indices(n)[:2]) for part, n in zip((rows, columns), shape))


def _dequantized(packed: tuple[mx.array, mx.array, mx.array], group_size: int, bits: int) -> mx.array:
    """In float32, some rows at a time: MLX on a CPU takes six times the memory of what it makes."""
    parts = []
    step = max(1, (1 << 23) // (packed[1].shape[1] * group_size))
    for start in range(0, packed[0].shape[0], step):
        codes, scales, biases = (array[start : start + step] for array in packed)
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        parts.append(mx.dequantize(codes, *wide, group_size=group_size, bits=bits))
        if packed[0].shape[0] > step:
            mx.eval(parts[-1])
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


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


def folder_tensors(folder: Path, packed: bool = True) -> dict[str, tuple[Path, mx.array]]:
    """name -> (file, lazy array) of a folder's tensors; `packed`: MLX's packed ones are allowed.

    Raises QwenMLXError for a dtype that is no weight's (MLX reads float8 as bytes) and a tensor that is there twice.
    """
    found: dict[str, tuple[Path, mx.array]] = {}
    for file in safetensors_files(folder):
        arrays = load_safetensors(file)
        for name, entry in _header(file).items():
            if name == "__metadata__" or name.endswith("rotary_emb.inv_freq"):
                continue
            kind = str(entry["dtype"])
            codes = (kind == "U32" and name.endswith(".weight")) or (kind == "U8" and name.endswith(".scales"))
            if kind not in ("F32", "F16", "BF16") and not (packed and codes):
                raise QwenMLXError(
                    f"{file}: tensor {name!r} has dtype {kind}, expected BF16, F16 or F32; save the model so."
                )
            if name in found:
                raise QwenMLXError(
                    f"{folder}: tensor {name!r} is in {found[name][0].name} and in {file.name}; remove the file that "
                    "does not belong to the model."
                )
            found[name] = file, arrays[name]
    return found


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file that MLX has read says of its tensors: 8 bytes of length, then JSON."""
    with open(file, "rb") as opened:
        header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return header


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """A file's tensors, lazily: MLX reads each when it is evaluated."""
    if file.exists() and not file.is_file():
        raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
    try:
        return cast("dict[str, mx.array]", mx.load(str(file)))
    except (RuntimeError, ValueError) as error:
        raise QwenMLXError(f"{file}: not a readable safetensors file ({error}); download it again.") from None


def mapped(file: Path, name: str, part: tuple[slice, ...]) -> mx.array:
    """A part of one tensor of a safetensors file, of which nothing else is read (mx.load would read the whole tensor).
    Format: 8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = 8 + int.from_bytes(data[:8], "little")
        entry = json.loads(data[8:start])[name]
        stored, dtype = STORED[entry["dtype"]]
        view = np.frombuffer(data, stored, math.prod(entry["shape"]), start + entry["data_offsets"][0])
        values = np.ascontiguousarray(view.reshape(entry["shape"])[part])
        if values.base is not None:  # it would keep the file open
            values = values.copy()
        del view
    array = mx.array(values)
    return array if array.dtype == dtype else array.view(dtype)


def _is_mxfp4(quantization: dict[str, Any], module: str, codes: mx.array, scales: mx.array) -> bool:
    own = quantization.get(module, quantization)
    if not isinstance(own, dict) or own.get("mode") != "mxfp4":
        return False
    fit = codes.ndim == 2 and scales.shape == (codes.shape[0], codes.shape[1] // 4)
    return fit and codes.dtype == mx.uint32 and scales.dtype == mx.uint8


def _packing(quantization: dict[str, Any], module: str, folder: Path) -> tuple[int, int]:
    """From mlx-lm's config: `quantization` holds a default and, per layer, what differs from it."""
    if not isinstance(quantization, dict):
        raise QwenMLXError(f"{folder}: config.json's 'quantization' is {quantization!r}, expected an object.")
    own = quantization.get(module)
    settings = own if isinstance(own, dict) else quantization
    group_size, bits = settings.get("group_size"), settings.get("bits")
    if settings.get("mode", "affine") != "affine" or group_size not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8):
        raise QwenMLXError(
            f"{folder}: {module!r} is packed, but config.json's 'quantization' says {settings!r} for it, expected "
            "'group_size' 32, 64 or 128 and 'bits' 2 to 6 or 8 in affine mode."
        )
    return group_size, bits
