"""The tensors of a folder that no parameter has taken yet; taking one checks its dtype and shape."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import QwenMLXError
from ..safetensors_files import DTYPES, StoredTensor


class Tensors:
    """Tensors by name. What is left at the end belongs to no parameter."""

    def __init__(self, folder: Path, tensors: dict[str, StoredTensor]):
        self.folder = folder
        self._left = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def get(self, name: str) -> StoredTensor | None:
        """A tensor, left where it is."""
        return self._left.get(name)

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor another name."""
        self._left[new] = self._left.pop(name)

    def drop(self, *names: str) -> bool:
        """Takes tensors that need not be there; True if one was."""
        taken = [self._left.pop(name, None) for name in names]
        return any(tensor is not None for tensor in taken)

    def take(self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> StoredTensor:
        """Takes the tensor of one of these dtypes (as safetensors names them) and shapes; no shapes: any.

        Raises QwenMLXError naming the file, the tensor, what it is and what was expected.
        """
        tensor = self._left.get(name)
        if tensor is None:
            raise QwenMLXError(
                f"{self.folder}: tensor {name!r} is missing from its safetensors; download the folder again."
            )
        expected = " or ".join(DTYPES[dtype] for dtype in dtypes)
        if tensor.dtype not in dtypes:
            found = DTYPES.get(tensor.dtype, tensor.dtype)
            raise QwenMLXError(
                f"{tensor.file}: tensor {name!r} is {found}, expected {expected}; download the folder again."
            )
        if shapes and tensor.shape not in shapes:
            sizes = " or ".join(map(str, dict.fromkeys(shapes)))
            raise QwenMLXError(
                f"{tensor.file}: tensor {name!r} has shape {tensor.shape}, expected {sizes}; download the folder again."
            )
        return self._left.pop(name)
