"""AWQ folders, as AutoAWQ writes them in version "gemm": 4 bits with a zero point a group.

qweight, int32 (in, out / 8), and qzeros, int32 (groups, out / 8), pack eight outputs a word; the i-th four bits, the
lowest first, are those of output 8 * word + ORDER[i]. scales are (groups, out).
Source: AutoAWQ's awq/utils/packing_utils.py (unpack_awq, reverse_awq_order, dequantize_gemm).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..safetensors_files import FLOATS
from .tensors import Tensors
from .weights import IntegerWeights, check_group_size, even_groups, floats, has_exact_products, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = [ORDER.index(output) for output in range(8)]


def check(settings: dict[str, Any], where: str) -> None:
    """Raises QwenMLXError for a layout or a number of bits that is not read here."""
    layout = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
    if layout.lower() != "gemm":
        raise QwenMLXError(f"{where}: AWQ's version is {layout!r}, expected 'gemm'; take another folder of the model.")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise QwenMLXError(f"{where}: AWQ's bits are {bits!r}, expected 4; take another folder of the model.")


def read(module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]) -> IntegerWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    rows, columns = shape
    if not any(f"{module}.{end}" in tensors for end in ("qweight", "scales")):
        return None
    qweight = tensors.take(f"{module}.qweight", ("I32",), (columns, rows // 8))
    scales = tensors.take(f"{module}.scales", FLOATS)
    groups = even_groups(columns, scales.shape[0] if scales.shape[1:] == (rows,) else 0)
    if groups is None:
        raise QwenMLXError(
            f"{scales.file}: tensor {scales.name!r} has shape {scales.shape}, expected (groups, {rows}) with groups of "
            f"equally many of {columns} columns; download the folder again."
        )
    check_group_size(settings, columns, scales)
    qzeros = tensors.take(f"{module}.qzeros", ("I32",), (scales.shape[0], rows // 8))

    def outputs(words: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Codes of the outputs start to stop, uint8 (outputs, rows of words)."""
        first = start // 8
        codes = unpack_words(words[:, first : -(-stop // 8)], 4).reshape(len(words), -1, 8)[..., PLACES]
        return codes.reshape(len(words), -1)[:, start - 8 * first : stop - 8 * first].T

    def scales_and_zeros(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return floats(scales, np.s_[:, start:stop]).T, outputs(qzeros.array, start, stop).astype(np.float32)

    def codes(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(outputs(qweight.array, start, stop))

    stored = (qweight, scales, qzeros)
    return IntegerWeights("AWQ, 4 bits", stored, 4, groups, codes, scales_and_zeros, has_exact_products(scales))
