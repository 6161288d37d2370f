"""The one type for how a matrix is packed, from the files to the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """The packing of a matrix, compared by value.

    kind: "dense"; "affine" or "mxfp4", MLX's quantization modes, with codes of `bits` and a scale for each `group_size`
    of them; "q4_k" or "q6_k", GGUF's blocks as they are in the file.
    """

    kind: str
    bits: int = 0
    group_size: int = 0

    @property
    def block_size(self) -> int:
        """The columns that are stored together: a matrix can be cut between them only."""
        return 256 if self.kind in ("q4_k", "q6_k") else self.group_size or 1

    def __str__(self) -> str:
        if self.kind == "affine":
            return f"{self.bits} bits, group {self.group_size}"
        return self.kind.upper() if self.kind in ("q4_k", "q6_k") else self.kind


DENSE = Packing("dense")
