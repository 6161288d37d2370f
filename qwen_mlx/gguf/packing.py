"""How a matrix is packed: the one type for it, from the files to the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """kind: "dense"; "affine" or "mxfp4", MLX's quantization modes, with `bits` a code and `group_size` codes a scale;
    "q4_k" or "q6_k", GGUF's blocks as they are in the file.
    """

    kind: str
    bits: int = 0
    group_size: int = 0

    def __str__(self) -> str:
        if self.kind == "affine":
            return f"{self.bits} bits, group {self.group_size}"
        return self.kind if self.kind == "dense" else self.kind.upper()


DENSE = Packing("dense")
