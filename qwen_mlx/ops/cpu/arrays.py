"""MLX's arrays as NumPy's and back. The CPU's kernels read and write MLX's memory itself."""

from __future__ import annotations

import numpy as np

from ...backend import mx

SMALL = 1 << 16  # elements that are copied sooner than MLX makes room for them


def floats(x: mx.array) -> np.ndarray:
    """The elements of a float32 array, row by row. Waits for what computes it."""
    return np.ascontiguousarray(np.asarray(x))


def as_bytes(x: mx.array) -> np.ndarray:
    """The bytes of an array, uint8 (nbytes,)."""
    return np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8)


class Output:
    """A float32 array to be filled: `values`, which NumPy sees, becomes `array()`."""

    def __init__(self, *shape: int) -> None:
        self._array: mx.array | None = None
        if np.prod(shape) <= SMALL:
            self.values = np.empty(shape, np.float32)
        else:
            self._array = mx.empty(shape, mx.float32)
            mx.eval(self._array)
            self.values = np.array(self._array, copy=False)

    def array(self) -> mx.array:
        """The array of the values, which nobody writes any more."""
        return mx.array(self.values) if self._array is None else self._array
