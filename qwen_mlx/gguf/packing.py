"""The one type for how a matrix is packed, from the files to the kernels."""

from __future__ import annotations

from dataclasses import dataclass

# GGUF's blocks that are kept as they are in the file, and the weights of each. GPUs read Q4_K and Q6_K of them.
BLOCK_SIZES = {"q4_0": 32, "q4_1": 32, "q5_0": 32, "q5_1": 32, "q8_0": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256}


@dataclass(frozen=True)
class Packing:
    """The packing of a matrix, compared by value.

    kind: "dense"; "affine" or "mxfp4", MLX's quantization modes, with codes of `bits` and a scale for each `group_size`
    of them; one of BLOCK_SIZES, GGUF's blocks as they are in the file.
    """

    kind: str
    bits: int = 0
    group_size: int = 0

    @property
    def block_size(self) -> int:
        """The columns that are stored together: a matrix can be cut between them only."""
        return BLOCK_SIZES.get(self.kind) or self.group_size or 1

    def __str__(self) -> str:
        if self.kind == "affine":
            return f"{self.bits} bits, group {self.group_size}"
        return self.kind.upper() if self.kind in BLOCK_SIZES else self.kind


DENSE = Packing("dense")
