"""compressed-tensors folders, as llm-compressor writes them: integers of 2, 4 or 8 bits, FP8, NVFP4 and MXFP4.

pack-quantized: weight_packed, int32 (out, in * bits / 32), the lowest bits first, of codes plus 2^(bits - 1);
weight_zero_point, if there is one, is packed likewise along the outputs. int-quantized: weight, int8, and an int8
weight_zero_point. float-quantized: weight, float8_e4m3fn. weight_scale is (out, groups), (out, 1), one number, or a
number a block. nvfp4 and mxfp4: weight_packed, uint8 (out, in / 2), the low four bits first, scales of groups of 16
and 32. Source: compressed_tensors.compressors and compressed_tensors.quantization.lifecycle.forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..safetensors_files import FLOATS
from ..small_floats import E2M1, E8M0
from . import fp8
from .tensors import Tensors
from .weights import IntegerWeights, TableWeights, even_groups, floats, has_exact_products, unpack_words

BITS = (2, 4, 8)
FORMATS = (
    *("dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "pack-quantized"),
)


def check(settings: dict[str, Any], where: str) -> None:
    """Raises QwenMLXError for sparse weights, other formats and numbers of bits, and rotations of activations
    (SpinQuant, QuIP)."""
    sparsity = settings.get("sparsity_config") or {}
    layout = sparsity.get("format", "dense") if isinstance(sparsity, dict) else sparsity
    if layout != "dense":
        raise QwenMLXError(f"{where}: the weights are sparse ({layout!r}), expected dense; take the original model.")
    layout = settings.get("format") or "dense"
    if layout not in FORMATS:
        raise QwenMLXError(
            f"{where}: compressed-tensors' format is {layout!r:.80}, expected one of {', '.join(FORMATS)}; take the "
            "original model or another packing of it."
        )
    groups = settings.get("config_groups")
    if not isinstance(groups, dict | None):
        raise QwenMLXError(
            f"{where}: compressed-tensors' config_groups are {groups!r:.80}, expected an object; download the folder "
            "again."
        )
    for bits in _said_bits(settings):
        if bits not in BITS:
            raise QwenMLXError(
                f"{where}: compressed-tensors' num_bits are {bits!r}, expected 2, 4 or 8; take the original model or "
                "another packing of it."
            )
    transform = settings.get("transform_config") or {}
    try:
        schemes = transform.get("config_groups", {}).values()
        locations = {str(one["location"]) for scheme in schemes for one in scheme["apply"]}
    except (AttributeError, LookupError, TypeError):
        locations = {"nonsense"}
    online = sorted(name for name in locations if not name.startswith("weight_"))  # the weights hold the others already
    if online:
        raise QwenMLXError(
            f"{where}: transform_config rotates activations ({online[0]!r}), expected weights alone; take the original "
            "model or another packing of it."
        )


def _said_bits(settings: dict[str, Any]) -> list[Any]:
    """The numbers of bits of weights that the configuration names."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    return [own["num_bits"] for own in weights if own.get("num_bits") is not None]


def read(
    module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]
) -> IntegerWeights | TableWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    packed, weight = tensors.get(f"{module}.weight_packed"), tensors.get(f"{module}.weight")
    if packed is not None and packed.dtype == "U8":
        return _fp4(module, shape, tensors)
    if packed is not None or f"{module}.weight_shape" in tensors:
        return _packed_integers(module, shape, tensors, _said_bits(settings))
    if weight is not None and weight.dtype == "I8":
        return _bytes(module, shape, tensors)
    return fp8.read(module, shape, tensors, settings)


def _packed_integers(module: str, shape: tuple[int, ...], tensors: Tensors, said_bits: list[Any]) -> IntegerWeights:
    rows, columns = shape
    said = tensors.take(f"{module}.weight_shape", ("I64", "I32"), (2,))
    if tuple(said.array.tolist()) != shape:
        raise QwenMLXError(
            f"{said.file}: tensor {said.name!r} says {tuple(said.array.tolist())}, expected {shape}; download the "
            "folder again."
        )
    sizes = [(rows, columns * bits // 32) for bits in BITS if columns * bits % 32 == 0]
    words = tensors.take(f"{module}.weight_packed", ("I32",), *sizes)
    bits = words.shape[1] * 32 // columns
    if said_bits and bits not in said_bits:
        raise QwenMLXError(
            f"{words.file}: tensor {words.name!r} has codes of {bits} bits, but the configuration says "
            f"{' and '.join(map(str, said_bits))}; download the folder again."
        )
    scales, groups, n_groups = _scales(module, shape, tensors)
    zeros = None
    if f"{module}.weight_zero_point" in tensors:
        zeros = tensors.take(f"{module}.weight_zero_point", ("I32",), (-(-rows * bits // 32), n_groups))
    per_word = 32 // bits

    def scales_and_zeros(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        own = floats(scales, slice(start, stop) if scales.shape[:1] == (rows,) else ...)
        factors = np.broadcast_to(own.reshape(-1, n_groups), (stop - start, n_groups))
        if zeros is None:
            return factors, np.full(factors.shape, 2.0 ** (bits - 1), np.float32)
        first = start // per_word
        points = unpack_words(zeros.array[first : -(-stop // per_word)].T, bits)
        return factors, points[:, start - first * per_word : stop - first * per_word].T.astype(np.float32)

    def codes(start: int, stop: int) -> np.ndarray:
        return unpack_words(words.array[start:stop], bits)

    stored = (words, scales) if zeros is None else (words, scales, zeros)
    kind = f"compressed-tensors, {bits} bits"
    return IntegerWeights(kind, stored, bits, groups, codes, scales_and_zeros, has_exact_products(scales))


def _bytes(module: str, shape: tuple[int, ...], tensors: Tensors) -> IntegerWeights:
    rows, _ = shape
    weight = tensors.take(f"{module}.weight", ("I8",), shape)
    scales, groups, n_groups = _scales(module, shape, tensors)
    zeros = None
    if f"{module}.weight_zero_point" in tensors:
        zeros = tensors.take(f"{module}.weight_zero_point", ("I8",), scales.shape)

    def scales_and_zeros(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = [floats(scales), np.zeros(scales.shape) if zeros is None else zeros.array.astype(np.float32)]
        arrays[1] = (arrays[1] + 128).astype(np.float32)
        factors, points = (np.broadcast_to(a.reshape(-1, n_groups), (rows, n_groups))[start:stop] for a in arrays)
        return factors, points

    def codes(start: int, stop: int) -> np.ndarray:
        return weight.array[start:stop].view(np.uint8) ^ np.uint8(128)

    stored = (weight, scales) if zeros is None else (weight, scales, zeros)
    return IntegerWeights(
        "compressed-tensors, int8", stored, 8, groups, codes, scales_and_zeros, has_exact_products(scales)
    )


def _scales(module: str, shape: tuple[int, ...], tensors: Tensors) -> tuple[Any, np.ndarray, int]:
    """The scales of integers, the group of each column, and the number of groups."""
    rows, columns = shape
    scales = tensors.take(f"{module}.weight_scale", FLOATS)
    n_groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == rows else int(scales.nbytes > 0)
    groups = even_groups(columns, n_groups)
    if groups is None or scales.shape not in ((rows, n_groups), (rows,), (1,), ()):
        raise QwenMLXError(
            f"{scales.file}: tensor {scales.name!r} has shape {scales.shape}, expected ({rows}, groups) with groups of "
            f"equally many of {columns} columns; download the folder again."
        )
    if f"{module}.weight_g_idx" in tensors:
        index = tensors.take(f"{module}.weight_g_idx", ("I32", "I64"), (columns,))
        groups = index.array
        if not 0 <= groups.min() <= groups.max() < n_groups:
            outside = int(groups.min()) if groups.min() < 0 else int(groups.max())
            raise QwenMLXError(
                f"{index.file}: tensor {index.name!r} names group {outside}, expected 0 to {n_groups - 1}; download "
                "the folder again."
            )
    return scales, groups, n_groups


def _fp4(module: str, shape: tuple[int, ...], tensors: Tensors) -> TableWeights:
    rows, columns = shape
    packed = tensors.take(f"{module}.weight_packed", ("U8",), (rows, columns // 2))
    found = tensors.get(f"{module}.weight_scale")
    size = 16 if found is not None and found.dtype == "F8_E4M3" else 32  # NVFP4's groups, MXFP4's
    scales = tensors.take(f"{module}.weight_scale", ("F8_E4M3", "F8_E8M0", "U8"), (rows, columns // size))
    whole = None
    if scales.dtype == "F8_E4M3":
        whole = tensors.take(f"{module}.weight_global_scale", ("F32",), (1,), ())

    def values(start: int, stop: int) -> np.ndarray:
        factors = E8M0[scales.array[start:stop]] if scales.dtype == "U8" else floats(scales, np.s_[start:stop])
        if whole is not None:
            factors = factors / floats(whole).reshape(1, 1)
        groups: np.ndarray = E2M1[unpack_words(packed.array[start:stop], 4)].reshape(stop - start, -1, size)
        groups *= factors[..., None]
        return groups.reshape(stop - start, columns)

    stored = (packed, scales) if whole is None else (packed, scales, whole)
    return TableWeights(f"compressed-tensors, {'MXFP4' if whole is None else 'NVFP4'}", stored, values)
