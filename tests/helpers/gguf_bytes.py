"""GGUF files by hand, for what no honest writer writes."""

from __future__ import annotations

import struct

F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: list[int], kind: int = F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


def build(
    fields: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", version=3, n_tensors=None, n_fields=None
) -> bytes:
    """A GGUF file by hand, for what no honest writer writes."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_fields = len(fields) if n_fields is None else n_fields
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields) + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data
