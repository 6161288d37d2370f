"""The header of a safetensors file: 8 bytes with its length, then JSON with each tensor's dtype, shape and place."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from .stored import StoredFile

LARGEST = 1 << 25  # bytes; a model of a thousand tensors needs 100 KB


def read_header(file: StoredFile) -> tuple[dict[str, Any], int]:
    """The header, as the safetensors library has validated it, and the offset of the tensors' bytes.

    Raises SafetensorError for what the library refuses, a name that stands in it twice and one that is too large, and
    what a file raises that cannot be read.
    """
    start = 8 + int.from_bytes(file.read(0, min(8, file.size)).tobytes(), "little")
    if start > LARGEST:
        raise SafetensorError(f"its header has more than {LARGEST >> 20} MB")
    data = file.read(0, min(start, file.size)).tobytes()
    # The library maps what it reads: a copy with a hole for the tensors, which no other program can shorten.
    with _unnamed_file() as copy:
        copy.write(data)
        copy.truncate(file.size)
        with safe_open(f"/dev/fd/{copy.fileno()}", "numpy"):
            pass

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise SafetensorError("its header names a tensor twice")
        return names

    header: dict[str, Any] = json.loads(data[8:], object_pairs_hook=unique)
    return header, start


@contextlib.contextmanager
def _unnamed_file() -> Iterator[BinaryIO]:
    """An empty file without a name: in memory on Linux, where no folder need be writable."""
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("header"), "w+b", buffering=0) as file:
            yield file
    else:
        with tempfile.TemporaryFile(buffering=0) as file:
            yield file


__all__ = ["LARGEST", "SafetensorError", "read_header"]
