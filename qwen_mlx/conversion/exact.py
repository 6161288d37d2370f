"""GGUF blocks for what MLX has packed: the same values, where a GGUF type has the same arithmetic."""

from __future__ import annotations

import numpy as np

from ..errors import QwenMLXError
from ..gguf.blocks import BlockType
from ..gguf.pack import affine_k_blocks, legacy_blocks, mxfp4_blocks, q8_0_blocks
from ..gguf.packing import Packing
from ..gguf.unpack import unpack
from ..loading.parameters import Parameter, as_float32
from .mixes import TYPES
from .quantize import pieces

# Types by the bits of MLX's codes, the smallest first, and what a scale times which gives the bias; None is free.
_OFFSETS = {"Q4_0": 8, "Q4_K": None, "Q4_1": None, "Q5_0": 16, "Q5_K": None, "Q5_1": None, "Q8_0": 128}
_FOR_BITS = {4: ("Q4_0", "Q4_K", "Q4_1"), 5: ("Q5_0", "Q5_K", "Q5_1"), 8: ("Q8_0",)}
_FOR_BITS |= {2: _FOR_BITS[4], 3: _FOR_BITS[4], 6: _FOR_BITS[8]}


def exact_type(tensor: Parameter) -> BlockType | None:
    """The smallest GGUF type with exactly a tensor's values, which are packed; None if there is none. Reads them."""
    packing = own_packing(tensor)
    if packing is None or tensor.shape[1] % 32:
        return None
    if packing.kind == "mxfp4":
        return TYPES["MXFP4"]
    left = [name for name in _FOR_BITS[packing.bits] if not tensor.shape[1] % TYPES[name].block_size]
    for start, stop in pieces(tensor):
        _, scales, biases = _arrays(tensor, packing, start, stop)
        left = [name for name in left if _fits(name, scales, biases)]
    tensor.release()
    return TYPES[left[0]] if left else None


def own_packing(tensor: Parameter) -> Packing | None:
    """MLX's packing of a tensor, if it has one of which GGUF may have the arithmetic."""
    return next((packing for packing in tensor.packings if packing.kind in ("affine", "mxfp4")), None)


def exact_blocks(tensor: Parameter, kind: BlockType, start: int, stop: int) -> np.ndarray:
    """Rows start to stop as blocks of `kind`, exact_type()'s, uint8 (rows, bytes of a row)."""
    packing = own_packing(tensor)
    assert packing is not None
    if packing.kind == "mxfp4":
        packed, exponents = tensor.arrays(packing, start, stop, finite=False)
        if exponents.max(initial=0) == 255:
            raise QwenMLXError(f"tensor {tensor.source_name!r} has a scale that is NaN; the file is damaged.")
        blocks = mxfp4_blocks(unpack(packed, 4).reshape(-1, 32), exponents.reshape(-1))
        return blocks.reshape(stop - start, -1)
    codes, scales, biases = _arrays(tensor, packing, start, stop)
    codes = codes.reshape(-1, kind.block_size)
    bits = int(kind.name[1])
    if kind.name == "Q8_0":
        blocks = q8_0_blocks(codes, scales)
    elif kind.name.endswith("_K"):
        (d, scales_q), (d_min, minima_q) = _multiples(scales), _multiples(-biases)
        blocks = affine_k_blocks(bits, codes, d, d_min, scales_q, minima_q)
    else:
        blocks = legacy_blocks(bits, codes, scales, biases if _OFFSETS[kind.name] is None else None)
    return blocks.reshape(stop - start, -1)


def _arrays(tensor: Parameter, packing: Packing, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 (rows, columns), scales and biases float32, one for each 32 weights."""
    packed, *wide = tensor.arrays(packing, start, stop, finite=False)
    scales, biases = (np.repeat(as_float32(array).ravel(), packing.group_size // 32) for array in wide)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise QwenMLXError(
            f"tensor {tensor.source_name!r} ({tensor.type_name}) has scales that are not finite: the file is damaged, "
            "download it again."
        )
    return unpack(packed, packing.bits), scales, biases


def _fits(name: str, scales: np.ndarray, biases: np.ndarray) -> bool:
    """True if a type can hold these scales and biases, (groups,) each, as they are."""
    offset = _OFFSETS[name]
    if name.endswith("_K"):
        return all(np.array_equal(_products(*_multiples(values)), values) for values in (scales, -biases))
    if offset is not None:
        return _is_half(scales) and bool((biases == np.float32(-offset) * scales).all())
    return _is_half(scales) and _is_half(biases)


def _is_half(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def _products(d: np.ndarray, multiples: np.ndarray) -> np.ndarray:
    products: np.ndarray = d[:, None].astype(np.float32) * multiples
    return products.ravel()


def _multiples(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp16 numbers (n,) and whole multiples of them below 64, uint8 (n, 8), whose products are the values (n * 8,),
    where there are such numbers: one is the largest value divided by its multiple."""
    values = values.reshape(-1, 8)
    largest = values.max(1)
    d, multiples = np.zeros(len(values), np.float16), np.zeros(values.shape, np.uint8)
    left = np.flatnonzero(largest > 0)
    with np.errstate(all="ignore"):
        for multiple in range(63, 0, -1):
            own = values[left]
            candidate = (largest[left] / np.float32(multiple)).astype(np.float16)
            step = candidate.astype(np.float32)[:, None]
            whole = np.clip(np.rint(own / step), 0, 63)
            fits = (whole * step == own).all(1)
            d[left[fits]], multiples[left[fits]] = candidate[fits], whole[fits].astype(np.uint8)
            left = left[~fits]
            if not len(left):
                break
    return d, multiples
