"""Codes and scales become GGUF blocks: the inverse of unpack.py, for the types that can be written.

Codes are uint8 in the order of the weights, one row a block; scales and minima of a block are fp16 numbers.
Source: the block layouts of ggml's ggml-common.h.
"""

from __future__ import annotations

import numpy as np


def legacy_blocks(bits: int, codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None = None) -> np.ndarray:
    """Q4_0, Q4_1, Q5_0 or Q5_1 blocks, uint8 (n, bytes), of codes (n, 32) of 4 or 5 bits.

    scale: (n,); minimum: (n,) for Q4_1 and Q5_1, None for the types whose codes have a fixed offset.
    """
    parts = [_half(scale), *([] if minimum is None else [_half(minimum)])]
    if bits == 5:
        parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
    low = codes & 0x0F
    return np.concatenate([*parts, low[:, :16] | low[:, 16:] << 4], axis=1)


def q8_0_blocks(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Q8_0 blocks, uint8 (n, 34), of codes (n, 32) that are 128 above the signed bytes, and scales (n,)."""
    return np.concatenate([_half(scale), codes ^ 0x80], axis=1)


def mxfp4_blocks(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """MXFP4 blocks, uint8 (n, 17), of E2M1 codes (n, 32) and E8M0 scales (n,)."""
    return np.concatenate([scale[:, None], codes[:, :16] | codes[:, 16:] << 4], axis=1)


def affine_k_blocks(
    bits: int, codes: np.ndarray, d: np.ndarray, d_min: np.ndarray, scales: np.ndarray, minima: np.ndarray
) -> np.ndarray:
    """Q4_K or Q5_K blocks, uint8 (n, bytes), of codes (n, 256) of 4 or 5 bits.

    A weight is d * scale * code - d_min * minimum; d, d_min: (n,); scales, minima: uint8 (n, 8), below 64.
    """
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    mixed = (scales[:, 4:] & 0x0F) | (minima[:, 4:] & 0x0F) << 4
    parts = [_half(d), _half(d_min), first, second, mixed]
    groups = codes.reshape(-1, 8, 32)
    if bits == 5:
        parts.append(np.packbits(groups >> 4, axis=1, bitorder="little").reshape(-1, 32))
    low = groups & 0x0F
    parts.append((low[:, 0::2] | low[:, 1::2] << 4).reshape(-1, 128))
    return np.concatenate(parts, axis=1)


def q6_k_blocks(codes: np.ndarray, d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Q6_K blocks, uint8 (n, 210), of codes (n, 256) below 64: a weight is d * scale * (code - 32).

    d: (n,); scales: int8 (n, 16).
    """
    halves = codes.reshape(-1, 2, 4, 32)
    low = halves & 0x0F
    low = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    high = halves >> 4
    high = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([low, high, scales.view(np.uint8), _half(d)], axis=1)


def _half(values: np.ndarray) -> np.ndarray:
    """fp16 numbers as bytes, uint8 (n, 2)."""
    return np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(-1, 2)
