"""Bit unpacking: GGUF blocks become codes of one byte in the order of the weights, with a scale a group.

Every format here is w = scale * (code - offset) + minimum, with one scale (and minimum) for each group of consecutive
weights. Words of 64 bits carry eight codes at once, and every operation is one numpy call over all blocks of a chunk.
Source: the block layouts of ggml's ggml-common.h; the order of operations is gguf-py's (quants.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Groups = np.ndarray  # (blocks, groups of a block) float32
Decoder = Callable[[np.ndarray, np.ndarray], tuple[Groups, "Groups | None"]]

_LOW4 = np.uint64(0x0F0F0F0F0F0F0F0F)
_LOW2 = np.uint64(0x0303030303030303)
_LOW1 = np.uint64(0x0101010101010101)
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int16)
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int16)  # twice E2M1's values
_IQ4_CODES = (_IQ4_VALUES + 128).astype(np.uint8)
_MXFP4_CODES = (_MXFP4_VALUES + 12).astype(np.uint8)
# Bit i of a byte becomes byte i of a word, as 0 or 16: the fifth bit of eight codes.
_FIFTH_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.uint64).ravel()
_FIFTH_BITS = _FIFTH_BITS << np.uint64(4)


def _words(blocks: np.ndarray, start: int, stop: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start:stop]).view(np.uint64)


def _half(blocks: np.ndarray, start: int) -> Groups:
    """The fp16 number at byte `start` of each block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(words: np.ndarray, codes: np.ndarray) -> None:
    """words (blocks, 2): the low nibbles are weights 0 to 15, the high ones 16 to 31."""
    out = codes.view(np.uint64)
    for column in range(2):
        np.bitwise_and(words[:, column], _LOW4, out=out[:, column])
        np.bitwise_and(words[:, column] >> np.uint64(4), _LOW4, out=out[:, column + 2])


def _fifth_bits(blocks: np.ndarray, start: int, codes: np.ndarray) -> None:
    out = codes.view(np.uint64)
    for column in range(4):
        out[:, column] |= _FIFTH_BITS.take(blocks[:, start + column])


def _q4_0(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _nibbles(_words(blocks, 2, 18), codes)
    return _half(blocks, 0), None


def _q4_1(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, Groups]:
    _nibbles(_words(blocks, 4, 20), codes)
    return _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _nibbles(_words(blocks, 6, 22), codes)
    _fifth_bits(blocks, 2, codes)
    return _half(blocks, 0), None


def _q5_1(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, Groups]:
    _nibbles(_words(blocks, 8, 24), codes)
    _fifth_bits(blocks, 4, codes)
    return _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    np.bitwise_xor(_words(blocks, 2, 34), np.uint64(0x8080808080808080), out=codes.view(np.uint64))  # int8 + 128
    return _half(blocks, 0), None


def _pairs(words: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """words (blocks, 8): two bits a code; each half of a block has 32 bytes whose bit pairs are 32 weights apart.

    Returns the codes as words (blocks, 8, 4), 32 weights a row.
    """
    out = codes.view(np.uint64).reshape(-1, 2, 4, 4)
    words = words.reshape(-1, 2, 4)
    for pair in range(4):
        np.bitwise_and(words >> np.uint64(2 * pair), _LOW2, out=out[:, :, pair])
    return out.reshape(-1, 8, 4)


def _add_bits(words: np.ndarray, out: np.ndarray, place: int) -> None:
    """words (blocks, 4): bit i of each byte is bit `place` of the codes of out[:, i], (blocks, 8, 4)."""
    for bit in range(8):
        out[:, bit] |= ((words >> np.uint64(bit)) & _LOW1) << np.uint64(place)


def _q2_k(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, Groups]:
    _pairs(_words(blocks, 16, 80), codes)
    packed = blocks[:, :16]
    scale = _half(blocks, 80) * (packed & 0x0F).astype(np.float32)
    return scale, _half(blocks, 82) * -(packed >> 4).astype(np.float32)


def _q3_k(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _add_bits(_words(blocks, 0, 32), _pairs(_words(blocks, 32, 96), codes), 2)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate([low & 0x0F, low >> 4], axis=1)
    for pair in range(4):
        scales[:, 4 * pair : 4 * pair + 4] |= ((high >> (2 * pair)) & 0x03) << 4
    return _half(blocks, 108) * (scales - np.uint8(32)).view(np.int8).astype(np.float32), None


def _six_bit_scales(blocks: np.ndarray) -> tuple[Groups, Groups]:
    """The 8 scales and 8 minima of Q4_K and Q5_K: d, dmin (fp16), then 12 bytes of six-bit numbers."""
    first, second, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * -minima.astype(np.float32)


def _k_nibbles(words: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """words (blocks, 16): each 32 bytes hold 32 weights in the low nibbles, then 32 in the high ones."""
    out = codes.view(np.uint64).reshape(-1, 4, 2, 4)
    words = words.reshape(-1, 4, 4)
    np.bitwise_and(words, _LOW4, out=out[:, :, 0])
    np.bitwise_and(words >> np.uint64(4), _LOW4, out=out[:, :, 1])
    return out.reshape(-1, 8, 4)


def _q4_k(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, Groups]:
    _k_nibbles(_words(blocks, 16, 144), codes)
    return _six_bit_scales(blocks)


def _q5_k(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, Groups]:
    _add_bits(_words(blocks, 16, 48), _k_nibbles(_words(blocks, 48, 176), codes), 4)
    return _six_bit_scales(blocks)


def _q6_k(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    out = codes.view(np.uint64).reshape(-1, 2, 2, 8)
    low = _words(blocks, 0, 128).reshape(-1, 2, 8)
    np.bitwise_and(low, _LOW4, out=out[:, :, 0])
    np.bitwise_and(low >> np.uint64(4), _LOW4, out=out[:, :, 1])
    high = _words(blocks, 128, 192).reshape(-1, 2, 4)
    out = out.reshape(-1, 2, 4, 4)
    for pair in range(4):
        out[:, :, pair] |= ((high >> np.uint64(2 * pair)) & _LOW2) << np.uint64(4)
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _iq4_nl(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _nibbles(_words(blocks, 2, 18), codes)
    np.take(_IQ4_CODES, codes, out=codes, mode="clip")
    return _half(blocks, 0), None


def _iq4_xs(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _nibbles(_words(blocks, 8, 136).reshape(-1, 2), codes.reshape(-1, 32))
    np.take(_IQ4_CODES, codes, out=codes, mode="clip")
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    scales = np.empty((len(blocks), 8), np.uint8)
    scales[:, 0::2], scales[:, 1::2] = low & 0x0F, low >> 4
    for group in range(8):
        scales[:, group] |= ((high[:, group // 4] >> (2 * (group % 4))) & 0x03) << 4
    return _half(blocks, 0) * (scales - np.uint8(32)).view(np.int8).astype(np.float32), None


def _mxfp4(blocks: np.ndarray, codes: np.ndarray) -> tuple[Groups, None]:
    _nibbles(_words(blocks, 1, 17), codes)
    np.take(_MXFP4_CODES, codes, out=codes, mode="clip")
    exponent = blocks[:, :1].astype(np.uint32)  # the scale is 2^(exponent - 128): half of E8M0, as values are doubled
    bits = np.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23).astype(np.uint32)
    return bits.view(np.float32), None


def mxfp4_codes(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 codes (blocks, 32) uint8 in the order of the weights, and E8M0 scales (blocks, 1) uint8."""
    codes = np.empty((len(blocks), 32), np.uint8)
    _nibbles(_words(blocks, 1, 17), codes)
    return codes, blocks[:, :1]


@dataclass(frozen=True)
class Format:
    """decode(blocks uint8 (n, type_size), codes uint8 (n, block_size) to be filled) -> (scale, minimum or None).

    Both are float32 (n, block_size // group); minimum None stands for no addition at all. `offset`: see above.
    """

    decode: Decoder
    offset: int
    group: int


FORMATS = {
    "Q4_0": Format(_q4_0, 8, 32),
    "Q4_1": Format(_q4_1, 0, 32),
    "Q5_0": Format(_q5_0, 16, 32),
    "Q5_1": Format(_q5_1, 0, 32),
    "Q8_0": Format(_q8_0, 128, 32),
    "Q2_K": Format(_q2_k, 0, 16),
    "Q3_K": Format(_q3_k, 4, 16),
    "Q4_K": Format(_q4_k, 0, 32),
    "Q5_K": Format(_q5_k, 0, 32),
    "Q6_K": Format(_q6_k, 32, 16),
    "IQ4_NL": Format(_iq4_nl, 128, 32),
    "IQ4_XS": Format(_iq4_xs, 128, 32),
    "MXFP4": Format(_mxfp4, 12, 32),
}


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one byte, uint8 (n, m), m a multiple of 32, as MLX packs them: uint32 (n, m * bits / 32).

    That is one contiguous stream of bits, the lowest first.
    """
    if bits == 8:
        return codes.view(np.uint32)
    words = codes.view(np.uint64)
    for lane in (8, 16, 32):  # join neighbouring lanes: 8 codes of a word end up in its lowest 8 * bits bits
        width = bits * lane // 8
        low = sum(((1 << width) - 1) << shift for shift in range(0, 64, 2 * lane))
        words = (words & np.uint64(low)) | ((words >> np.uint64(lane - width)) & np.uint64(low << width))
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(stream).reshape(len(codes), -1).view(np.uint32)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of pack: uint32 (n, m * bits / 32) to codes of one byte, uint8 (n, m)."""
    words = np.zeros((packed.nbytes // bits, 8), np.uint8)
    words[:, :bits] = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, bits)
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes: np.ndarray = (words.view(np.uint64) >> shifts) & np.uint64(2**bits - 1)
    return codes.astype(np.uint8).reshape(len(packed), -1)


def mxfp4_values(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 values (n, m) of MLX's form of MXFP4: codes uint32 (n, m / 8), E8M0 scales uint8 (n, m / 32); a scale of
    255 is NaN, as in the OCP specification."""
    doubled = _MXFP4_VALUES.astype(np.float32)[unpack(packed, 4)].reshape(*scales.shape, 32)
    halves = np.where(scales == 255, np.float32(np.nan), np.ldexp(np.float32(1), scales.astype(np.int32) - 128))
    with np.errstate(all="ignore"):
        values: np.ndarray = doubled * halves[..., None]
    return values.reshape(len(packed), -1)
