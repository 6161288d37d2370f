"""export(): a model, with its adapters if there are some, becomes one GGUF file, complete or not at all.

Metadata and tensors go through gguf-py's writer, a piece of a tensor at a time. The error of every tensor is measured
against the source's values.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import QwenMLXError, refuse_unknown, refuses_wrong_arguments
from ..gguf.blocks import BlockType, dequantize, threads
from ..gguf.names import ROPE_FACTORS, to_gguf
from ..gguf.quantize import quantize
from ..gguf.reader import GGUFFile
from ..loading import hub
from ..loading.adapters.read import Names
from ..loading.checkpoint import Checkpoint
from ..loading.hub.client import say
from ..loading.parameters import BlockParameter, Parameter, ScaledParameter
from ..loading.safetensors_files import FLOATS
from ..parallel.shards import ALL
from ..text.files import atomic_write, check_folder
from .convert import Progress, merged_checkpoint, naming
from .exact import exact_blocks, exact_type
from .gguf_fields import Fields, add_fields, folder_fields, own_fields
from .mixes import MIXES, TYPES, tensor_type
from .quantize import Cost, Stored, in_order, pieces

KEEP = "keep"
TYPE_NAMES = (*MIXES, KEEP)
QUANTIZATION_VERSION = 2  # of ggml's block types
HEADER_BYTES = 1 << 25  # at most, for the metadata: four times what the largest vocabulary takes


Encoded = tuple[np.ndarray, Cost]  # rows as bytes, uint8 (rows, bytes of a row), and their error


@dataclass(frozen=True)
class Target:
    """A tensor to write. name: in the file. encode(source, kind, start, stop): these rows as blocks of `kind`."""

    name: str
    kind: BlockType
    source: Parameter
    encode: Callable[[Parameter, BlockType, int, int], Encoded]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return math.prod(self.source.shape) // self.kind.block_size * self.kind.type_size


@refuses_wrong_arguments
def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    type: str = "q4_k_m",
    *,
    adapter: Names = None,
    force: bool = False,
    progress: Progress | None = None,
) -> list[Stored]:
    """Writes a GGUF file of a model; returns how each tensor is stored and its error.

        export("folder/", "model.gguf", "q4_k_m")

    source: a GGUF file, a folder of safetensors (dense, MLX's or packed by another library) or a hub id.
    type: "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m" or "q6_k", mixed as llama.cpp mixes them; a tensor that has
        its type already is copied. "keep" changes no value: a GGUF's tensors are copied, and what MLX has packed
        becomes a GGUF type with the same arithmetic.
    adapter: as load()'s, merged in float32.
    force: replace an existing GGUF file.

    The file appears complete or not at all. Raises QwenMLXError (GGUFError for a GGUF) naming the file, the tensor, its
    fault and what was expected.
    """
    refuse_unknown([type], TYPE_NAMES, "type")
    path = hub.resolve(source)
    checkpoint = merged_checkpoint(path, adapter)
    if type == KEEP and checkpoint.adapter_digest:
        raise QwenMLXError("keep changes no value, an adapter does; give another type, such as q4_k_m.")
    _check_target(output, checkpoint, force)
    for note in checkpoint.notes:
        say(note)
    with naming(path):
        if path.is_dir():
            fields = folder_fields(checkpoint, source)
            targets = _exact(checkpoint) if type == KEEP else _mixed(checkpoint, type)
        else:
            file = GGUFFile(path)
            fields = own_fields(file, keep=type == KEEP)
            targets = _copies(file) if type == KEEP else _mixed(checkpoint, type)
    if type != KEEP:
        if not checkpoint.adapter_digest:  # which keep refuses
            _warn_of_requantizing(targets, type)
        fields.values["general.file_type"] = MIXES[type].file_type
        fields.values["general.quantization_version"] = QUANTIZATION_VERSION
    size = sum(target.nbytes for target in targets) + HEADER_BYTES
    free = shutil.disk_usage(os.path.dirname(os.path.realpath(output))).free
    if free < size:
        raise QwenMLXError(f"{output}: needs {size / 1e6:.1f} MB, but {free / 1e6:.1f} MB are free on its disk.")
    with atomic_write(output) as temporary:
        report = _write(temporary, fields, targets, path, progress)
        for stored in checkpoint.files:
            stored.check_unchanged()
    return report


def _check_target(output: str | os.PathLike[str], checkpoint: Checkpoint, force: bool) -> None:
    """Raises QwenMLXError for a file that must not be replaced, or cannot be written."""
    if "\0" in str(output):
        raise QwenMLXError(f"{str(output)!r}: no file can have this name.")
    if os.path.isdir(output):
        raise QwenMLXError(f"{output}: is a folder; give the name of the file to write.")
    check_folder(output, "the output")
    target = Path(os.path.realpath(output))
    if any(target == file.path.resolve() for file in checkpoint.files):
        raise QwenMLXError(f"{output}: is the model to export; give another name.")
    if not target.exists():
        return
    if not force:
        raise QwenMLXError(f"{output}: exists already; give another name, or --force to replace it.")
    with open(target, "rb") as file:
        if file.read(4) != b"GGUF":
            raise QwenMLXError(f"{output}: is not a GGUF file, so --force does not replace it; give another name.")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: what becomes of each


def _mixed(checkpoint: Checkpoint, name: str) -> list[Target]:
    """Every parameter in the type that a mix gives it."""
    targets = []
    for hf_name, parameter in checkpoint.parameters.items():
        kind = tensor_type(MIXES[name], hf_name, parameter.shape, checkpoint.config)
        encode = _copy if _stored_type(parameter) == kind else _quantize
        targets.append(Target(to_gguf(hf_name), kind, parameter, encode))
    if checkpoint.rope_factors is not None:
        targets += [target for target in _copies(GGUFFile(checkpoint.path)) if target.name == ROPE_FACTORS]
    return targets


def _warn_of_requantizing(targets: list[Target], name: str) -> None:
    """Says it where values that were rounded to few bits once are to be rounded to others."""
    rounded = [target for target in targets if target.encode is _quantize and target.kind.name not in FLOATS]
    types = {t.source.type_name for t in rounded if not t.source.stored_dtype} - {"F64", "float64"}
    if types:
        say(
            f"The source is quantized already ({', '.join(sorted(types))}); {name} rounds it again, and both errors "
            "remain. --type keep changes nothing; an unquantized source gives the best file."
        )


def _copies(file: GGUFFile) -> list[Target]:
    """Every tensor of a GGUF as it is."""
    targets = []
    for name, info in file.tensors.items():
        layout = (info.shape[-1], info.type.block_size, ALL, info.type)
        parameter = BlockParameter(name, name, info.shape, info.type.name, (), (file.stored(name),), *layout)
        targets.append(Target(name, info.type, parameter, _copy))
    return targets


def _exact(checkpoint: Checkpoint) -> list[Target]:
    """Every parameter of a folder in a type with the same values; vectors in F32.

    Raises QwenMLXError for one that no type can hold.
    """
    targets = []
    for name, parameter in checkpoint.parameters.items():
        kind, encode = _stored_type(parameter), _copy
        if len(parameter.shape) == 1:
            kind, encode = TYPES["F32"], _quantize
        elif kind is None:
            kind, encode = exact_type(parameter), _express
        if kind is None:
            raise QwenMLXError(
                f"tensor {parameter.source_name!r} ({parameter.type_name}) has no exact form in a GGUF; give another "
                "type than keep, such as q4_k_m or q8_0."
            )
        targets.append(Target(to_gguf(name), kind, parameter, encode))
    return targets


def _stored_type(parameter: Parameter) -> BlockType | None:
    """The type of a parameter whose bytes are whole rows of GGUF blocks or of plain floats, else None."""
    if not isinstance(parameter, BlockParameter) or isinstance(parameter, ScaledParameter) or parameter.columns != ALL:
        return None
    return parameter.kind


def _copy(tensor: Parameter, kind: BlockType, start: int, stop: int) -> Encoded:
    return tensor.stored[0].read(start, stop), Cost()


def _express(tensor: Parameter, kind: BlockType, start: int, stop: int) -> Encoded:
    return exact_blocks(tensor, kind, start, stop), Cost()


def _quantize(tensor: Parameter, kind: BlockType, start: int, stop: int) -> Encoded:
    values, cost = tensor.values(start, stop), Cost()
    if not np.isfinite(values).all():
        raise QwenMLXError(
            f"tensor {tensor.source_name!r} ({tensor.type_name}) holds values that are not finite: the file is "
            "damaged, download it again."
        )
    raw = quantize(values, kind)
    stored = dequantize(raw, kind)
    if not np.isfinite(stored).all():
        raise QwenMLXError(
            f"tensor {tensor.source_name!r} ({tensor.type_name}) holds {np.abs(values).max():g}, too much for "
            f"{kind.name}; give --type bf16."
        )
    cost.compare(values, stored)
    return raw, cost


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write(path: Path, fields: Fields, targets: list[Target], source: Path, progress: Progress | None) -> list[Stored]:
    """Writes a GGUF file by gguf-py's writer, the tensors' bytes in pieces as they are made."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "qwen2")
    try:
        add_fields(writer, fields)
        for target in targets:
            kind = GGMLQuantizationType(target.kind.type_id)
            writer.add_tensor_info(target.name, target.source.shape, np.dtype("f4"), target.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file: BinaryIO = writer.fout[0]  # type: ignore[index]
        writer.write_padding(file, file.tell())
        report: list[Stored] = []
        done, total = 0, sum(target.source.nbytes for target in targets)
        with ThreadPoolExecutor(threads()) as pool:
            for target in targets:
                with naming(source):
                    report.append(_store(target, file, pool))
                writer.write_padding(file, target.nbytes)
                done += target.source.nbytes
                if progress:
                    progress(len(report), len(targets), done, total)
    finally:
        writer.close()
    return report


def _store(target: Target, file: BinaryIO, pool: ThreadPoolExecutor) -> Stored:
    """Writes one tensor in pieces of some rows, encoded by the pool's threads, and measures its error."""
    tensor, cost = target.source, Cost()
    jobs = (lambda a=a, b=b: target.encode(tensor, target.kind, a, b) for a, b in pieces(tensor))
    for raw, piece_cost in in_order(pool, jobs):
        file.write(np.ascontiguousarray(raw).data)
        cost += piece_cost
    tensor.release()
    shape, size = tensor.shape, target.nbytes
    types = (tensor.type_name, target.kind.name)
    return Stored(target.name, tensor.source_name, *types, shape, size, cost.relative_l2, cost.max_abs, cost.not_finite)
