"""MLX's arrays as NumPy's and back. The CPU's kernels read and write MLX's memory itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ...backend import mx
from . import replay

SMALL = 1 << 16  # elements that are copied sooner than MLX makes room for them


def elements(x: mx.array) -> np.ndarray:
    """The elements of an array, row by row. Waits for what computes it."""
    tape = replay.current()
    return np.ascontiguousarray(np.asarray(x)) if tape is None else tape.values(x)


def as_bytes(x: mx.array) -> np.ndarray:
    """The bytes of an array, uint8 (nbytes,)."""
    return elements(x).reshape(-1).view(np.uint8)


def later(x: mx.array) -> Callable[[], np.ndarray]:
    """A function that gives an array's elements, also those of another call where a function is repeated."""
    tape = replay.current()
    if tape is not None:
        return tape.later(x)
    own = elements(x)
    return lambda: own


class Output:
    """A float32 array to be filled: `values`, which NumPy sees, becomes `array()`."""

    def __init__(self, *shape: int) -> None:
        self._array: mx.array | None = None
        if math.prod(shape) <= SMALL or replay.current() is not None:
            self.values = np.empty(shape, np.float32)
        else:
            self._array = mx.empty(shape, mx.float32)
            mx.eval(self._array)
            self.values = np.array(self._array, copy=False)

    def array(self) -> mx.array:
        """The array of the values, which nobody writes any more."""
        array = mx.array(self.values) if self._array is None else self._array
        tape = replay.current()
        if tape is not None:
            tape.add(array, self.values)
        return array
