"""A checkpoint: a GGUF file or a folder of safetensors, as parameters under Hugging Face's names.

load() and convert() read models through it. Opening checks everything but the tensors' bytes, which stay in the files'
memory maps until they are asked for. Nothing here needs MLX.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GGUFError, QwenMLXError
from ..generation.sampling import SamplingSettings
from ..gguf import blocks
from ..gguf.blocks import BLOCK_TYPES, BlockType
from ..gguf.names import ROPE_FACTORS, to_gguf, to_hf
from ..gguf.packing import DENSE, Packing
from ..gguf.reader import GGUFFile, TensorInfo
from ..gguf.unpack import mxfp4_values, unpack
from ..model.config import ModelConfig
from ..parallel.shards import ALL, Cut
from ..text.files import read_json
from ..text.tokenizer import Tokenizer
from .not_models import refuse_gguf, refuse_path
from .safetensors_files import DTYPES, FLOATS, StoredTensor, read_tensors, safetensors_files
from .sampling_defaults import folder_defaults, gguf_defaults

# A folder's tokenizer is copied as it is: what is not rewritten cannot change.
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
_TOKENIZER_FILES += ["added_tokens.json", "vocab.json", "merges.txt"]
_FLOAT_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.name in FLOATS}


@dataclass(frozen=True, eq=False)
class Parameter(abc.ABC):
    """One parameter, or the part of it that a rank loads. A vector is read as a matrix of one row.

    name: Hugging Face's. source_name and type_name: the file's. packings: the exact packings in which `arrays` returns
    it, the one for the fastest kernels first; none where it can only be dense. release(): gives the file's pages back.
    stored: the arrays in the file's memory map, each with the same rows; their `width` columns are stored in blocks of
    `block_size`. `columns` says which of these columns are the parameter's: a rank's part may begin within a block.
    """

    name: str
    source_name: str
    shape: tuple[int, ...]
    type_name: str
    packings: tuple[Packing, ...]
    release: Callable[[], None]
    stored: tuple[np.ndarray, ...]
    width: int
    block_size: int
    columns: slice

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def nbytes(self) -> int:
        """Bytes that this parameter takes in the file."""
        return sum(array.nbytes for array in self.stored)

    @property
    def stored_dtype(self) -> str:
        """ "float32", "float16" or "bfloat16" if the file stores plain elements of that type, else ""."""
        return ""

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
        the elements of a `stored_dtype` of two bytes, as they are, into uint16."""

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
            stored=tuple(_columns(array[rows], slice(first, last), self.width) for array in self.stored),
            width=last - first,
            columns=ALL if within == slice(0, last - first) else within,
        )


@dataclass(frozen=True, eq=False)
class BlockParameter(Parameter):
    """A parameter in one of GGUF's types, which safetensors' floats are too. stored: uint8 (rows, bytes of a row)."""

    kind: BlockType

    @property
    def stored_dtype(self) -> str:
        return DTYPES.get(self.kind.name, "")

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        raw = self.stored[0][start:stop]
        values = raw.view("<f8") if self.kind.name == "F64" else blocks.dequantize(raw, self.kind)
        return values[:, self.columns]

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        raw = self.stored[0][start:stop]
        if packing.kind == "mxfp4":
            arrays: tuple[np.ndarray, ...] = blocks.mxfp4(raw, finite)
        elif packing.kind == "affine":
            arrays = blocks.affine(raw, self.kind, np.float32, finite)
        else:
            arrays = (np.ascontiguousarray(raw),)
        return tuple(_columns(array, self.columns, self.width) for array in arrays)

    def scale_dtype(self) -> str:
        return blocks.exact_scales(self.stored[0], self.kind) if self.kind.packing.kind == "affine" else "uint8"

    def fill(self, out: np.ndarray) -> None:
        if out.dtype == np.uint16:
            elements = self.stored[0].view(np.uint16)
            blocks.in_chunks(lambda rows: np.copyto(out[rows], elements[rows]), self.rows, self.width)
        elif self.columns == ALL:
            blocks.dequantize(self.stored[0], self.kind, out)
        else:
            step = max(1, blocks.CHUNK_WEIGHTS // self.width)
            for start in range(0, self.rows, step):
                out[start : start + step] = self.values(start, start + step)


class PackedParameter(Parameter):
    """A matrix as mlx-lm packs it. stored: codes uint32 (rows, columns * bits / 32), scales and biases (rows, groups)
    in any float dtype, or for mxfp4 scales uint8 alone."""

    def values(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        codes, scales, *biases = (array[start:stop] for array in self.stored)
        if not biases:
            return mxfp4_values(codes, scales)[:, self.columns]
        bits = 32 * codes.shape[1] // self.width
        values = unpack(codes, bits).reshape(*scales.shape, self.block_size).astype(np.float32)
        with np.errstate(all="ignore"):
            values *= _float32(scales)[..., None]
            values += _float32(biases[0])[..., None]
        return values.reshape(len(codes), -1)[:, self.columns]

    def arrays(
        self, packing: Packing, start: int = 0, stop: int | None = None, finite: bool = True
    ) -> tuple[np.ndarray, ...]:
        return tuple(np.ascontiguousarray(array[start:stop]) for array in self.stored)

    def scale_dtype(self) -> str:
        return {"uint16": "bfloat16"}.get(self.stored[1].dtype.name, self.stored[1].dtype.name)


def _columns(array: np.ndarray, columns: slice, width: int) -> np.ndarray:
    """The elements for `columns` of `width` in an array that has one for every so many."""
    if columns == ALL:
        return array
    return array[:, columns.start * array.shape[1] // width : columns.stop * array.shape[1] // width]


def _float32(array: np.ndarray) -> np.ndarray:
    """Stored floats as float32; uint16 is bfloat16."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array.astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, opened. files: those that hold its weights; tokenizer_files: a folder's, to copy as they are;
    rope_factors: a GGUF's divisors of the rotary frequencies, float32 (head_dim / 2,), or None."""

    path: Path
    config: ModelConfig
    parameters: dict[str, Parameter]
    tokenizer: Tokenizer
    defaults: SamplingSettings
    files: list[Path]
    tokenizer_files: list[Path]
    rope_factors: np.ndarray | None = None

    def parts(self, cut: Cut) -> dict[str, Parameter]:
        """The parts of the parameters that one of several ranks loads."""
        return {name: parameter.part(*cut(name)) for name, parameter in self.parameters.items()}


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a GGUF file or a folder of safetensors, dense or packed by mlx-lm.

    Raises GGUFError for a GGUF, QwenMLXError for a folder, naming the file, the field or tensor, what it is and what
    was expected.
    """
    refuse_path(path)
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    refuse_gguf(file)
    config = ModelConfig.from_gguf(file)
    tensors = _gguf_tensors(file, config)
    factors = _rope_factors(file, config)
    try:
        tokenizer, defaults = Tokenizer.from_gguf(file.metadata), gguf_defaults(file)
    except QwenMLXError as error:
        message = str(error)
        raise GGUFError(message if str(path) in message else f"{path}: {message}") from None
    tokenizer.check_fits(config.vocab_size, path)
    parameters: dict[str, Parameter] = {}
    for name, info in tensors.items():
        packings = info.type.packings if len(info.shape) == 2 else ()
        release, stored = functools.partial(file.release, info.name), (file.raw(info.name),)
        layout = (info.shape[-1], info.type.block_size, ALL)
        parameters[name] = BlockParameter(
            name, info.name, info.shape, info.type.name, packings, release, stored, *layout, info.type
        )
    return Checkpoint(path, config, parameters, tokenizer, defaults, file.paths, [], factors)


def _gguf_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, TensorInfo]:
    """The file's tensor for each of the model's parameters, by Hugging Face's names.

    Raises GGUFError for a tensor that is missing, is not part of the model, has another shape or holds integers.
    """
    shapes = config.parameter_shapes()
    tensors: dict[str, TensorInfo] = {}
    for name, info in file.tensors.items():
        hf_name = to_hf(name)
        if name == ROPE_FACTORS:
            continue
        if hf_name not in shapes:
            raise GGUFError(
                f"{file.path}: tensor {name!r} is not part of a qwen2 model of {config.num_hidden_layers} layers; "
                "convert the model again."
            )
        if info.type.name in ("I8", "I16", "I32", "I64"):
            raise GGUFError(f"{file.path}: tensor {name!r} has type {info.type.name}, which holds no weights.")
        if info.shape != shapes[hf_name]:
            raise GGUFError(
                f"{file.path}: tensor {name!r} has shape {info.shape}, expected {shapes[hf_name]} (rows, columns)."
            )
        tensors[hf_name] = info
    missing = [name for name in shapes if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(f"{file.path}: tensor {to_gguf(missing[0])!r}{more} missing; convert the model again.")
    return {name: tensors[name] for name in shapes}


def _rope_factors(file: GGUFFile, config: ModelConfig) -> np.ndarray | None:
    info = file.tensors.get(ROPE_FACTORS)
    if info is None:
        return None
    if info.shape != (config.head_dim // 2,):
        raise GGUFError(
            f"{file.path}: tensor {info.name!r} has shape {info.shape}, expected {(config.head_dim // 2,)}."
        )
    factors: np.ndarray = blocks.dequantize(file.raw(info.name), info.type)[0]
    return factors


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors


def _open_folder(folder: Path) -> Checkpoint:
    config = ModelConfig.from_folder(folder)
    files = safetensors_files(folder)
    parameters = _folder_parameters(folder, config, read_tensors(files))
    copies = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    for file in copies:
        if not file.is_file():
            raise QwenMLXError(f"{file}: is not a regular file; download the folder again.")
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_fits(config.vocab_size, folder)
    return Checkpoint(folder, config, parameters, tokenizer, folder_defaults(folder), files, copies)


def _folder_parameters(folder: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, Parameter]:
    """The folder's tensors as parameters; QwenMLXError if they are not exactly those of `config`."""
    quantization = read_json(folder / "config.json").get("quantization") or {}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    parameters: dict[str, Parameter] = {}
    for name, shape in config.parameter_shapes().items():
        if name not in tensors:
            raise QwenMLXError(f"{folder}: tensor {name!r} is missing from its safetensors; download it again.")
        parameters[name] = _folder_parameter(folder, name, shape, quantization, tensors)
    if tensors:
        raise QwenMLXError(f"{folder}: tensor {min(tensors)!r} is not part of this model ({len(tensors)} such in all).")
    return parameters


def _folder_parameter(
    folder: Path, name: str, shape: tuple[int, ...], quantization: Any, tensors: dict[str, StoredTensor]
) -> Parameter:
    """One parameter; what it is read from is taken out of `tensors`."""
    module = name.removesuffix(".weight")
    tensor, scales, biases = tensors.pop(name), tensors.get(f"{module}.scales"), tensors.get(f"{module}.biases")
    stored, packing = [tensor], DENSE
    if scales is not None and biases is not None and len(tensor.shape) == 2:
        packing = _affine_packing(quantization, module, folder)
        groups = (shape[0], shape[-1] // packing.group_size)
        if not scales.shape == biases.shape == groups:
            raise QwenMLXError(
                f"{folder}: {module!r} has scales {scales.shape} and biases {biases.shape}, expected {groups} for "
                f"groups of {packing.group_size}."
            )
        stored += [scales, biases]
    elif scales is not None and _is_mxfp4(quantization, module, tensor, scales):
        packing = Packing("mxfp4", 4, 32)
        stored += [scales]
    dtypes = (FLOATS,) if packing == DENSE else (("U32",), ("U8",) if packing.kind == "mxfp4" else FLOATS, FLOATS)
    for array, expected in zip(stored, dtypes):
        if array.dtype not in expected:
            kinds = " or ".join(DTYPES[dtype] for dtype in expected)
            raise QwenMLXError(f"{folder}: tensor {array.name!r} is {DTYPES[array.dtype]}, expected {kinds}.")
    own_shape = tensor.shape if packing == DENSE else (tensor.shape[0], tensor.shape[1] * 32 // packing.bits)
    if own_shape != shape:
        raise QwenMLXError(f"{folder}: tensor {name!r} has shape {own_shape}, expected {shape}.")
    for array in stored[1:]:
        del tensors[array.name]
    if packing == DENSE:
        kind, type_name = _FLOAT_TYPES[tensor.dtype], DTYPES[tensor.dtype]
        raw = tensor.data.reshape(shape[0] if len(shape) == 2 else 1, -1)
        return BlockParameter(name, name, shape, type_name, (), tensor.release, (raw,), shape[-1], 1, ALL, kind)

    def release() -> None:
        for array in stored:
            array.release()

    arrays = tuple(array.array for array in stored)
    layout = (shape[1], packing.group_size, ALL)
    return PackedParameter(name, name, shape, str(packing), (packing,), release, arrays, *layout)


def _is_mxfp4(quantization: Any, module: str, codes: StoredTensor, scales: StoredTensor) -> bool:
    own = quantization.get(module, quantization) if isinstance(quantization, dict) else None
    if not isinstance(own, dict) or own.get("mode") != "mxfp4" or len(codes.shape) != 2:
        return False
    fits = scales.shape == (codes.shape[0], codes.shape[1] // 4)
    return fits and codes.dtype == "U32" and scales.dtype == "U8"


def _affine_packing(quantization: Any, module: str, folder: Path) -> Packing:
    """From mlx-lm's config: `quantization` gives a default and, for each layer, what differs from it."""
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
    return Packing("affine", bits, group_size)
