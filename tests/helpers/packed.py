"""Random matrices in K-quant blocks with gguf-py's values."""

from __future__ import annotations

import gguf
import numpy as np


def raw_blocks(rows: int, columns: int, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks with sane scales as bytes (rows, row bytes), and gguf-py's values."""
    rng = np.random.default_rng(seed)
    size = {"q4_k": 144, "q6_k": 210}[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    scale = rng.uniform(-1e-3, 1e-3, (rows, columns // 256, 2)).astype(np.float16).view(np.uint8)
    if kind == "q4_k":
        blocks[..., :4] = scale
    else:
        blocks[..., 208:] = scale[..., :2]
    raw = blocks.reshape(rows, -1)
    return raw, gguf.dequantize(raw, gguf.GGMLQuantizationType[kind.upper()])
