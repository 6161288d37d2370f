"""Files of weights and matrices in them, read by offset and never mapped.

Reading a map of a file that another program shortens, or whose disk fails, ends the process by a signal (SIGBUS); a
read that ends early is an error like others.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import QwenMLXError

ALL = slice(None)
MOST = 1 << 30  # bytes of one read: systems refuse 2 GiB and more
PIECE = 1 << 22  # bytes that are read to take some columns of


class StoredFile:
    """An open file. size: its bytes when it was opened. Closed when nothing refers to it any longer.

    descriptor: of the file, which then belongs to this object. error: what is raised where it cannot be read.
    """

    def __init__(self, path: Path, descriptor: int, error: type[QwenMLXError] = QwenMLXError):
        self.path, self._descriptor, self._error = path, descriptor, error
        weakref.finalize(self, os.close, descriptor)
        self._status = self._now()
        self.size = self._status[0]

    @classmethod
    def open(cls, path: Path, error: type[QwenMLXError] = QwenMLXError) -> StoredFile:
        """Opens a file for reading. Raises OSError."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC), error)

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes from `offset` on, uint8 (nbytes,)."""
        out = np.empty(nbytes, np.uint8)
        self.read_into(offset, out)
        return out

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the bytes from `offset` on. Raises the file's error if it has become shorter or
        cannot be read."""
        rest = out.data.cast("B") if out.size else memoryview(b"")
        while rest:
            try:
                count = os.preadv(self._descriptor, [rest[:MOST]], offset)
            except OSError as error:
                raise self._error(f"{self.path}: cannot be read ({error.strerror or error}).") from None
            if count == 0:
                raise self._changed(f"it had {self.size} bytes and ends at {offset}")
            offset, rest = offset + count, rest[count:]

    def check_unchanged(self) -> None:
        """Raises the file's error if another program has written to it since it was opened."""
        if self._now() != self._status:
            raise self._changed("its size or time of change is another")

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def _changed(self, found: str) -> QwenMLXError:
        return self._error(
            f"{self.path}: was changed while it was read ({found}); wait until the program that writes it is done, and "
            "try again."
        )


@dataclass(frozen=True, eq=False)
class StoredRows:
    """A matrix in a file, or some rows and columns of it, whose bytes are read when they are asked for.

    file: None for zeros in place of a matrix that a file lacks. offset: bytes before the first row in the file. rows:
    the number of rows. width: items of a row in the file; columns: those of them that belong to the matrix.
    """

    file: StoredFile | None
    offset: int
    dtype: np.dtype
    rows: int
    width: int
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, len(range(self.width)[self.columns])

    @property
    def nbytes(self) -> int:
        """Bytes of the rows' columns."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop, a new array (rows, columns)."""
        first, last, _ = slice(start, stop).indices(self.rows)
        out = np.empty((max(0, last - first), self.shape[1]), self.dtype)
        self.read_into(out, first)
        return out

    def read_into(self, out: np.ndarray, start: int = 0) -> None:
        """Fills `out` (rows, columns), whose rows are contiguous, with the rows from `start` on."""
        if self.file is None:
            out.fill(0)
        elif self.columns == ALL:
            self.file.read_into(self._offset_of(start), out)
        else:
            step = max(1, PIECE // (self.width * self.dtype.itemsize))
            for row in range(0, len(out), step):
                whole = np.empty((len(out[row : row + step]), self.width), self.dtype)
                self.file.read_into(self._offset_of(start + row), whole)
                out[row : row + step] = whole[:, self.columns]

    def part(self, rows: slice, columns: slice) -> StoredRows:
        """The part in these rows and columns."""
        start, stop, _ = rows.indices(self.rows)
        own = range(self.width)[self.columns][columns]
        return replace(
            self,
            rows=stop - start,
            offset=self._offset_of(start),
            columns=ALL if len(own) == self.width else slice(own.start, own.stop),
        )

    def _offset_of(self, row: int) -> int:
        return self.offset + row * self.width * self.dtype.itemsize
