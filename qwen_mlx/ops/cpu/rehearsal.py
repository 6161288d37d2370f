"""Compilation ahead of need: each operation is called once on a few zeros, in a thread, while a model is loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable

import numpy as np

from ...backend import mx
from ...gguf.blocks import BY_KIND
from ...gguf.packing import BLOCK_SIZES, Packing
from ..matrix import Matrix
from . import kernels, operations

COLUMNS = 256  # a multiple of every block and group
_OPERATIONS = Packing("none"), mx.float32  # stands for what reads no matrix
_rehearsed: set[tuple[Packing, mx.Dtype]] = set()


def compile_ahead(kinds: Iterable[tuple[Packing, mx.Dtype]]) -> Callable[[], None]:
    """Starts to compile what models with matrices of these packings (dense ones: and dtypes) need, or to read it from
    disk. Returns a function that waits for it, and says on stderr that it does if something had to be compiled.

    Raises QwenMLXError, when waited for, if numba cannot.
    """
    errors: list[Exception] = []

    def work() -> None:
        try:
            rehearse(kinds)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="compile", daemon=True)
    thread.start()

    def wait() -> None:
        thread.join(0.5)
        if thread.is_alive() and kernels.compilations():
            print("Compiling for this processor, once...", file=sys.stderr, flush=True)
        thread.join()
        if errors:
            raise errors[0]

    return wait


def rehearse(kinds: Iterable[tuple[Packing, mx.Dtype]]) -> None:
    """Calls every operation once, products once for each kind of matrix, for one row and for several."""
    for packing, dtype in {*kinds} - _rehearsed:
        _rehearsed.add((packing, dtype))
        matrix = _zeros(packing, dtype)
        for rows in (1, 2):
            operations.multiply(_array(1, rows, COLUMNS), matrix)
        if packing.kind != "dense":
            operations.unpack(matrix, mx.array(np.zeros((1, 1), np.int32)))
    if _OPERATIONS in _rehearsed:
        return
    _rehearsed.add(_OPERATIONS)
    x, bias, position = _array(1, 1, 64), _array(64), mx.array(np.array([1, 0], np.int32))
    operations.rms_norm(x, bias, 1e-6)
    operations.swiglu_joined(x)
    operations.swiglu(x, x)
    operations.qkv_rope(x, bias, _array(1, 1, 8, 2), 2, 1)
    q, kv = _array(1, 1, 2, 16), _array(1, 1, 4, 16)
    operations.attention(q, kv, kv, 1.0, "causal")
    operations.decode_attention(
        _array(1, 2, 1, 16), _array(1, 2, 4, 16), _array(1, 2, 16, 16), position, 1.0, None, None
    )


def _array(*shape: int) -> mx.array:
    return mx.array(np.zeros(shape, np.float32))


def _zeros(packing: Packing, dtype: mx.Dtype) -> Matrix:
    """A matrix of one row."""

    def array(elements: int, kind: type[np.generic]) -> mx.array:
        return mx.array(np.zeros((1, elements), kind))

    if packing.kind == "dense":
        arrays: tuple[mx.array, ...] = (_array(1, COLUMNS).astype(dtype),)
        mx.eval(arrays)
    elif packing.kind == "affine":
        scales = _array(1, COLUMNS // packing.group_size)
        arrays = (array(COLUMNS * packing.bits // 32, np.uint32), scales, scales)
    elif packing.kind == "q6_k":
        arrays = (*(array(COLUMNS // share, np.uint32) for share in (8, 16, 64)), array(1, np.float16))
    else:
        arrays = (array(COLUMNS // BLOCK_SIZES[packing.kind] * BY_KIND[packing.kind].type_size, np.uint8),)
    return Matrix(packing, 1, COLUMNS, arrays)
