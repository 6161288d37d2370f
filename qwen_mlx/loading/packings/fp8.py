"""Weights in float8_e4m3fn with one scale for all, for each row, or for each block of rows and columns.

The scale multiplies; its name is weight_scale_inv in DeepSeek's and transformers' "fp8", weight_scale in fbgemm's,
compressed-tensors' and ModelOpt's. Source: transformers' integrations/finegrained_fp8.py and fbgemm_fp8.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..safetensors_files import FLOATS
from ..small_floats import E4M3
from .tensors import Tensors
from .weights import TableWeights, floats


def check(settings: dict[str, Any], where: str) -> None:
    """Raises QwenMLXError for ModelOpt's other algorithms."""
    algorithm = settings.get("quant_algo", "FP8")
    if algorithm != "FP8":
        raise QwenMLXError(f"{where}: quant_algo is {algorithm!r}, expected 'FP8'; take the original model.")


def read(module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]) -> TableWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    rows, columns = shape
    found = tensors.get(f"{module}.weight")
    if found is None or found.dtype != "F8_E4M3":
        return None
    weight = tensors.take(f"{module}.weight", ("F8_E4M3",), shape)
    name = f"{module}.weight_scale_inv"
    scales = tensors.take(name if name in tensors else f"{module}.weight_scale", (*FLOATS, "F8_E8M0"))
    block = _block(settings, rows, columns, tensors)
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    if scales.shape not in (blocks, (rows, 1), (rows,), (1,), (1, 1), ()):
        raise QwenMLXError(
            f"{scales.file}: tensor {scales.name!r} has shape {scales.shape}, expected {blocks}, ({rows}, 1) or one "
            "number; download the folder again."
        )
    by_block = scales.shape == blocks and blocks != (1, 1)

    def values(start: int, stop: int) -> np.ndarray:
        if by_block:
            factors = np.repeat(floats(scales, np.arange(start, stop) // block[0]), block[1], axis=1)[:, :columns]
        elif scales.shape[:1] == (rows,):
            factors = floats(scales, slice(start, stop)).reshape(-1, 1)
        else:
            factors = floats(scales)
        with np.errstate(all="ignore"):
            product: np.ndarray = E4M3[weight.array[start:stop]] * factors
        return product

    return TableWeights("FP8", (weight, scales), values)


def _block(settings: dict[str, Any], rows: int, columns: int, tensors: Tensors) -> tuple[int, int]:
    """The rows and columns that share a scale: the whole matrix where the settings name no block."""
    sizes = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if sizes is None and isinstance(groups, dict):
        arguments = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        blocks = [own.get("block_structure") for own in arguments if isinstance(own, dict)]
        sizes = next((block for block in blocks if block is not None), None)
    if sizes is None:
        return rows, columns
    try:
        height, width = (int(size) for size in sizes)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise QwenMLXError(
            f"{tensors.folder}: config.json's weight_block_size is {sizes!r}, expected two positive integers; download "
            "the folder again."
        )
    return height, width
