"""Random blocks of every GGUF type, gguf-py's values of them, and comparisons by bits."""

from __future__ import annotations

import gguf
import numpy as np

from qwen_mlx.gguf.blocks import BlockType

ROUNDED_DATA = {
    "F64": "<f8",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
}  # gguf-py has no dequantize for these
# Where the fp16 scales (and minima) of a block lie, in bytes: from ggml-common.h.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
SCALES = {  # fp16 bit patterns
    "zero": [0x0000, 0x8000],
    "subnormal": [0x0001, 0x8001, 0x03FF, 0x83FF, 0x0200],
    "largest": [0x7BFF, 0xFBFF],
    "negative": [0x9C00, 0xA123, 0xB456],
    "infinite": [0x7C00, 0xFC00],
    "nan": [0x7E00, 0xFE01],
}


def random_rows(
    kind: BlockType, rows: int, row_blocks: int, halves: list[int] | None = None, seed: int = 0
) -> np.ndarray:
    """Random bytes as blocks; the fp16 scales are drawn from `halves`, or from all that are finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * row_blocks, kind.type_size), np.uint8)
    for start in HALVES.get(kind.name, ()):
        bits = rng.integers(0, 1 << 16, len(raw)).astype(np.uint16) if halves is None else rng.choice(halves, len(raw))
        bits = np.where((bits & 0x7C00 == 0x7C00) & (halves is None), bits & 0x83FF, bits).astype(np.uint16)
        raw[:, start : start + 2] = bits[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def gguf_py(raw: np.ndarray, kind: BlockType) -> np.ndarray:
    with np.errstate(all="ignore"):
        if kind.name in ROUNDED_DATA:
            return raw.view(ROUNDED_DATA[kind.name]).astype(np.float32)
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.type_id))


def assert_same_numbers(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit but for the sign of a zero, which `==` ignores: s * code + b is +0.0 where d * (q - 8) is -0.0."""
    assert found.dtype == expected.dtype == np.float32
    assert np.array_equal(found, expected), f"{(found != expected).sum()} of {found.size} values differ"
