"""The tensors of a folder of safetensors as parameters: dense, packed by mlx-lm, or by another library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import QwenMLXError, shortened
from ..gguf.blocks import BLOCK_TYPES
from ..gguf.packing import Packing
from ..model.config import ModelConfig
from ..parallel.shards import ALL
from ..text.files import read_json
from . import variants
from .packings import ForeignParameter, Method, Tensors, find_method
from .parameters import BlockParameter, PackedParameter, Parameter
from .safetensors_files import DTYPES, FLOATS, NUMPY, StoredTensor

_FLOAT_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.name in (*FLOATS, "F64")}
# mlx-lm's modes: bits and group size; the scales are uint8, and there are no biases.
_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
# Heads of question answering and of trainers that score with them.
_OTHER_HEADS = ("qa_outputs.", "classifier.", "classification_head.", "reward_head.", "regression_head.")
_AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Contents:
    """A folder's model: its configuration as the tensors show it, its parameters, those of a classification or reward
    head, and sentences about what became of the rest."""

    config: ModelConfig
    parameters: dict[str, Parameter]
    score: dict[str, Parameter]
    notes: list[str]
    has_language_head: bool


def folder_contents(folder: Path, config: ModelConfig, stored: dict[str, StoredTensor]) -> Contents:
    """The tensors of a folder as what they are in the model.

    Raises QwenMLXError if the tensors are not exactly those of a Qwen2.
    """
    tensors, method = Tensors(folder, variants.with_plain_names(stored)), find_method(folder)
    quantization = read_json(folder / "config.json").get("quantization") or {}
    config, notes, headless = variants.fit(folder, config, tensors, variants.is_bare(folder, stored))
    shapes = config.parameter_shapes()
    missing = variants.missing_biases(config, tensors)
    modules = {name.rpartition(".")[0] for name in tensors}
    modules = {module for module in modules if module.rpartition(".")[2] in variants.FUSED}

    def read(name: str, shape: tuple[int, ...]) -> Parameter:
        foreign = method.parameter(name, shape, tensors) if method else None
        return foreign or _parameter(folder, name, shape, quantization, tensors)

    parameters: dict[str, Parameter] = {}
    fused: dict[str, Parameter] = {}
    for name, shape in shapes.items():
        whole = variants.fused_part(name, shapes)
        if name in missing:
            parameters[name] = variants.zeros(name, shape)
        elif whole and (whole[0] in fused or whole[0].rpartition(".")[0] in modules):
            fused_name, fused_shape, rows = whole
            if fused_name not in fused:
                fused[fused_name] = read(fused_name, fused_shape)
            parameters[name] = variants.part_of_fused(fused[fused_name], name, rows)
        else:
            parameters[name] = read(name, shape)
    heads = [name for name in tensors if name.startswith("score.")]
    score: dict[str, Parameter] = {}
    for name in sorted(heads):
        tensor = tensors.get(name)
        if tensor is not None and len(tensor.shape) in (1, 2) and tensor.nbytes:
            score[name] = _parameter(folder, name, tensor.shape, {}, tensors)
    notes += _packing_notes(folder, method, parameters, tensors) if method else []
    left = list(tensors)
    if left:
        head = ", but of a head that is not computed here" if min(left).startswith(_OTHER_HEADS) else ""
        raise QwenMLXError(f"{folder}: tensor {min(left)!r} is not part of this model{head} ({len(left)} such in all).")
    return Contents(config, parameters, score, notes, not headless and not score)


def plain_parameters(
    folder: Path, stored: dict[str, StoredTensor], shapes: dict[str, tuple[int, ...]], prefix: str
) -> dict[str, Parameter]:
    """Dense parameters of other modules than the model's, under `prefix`. Raises QwenMLXError as folder_contents()."""
    tensors = Tensors(folder, stored)
    parameters = [_parameter(folder, name, shape, {}, tensors) for name, shape in shapes.items()]
    if left := list(tensors):
        raise QwenMLXError(f"{folder}: tensor {min(left)!r} is not part of the projection; download the folder again.")
    return {f"{prefix}.{p.name}": replace(p, name=f"{prefix}.{p.name}") for p in parameters}


def _packing_notes(folder: Path, method: Method, parameters: dict[str, Parameter], tensors: Tensors) -> list[str]:
    """Sentences about packed matrices that MLX cannot express, and about activations that would be quantized."""
    packed = [parameter for parameter in parameters.values() if isinstance(parameter, ForeignParameter)]
    dense = [parameter for parameter in packed if not parameter.packings]
    notes = []
    if dense:
        kinds = ", ".join(sorted({parameter.type_name for parameter in dense}))
        notes.append(
            f"{folder}: MLX cannot express {len(dense)} of {len(packed)} packed matrices ({kinds}); they become dense"
        )
    if method.unknown_settings:
        names = shortened(", ".join(method.unknown_settings), 80)
        notes.append(f"{folder}: left out of quantization_config, because it is not known here: {names}")
    if method.drop_activations([parameter.name.removesuffix(".weight") for parameter in packed], tensors):
        notes.append(f"{folder}: the model was made for quantized activations; here only its weights are quantized")
    return notes


def _parameter(folder: Path, name: str, shape: tuple[int, ...], quantization: Any, tensors: Tensors) -> Parameter:
    """A parameter that is dense or packed by mlx-lm; what it is read from is taken out of `tensors`."""
    module = name.removesuffix(".weight")
    if f"{module}.scales" in tensors and len(shape) == 2:
        return _packed_by_mlx(folder, module, shape, quantization, tensors)
    found = tensors.get(name)
    if found is not None and found.dtype not in _FLOAT_TYPES:
        raise QwenMLXError(
            f"{found.file}: tensor {name!r} has dtype {found.dtype}, expected BF16, F16 or F32; save the model so."
        )
    if found is not None and found.shape != shape:
        raise QwenMLXError(f"{folder}: tensor {name!r} has shape {found.shape}, expected {shape}.")
    tensor = tensors.take(name, (*FLOATS, "F64"))
    kind, type_name = _FLOAT_TYPES[tensor.dtype], DTYPES[tensor.dtype]
    raw = tensor.rows("u1", shape[0] if len(shape) == 2 else 1)
    return BlockParameter(name, tensor.name, shape, type_name, (), (raw,), shape[-1], 1, ALL, kind)


def _packed_by_mlx(
    folder: Path, module: str, shape: tuple[int, ...], quantization: Any, tensors: Tensors
) -> PackedParameter:
    rows, columns = shape
    packing = _mlx_packing(quantization, module, folder)
    affine = packing.kind == "affine"
    groups = (rows, columns // packing.group_size)
    stored = [tensors.take(f"{module}.weight", ("U32",), (rows, columns * packing.bits // 32))]
    for kind in ("scales", "biases") if affine else ("scales",):
        stored.append(tensors.take(f"{module}.{kind}", FLOATS if affine else ("U8",), groups))
    matrices = tuple(tensor.rows(NUMPY[tensor.dtype], rows) for tensor in stored)
    exact = (packing,) if packing.kind == "mxfp4" or (affine and packing.bits > 1) else ()
    layout = (columns, packing.group_size, ALL)
    name = f"{module}.weight"
    return PackedParameter(name, stored[0].name, shape, str(packing), exact, matrices, *layout)


def _mlx_packing(quantization: Any, module: str, folder: Path) -> Packing:
    """From mlx-lm's config: `quantization` gives a default and, for each layer, what differs from it."""
    if not isinstance(quantization, dict):
        raise QwenMLXError(f"{folder}: config.json's 'quantization' is {quantization!r}, expected an object.")
    own = quantization.get(module)
    settings = own if isinstance(own, dict) else quantization
    mode, group_size, bits = settings.get("mode", "affine"), settings.get("group_size"), settings.get("bits")
    if mode == "affine" and group_size in (32, 64, 128) and bits in _AFFINE_BITS:
        return Packing("affine", bits, group_size)
    if isinstance(mode, str) and mode in _MODES and _MODES[mode] == (bits or _MODES[mode][0], group_size):
        return Packing(mode, *_MODES[mode])
    raise QwenMLXError(
        f"{folder}: {module!r} is packed, but config.json's 'quantization' says {settings!r} for it, expected "
        f"'group_size' 32, 64 or 128 and 'bits' 1 to 6 or 8 in affine mode, or mode {', '.join(_MODES)}."
    )
