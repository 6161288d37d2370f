"""Where a model's parameters come from: a GGUF file, or a folder of safetensors, under Hugging Face's names.

Both know how a parameter is packed (`packing`), give it packed (`packed`), or give several stacked and dense (`dense`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .backend import mx
from .config import ModelConfig, read_json
from .errors import GGUFError, QwenMLXError
from .gguf import blocks
from .gguf.names import model_tensors
from .gguf.reader import GGUFFile

# (group_size, bits) of MLX's affine mode, "q4_k" or "q6_k" for GGUF's blocks as they are, None for dense.
Packing = tuple[int, int] | str | None
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
    """A GGUF's tensors, dequantized from its memory map straight into MLX's memory.

    Raises GGUFError if they are not exactly those of `config`.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self._file = file
        self._infos = model_tensors(file, config)
        for info in self._infos.values():
            if info.type.name in ("I8", "I16", "I32", "I64"):
                raise GGUFError(f"{file.path}: tensor {info.name!r} has type {info.type.name}, which holds no weights.")
        self._rooms: Iterator[mx.array] = iter(())

    def nbytes(self, name: str) -> int:
        return self._infos[name].nbytes

    def packing(self, name: str) -> Packing:
        info = self._infos[name]
        if len(info.shape) != 2:
            return None
        affine = info.type.affine
        return RAW.get(info.type.name) or ((affine.group_size, affine.bits) if affine else None)

    def raw(self, names: Sequence[str]) -> np.ndarray:
        parts = [self._file.raw(self._infos[name].name) for name in names]
        rows = np.concatenate(parts)
        for name in names:
            self._file.release(self._infos[name].name)
        return rows

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        """Scales are float32 even where float16 would do: MLX would widen them for every product with bfloat16."""
        info = self._infos[name]
        codes, scales, biases = blocks.affine(self._file.raw(info.name), info.type, np.float32)
        self._file.release(info.name)
        return mx.array(codes), mx.array(scales), mx.array(biases)

    def expect_dense(self, groups: Sequence[Sequence[str]]) -> None:
        self._rooms = _rooms([self._stacked_shape(names) for names in groups])

    def dense(self, names: Sequence[str]) -> mx.array:
        room = next(self._rooms)
        view = np.array(room, copy=False).reshape(-1, room.shape[-1])
        start = 0
        for name in names:
            info = self._infos[name]
            rows = math.prod(info.shape) // info.shape[-1]
            if len(info.shape) == 1:  # vectors are stacked end to end
                out = view[0, start : start + info.shape[0]][None]
                start += info.shape[0]
            else:
                out = view[start : start + rows]
                start += rows
            blocks.dequantize(self._file.raw(info.name), info.type, out)
            self._file.release(info.name)
        return room

    def _stacked_shape(self, names: Sequence[str]) -> tuple[int, ...]:
        first = self._infos[names[0]].shape
        return (sum(self._infos[name].shape[0] for name in names), *first[1:])


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
    """A folder's safetensors, dense or packed as mlx-lm packs them, read lazily by MLX.

    Raises QwenMLXError if they are not exactly those of `config`.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self._arrays = {
            name: array
            for file in safetensors_files(folder)
            for name, array in load_safetensors(file).items()
            if not name.endswith("rotary_emb.inv_freq")
        }
        if config.tie_word_embeddings:
            self._arrays.pop("lm_head.weight", None)  # some writers store the shared matrix twice
        quantization = read_json(folder / "config.json").get("quantization") or {}
        self._packings: dict[str, tuple[int, int]] = {}
        known = set()
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
            elif _is_mxfp4(quantization, module, array, scales):
                array = mx.dequantize(array, scales, group_size=32, bits=4, mode="mxfp4")  # lazily
                self._arrays[name], found = array, array.shape
                del self._arrays[f"{module}.scales"]
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
        return self._arrays[name].nbytes

    def packing(self, name: str) -> Packing:
        return self._packings.get(name)

    def raw(self, names: Sequence[str]) -> np.ndarray:
        raise NotImplementedError("safetensors hold no blocks of GGUF")

    def packed(self, name: str) -> tuple[mx.array, mx.array, mx.array]:
        module = name.removesuffix(".weight")
        return self._arrays.pop(name), self._arrays.pop(f"{module}.scales"), self._arrays.pop(f"{module}.biases")

    def expect_dense(self, groups: Sequence[Sequence[str]]) -> None:
        pass

    def dense(self, names: Sequence[str]) -> mx.array:
        arrays = [self._one(name) for name in names]
        return mx.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    def _one(self, name: str) -> mx.array:
        if name not in self._packings:
            return self._arrays.pop(name)
        group_size, bits = self._packings[name]
        codes, scales, biases = self.packed(name)
        wide = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(codes, *wide, group_size=group_size, bits=bits)


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
        if not file.exists():
            raise QwenMLXError(
                f"{folder}: {file.name} is missing, which {index.name} names; download the folder again."
            )
    return files


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """A file's tensors, lazily: MLX reads each when it is evaluated."""
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise QwenMLXError(f"{file}: not a readable safetensors file ({error}); download it again.") from None


def _is_mxfp4(quantization: dict[str, Any], module: str, codes: mx.array, scales: mx.array | None) -> bool:
    own = quantization.get(module, quantization)
    if scales is None or not isinstance(own, dict) or own.get("mode") != "mxfp4":
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
