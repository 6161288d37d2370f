"""bitsandbytes folders: NF4 and FP4 in blocks, with scales in float32 or quantized themselves, and LLM.int8.

4 bits: weight, uint8 (elements / 2, 1), the high four bits first, indexes quant_map; its bytes may be stored as those
of floats (bnb_4bit_quant_storage). Every `blocksize` elements share an absmax. A nested absmax is uint8, an index into
nested_quant_map times nested_absmax of its block, plus nested_offset. The settings are JSON, as bytes, in
weight.quant_state.bitsandbytes__nf4 (or fp4). 8 bits: weight, int8, times SCB / 127, a number a row.
Source: bitsandbytes.functional (QuantState, dequantize_4bit, dequantize_blockwise) and backends/default/ops.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..safetensors_files import FLOATS, StoredTensor
from .tensors import Tensors
from .weights import TableWeights, floats

KINDS = ("nf4", "fp4")
STATE = "quant_state.bitsandbytes__"  # and then the kind


def check(settings: dict[str, Any], where: str) -> None:
    """Accepts every setting: the tensors say which of the two packings a matrix has."""


def read(module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]) -> TableWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    weight = tensors.get(f"{module}.weight")
    states = [f"{module}.weight.{STATE}{kind}" for kind in KINDS]
    if weight is not None and (weight.dtype == "U8" or any(name in tensors for name in states)):
        return _four_bits(module, shape, tensors)
    return _eight_bits(module, shape, tensors) if weight is not None and weight.dtype == "I8" else None


def _eight_bits(module: str, shape: tuple[int, ...], tensors: Tensors) -> TableWeights:
    weight = tensors.take(f"{module}.weight", ("I8",), shape)
    largest = tensors.take(f"{module}.SCB", ("F32",), (shape[0],))
    if f"{module}.weight_format" in tensors:
        layout = tensors.take(f"{module}.weight_format", ("U8",), (), (1,))
        if layout.array.any():
            raise QwenMLXError(
                f"{layout.file}: tensor {layout.name!r} is {int(layout.array.max())}, expected 0 (rows); save the "
                "model again with a newer bitsandbytes."
            )

    def values(start: int, stop: int) -> np.ndarray:
        scales = largest.array[start:stop, None] / np.float32(127)
        return weight.array[start:stop].astype(np.float32) * scales

    return TableWeights("bitsandbytes, int8", (weight, largest), values)


def _four_bits(module: str, shape: tuple[int, ...], tensors: Tensors) -> TableWeights:
    rows, columns = shape
    name = f"{module}.weight"
    state, kind = _state(name, tensors)
    size = _integer(state, "blocksize", name, tensors)
    if state.get("shape") != [rows, columns]:
        raise QwenMLXError(
            f"{tensors.folder}: the quant_state of {name!r} says shape {state.get('shape')!r}, expected "
            f"{[rows, columns]}; download the folder again."
        )
    n_bytes = -(-rows * columns // 2)
    sizes = {"U8": n_bytes, "F16": n_bytes // 2, "BF16": n_bytes // 2, "F32": n_bytes // 4}
    found = tensors.get(name)
    weight = tensors.take(name, tuple(sizes), (sizes.get(found.dtype if found else "", n_bytes), 1))
    n_blocks = -(-rows * columns // size)
    table = tensors.take(f"{name}.quant_map", ("F32",), (16,))
    absmax = tensors.take(f"{name}.absmax", ("U8", *FLOATS), (n_blocks,))
    stored: tuple[StoredTensor, ...] = (weight, absmax, table)
    nested: tuple[StoredTensor, ...] = ()
    nested_size, offset = 1, np.float32(0)
    if absmax.dtype == "U8":
        nested_size = _integer(state, "nested_blocksize", name, tensors)
        value = state.get("nested_offset")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise QwenMLXError(
                f"{tensors.folder}: the quant_state of {name!r} has nested_offset {value!r}, expected a number; "
                "download the folder again."
            )
        offset = np.float32(value)
        nested = (
            tensors.take(f"{name}.nested_absmax", ("F32",), (-(-n_blocks // nested_size),)),
            tensors.take(f"{name}.nested_quant_map", ("F32",), (256,)),
        )

    def values(start: int, stop: int) -> np.ndarray:
        first, last = start * columns, stop * columns
        pairs = weight.read(first // 2, -(-last // 2))
        codes = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()[first % 2 : first % 2 + last - first]
        number = np.arange(first // size, -(-last // size))
        scales = absmax.array[number] if nested else floats(absmax)[number]
        if nested:
            scales = nested[1].array[scales] * nested[0].array[number // nested_size] + offset
        left = first - first // size * size
        each = np.repeat(scales, size)[left : left + last - first]
        product: np.ndarray = table.array[codes] * each
        return product.reshape(stop - start, columns)

    return TableWeights(f"bitsandbytes, {kind.upper()}", stored + nested, values)


def _state(name: str, tensors: Tensors) -> tuple[dict[str, Any], str]:
    """The settings of a matrix of 4 bits, and "nf4" or "fp4"."""
    for kind in KINDS:
        key = f"{name}.{STATE}{kind}"
        if key in tensors:
            tensor = tensors.take(key, ("U8",))
            try:
                state = json.loads(tensor.read().tobytes())
            except (ValueError, RecursionError):
                state = None
            if not isinstance(state, dict):
                raise QwenMLXError(
                    f"{tensor.file}: tensor {key!r} is not a JSON object; the file is damaged, download it again."
                )
            return state, kind
    raise QwenMLXError(
        f"{tensors.folder}: tensor '{name}.quant_state.bitsandbytes__nf4' (or __fp4) is missing; download the folder "
        "again."
    )


def _integer(state: dict[str, Any], key: str, name: str, tensors: Tensors) -> int:
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
        raise QwenMLXError(
            f"{tensors.folder}: the quant_state of {name!r} has {key} {value!r}, expected a positive integer; download "
            "the folder again."
        )
    return value
