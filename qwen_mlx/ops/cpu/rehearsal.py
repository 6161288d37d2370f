"""Compilation ahead of need: each operation is called once on a few zeros, in a thread, while a model is loaded.

numba compiles one function at a time in a process, so a second one compiles half of them where all have to be compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

import numpy as np

from ...backend import mx
from ...gguf.blocks import BY_KIND
from ...gguf.packing import BLOCK_SIZES, Packing
from ..matrix import Matrix
from . import kernels, operations, threads

COLUMNS = 256  # a multiple of every block and group
_OPERATIONS = Packing("none"), mx.float32  # stands for what reads no matrix
_rehearsed: set[tuple[Packing, mx.Dtype]] = set()
_told = threading.Event()  # that something is compiled: once is enough, however many models are loaded


def compile_ahead(kinds: Iterable[tuple[Packing, mx.Dtype]]) -> Callable[[], None]:
    """Starts to compile what models with matrices of these packings (dense ones: and dtypes) need, or to read it from
    disk. Returns a function that waits for it, and says on stderr that it does if something had to be compiled.

    Raises QwenMLXError, when waited for, if numba cannot.
    """
    errors: list[Exception] = []

    def work() -> None:
        try:
            second = _start_second()
            _rehearse_products(kinds)
            if second is not None:
                second.wait()
            rehearse_operations()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="compile", daemon=True)
    thread.start()

    def wait() -> None:
        thread.join(0.5)
        if thread.is_alive() and kernels.compilations() and not _told.is_set():
            _told.set()
            print("Compiling for this processor, once...", file=sys.stderr, flush=True)
        thread.join()
        if errors:
            raise errors[0]

    return wait


def _start_second() -> subprocess.Popen[bytes] | None:
    """A process that compiles the operations, for the cache on disk; None where that would not help."""
    if _OPERATIONS in _rehearsed or threads.count() < 2 or not kernels.are_kept():
        return None
    operations.rms_norm(_array(1, 1, 64), _array(64), 1e-6)
    if not kernels.compilations():  # it was on disk, and so are the others
        return None
    # This process's path, and none of the folder that it runs in.
    code = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import rehearse_operations; rehearse_operations()"
    command = [sys.executable, "-c", code, *map(os.path.abspath, sys.path)]
    null = subprocess.DEVNULL
    try:
        return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError:
        return None


def rehearse(kinds: Iterable[tuple[Packing, mx.Dtype]]) -> None:
    """Calls every operation once, products once for each kind of matrix, for one row and for several."""
    _rehearse_products(kinds)
    rehearse_operations()


def _rehearse_products(kinds: Iterable[tuple[Packing, mx.Dtype]]) -> None:
    for packing, dtype in {*kinds} - _rehearsed:
        _rehearsed.add((packing, dtype))
        matrix = _zeros(packing, dtype)
        for rows in (1, 2):
            operations.multiply_all(_array(1, rows, COLUMNS), [matrix])
        if packing.kind != "dense":
            operations.unpack(matrix, mx.array(np.zeros((1, 1), np.int32)))


def rehearse_operations() -> None:
    """Calls every operation that reads no matrix."""
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
