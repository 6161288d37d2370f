"""GPTQ folders, as AutoGPTQ and GPTQModel write them: 2, 4 or 8 bits, with groups and act-order.

qweight, int32 (in * bits / 32, out), packs codes along the inputs, the lowest bits first; qzeros, int32
(groups, out * bits / 32), along the outputs; scales are (groups, out); g_idx is the group of each input. Format "gptq"
stores each zero point minus one, subtracted from whole words, format "gptq_v2" the zero point itself.
Source: GPTQModel's nn_modules/qlinear/__init__.py and utils/model.py (convert_gptq_v1_to_v2_format_module).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..safetensors_files import FLOATS
from .tensors import Tensors
from .weights import IntegerWeights, check_group_size, even_groups, floats, has_exact_products, unpack_words

BITS = (2, 4, 8)


def check(settings: dict[str, Any], where: str) -> None:
    """Raises QwenMLXError for a layout of GPTQ or a number of bits that is not read here."""
    bits = settings.get("bits", BITS[0])
    if bits not in BITS or isinstance(bits, bool):
        raise QwenMLXError(f"{where}: GPTQ's bits are {bits!r}, expected 2, 4 or 8; take another folder of the model.")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format") or layout not in ("gptq", "gptq_v2"):
        layout = "marlin" if settings.get("is_marlin_format") else layout
        raise QwenMLXError(
            f"{where}: GPTQ's checkpoint_format is {layout!r}, expected 'gptq' or 'gptq_v2'; take another folder of "
            "the model."
        )


def read(module: str, shape: tuple[int, ...], tensors: Tensors, settings: dict[str, Any]) -> IntegerWeights | None:
    """A module's weights; None if the folder does not pack it. Raises QwenMLXError for tensors that do not fit."""
    rows, columns = shape
    if not any(f"{module}.{end}" in tensors for end in ("qweight", "scales")):
        return None
    sizes = [(columns * bits // 32, rows) for bits in BITS if columns * bits % 32 == 0]
    qweight = tensors.take(f"{module}.qweight", ("I32",), *sizes)
    bits = qweight.shape[0] * 32 // columns
    said = settings.get("bits", bits)
    if said != bits and not settings.get("dynamic"):
        raise QwenMLXError(
            f"{qweight.file}: tensor {qweight.name!r} has codes of {bits} bits, but the configuration says {said!r}; "
            "download the folder again."
        )
    scales = tensors.take(f"{module}.scales", FLOATS)
    n_groups = scales.shape[0] if scales.shape[1:] == (rows,) else 0
    groups = even_groups(columns, n_groups)
    if f"{module}.g_idx" in tensors:
        groups = tensors.take(f"{module}.g_idx", ("I32", "I64"), (columns,)).array
        if n_groups and not 0 <= groups.min() <= groups.max() < n_groups:
            outside = int(groups.min()) if groups.min() < 0 else int(groups.max())
            raise QwenMLXError(
                f"{qweight.file}: tensor '{module}.g_idx' names group {outside}, expected 0 to {n_groups - 1}; "
                "download the folder again."
            )
    if groups is None or not n_groups:
        raise QwenMLXError(
            f"{scales.file}: tensor {scales.name!r} has shape {scales.shape}, expected (groups, {rows}) with groups of "
            f"equally many of {columns} columns; download the folder again."
        )
    check_group_size(settings, columns, scales)
    qzeros = tensors.take(f"{module}.qzeros", ("I32",), (n_groups, -(-rows * bits // 32)))
    per_word = 32 // bits
    minus_one = (settings.get("checkpoint_format") or settings.get("format") or "gptq") == "gptq"
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)) if minus_one else 0)

    def codes(start: int, stop: int) -> np.ndarray:
        return unpack_words(qweight.array[:, start:stop].T, bits)

    def scales_and_zeros(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first = start // per_word
        words = qzeros.array[:, first : -(-stop // per_word)].view(np.uint32) + ones
        zeros = unpack_words(words, bits)[:, start - first * per_word : stop - first * per_word]
        return floats(scales, np.s_[:, start:stop]).T, zeros.T.astype(np.float32)

    kind = f"GPTQ, {bits} bits"
    stored = (qweight, scales, qzeros)
    return IntegerWeights(kind, stored, bits, groups, codes, scales_and_zeros, has_exact_products(scales))
