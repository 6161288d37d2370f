"""The changes that one adapter makes to a model, under the names of the model's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import GGUFError, QwenMLXError
from ...gguf.blocks import BLOCK_TYPES, dequantize
from ...gguf.reader import GGUFFile
from ...parallel.shards import ALL
from ..parameters import BlockParameter, Parameter, as_float32
from ..safetensors_files import DTYPES, FLOATS, StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOAT_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.name in FLOATS}


class Factors(NamedTuple):
    """W becomes W + b a, whose rows DoRA then gives the lengths `magnitude`.

    a: (rank, columns), b: (rows, rank) with the adapter's own scale, magnitude: (rows,) or None; all float32.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Change:
    """An adapter, read. factors: of matrices, by the parameter's name; values: parameters that it holds itself, instead
    of the model's. ties: the head of a model without one of its own follows what becomes of the embedding."""

    path: Path
    digest: str
    factors: dict[str, Factors] = field(default_factory=dict)
    values: dict[str, Parameter] = field(default_factory=dict)
    ties: bool = False


def array_of(tensor: StoredTensor) -> np.ndarray:
    """A tensor of factors as float32. Raises QwenMLXError unless it holds finite floats."""
    if tensor.dtype not in FLOATS:
        found = DTYPES.get(tensor.dtype, tensor.dtype)
        raise QwenMLXError(f"{tensor.file}: tensor {tensor.name!r} is {found}, expected float32, float16 or bfloat16.")
    array = as_float32(tensor.array)
    require_finite(array, f"{tensor.file}: tensor {tensor.name!r}")
    return array


def parameter_of(tensor: StoredTensor, name: str) -> BlockParameter:
    """A tensor as the parameter `name`. Raises QwenMLXError unless it holds finite floats, of one or two dimensions."""
    kind = _FLOAT_TYPES.get(tensor.dtype)
    if kind is None or len(tensor.shape) not in (1, 2):
        found = f"{DTYPES.get(tensor.dtype, tensor.dtype)} {tensor.shape}"
        raise QwenMLXError(f"{tensor.file}: tensor {tensor.name!r} is {found}, expected a vector or matrix of floats.")
    raw, layout = tensor.rows("u1", tensor.shape[0] if len(tensor.shape) == 2 else 1), (tensor.shape[-1], 1, ALL)
    parameter = BlockParameter(name, tensor.name, tensor.shape, DTYPES[tensor.dtype], (), (raw,), *layout, kind)
    for start in range(0, parameter.rows, 1024):
        require_finite(parameter.values(start, start + 1024), f"{tensor.file}: tensor {tensor.name!r}")
    return parameter


def gguf_array(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor of a GGUF as float32. Raises GGUFError for another thing than a matrix of finite floats."""
    info = file.tensors[name]
    if len(info.shape) != 2 or info.type.name in ("I8", "I16", "I32", "I64"):
        raise GGUFError(f"{file.path}: tensor {name!r} is {info.type.name} {info.shape}, expected a matrix of floats.")
    values = dequantize(file.raw(name), info.type)
    require_finite(values, f"{file.path}: tensor {name!r}")
    return values


def require_finite(array: np.ndarray, where: str) -> None:
    """Raises QwenMLXError, beginning with `where`, for NaN and infinity."""
    if not np.isfinite(array).all():
        raise QwenMLXError(f"{where} holds values that are not finite; the training failed or the file is damaged.")


def require_factors(where: str, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...] | None) -> None:
    """Raises QwenMLXError, beginning with `where`, unless b a has the shape of the model's matrix."""
    if shape is None:
        raise QwenMLXError(f"{where} is no matrix of this model; the adapter belongs to another.")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise QwenMLXError(f"{where} has factors of {b.shape} and {a.shape}, which cannot be multiplied.")
    product = (b.shape[0], a.shape[1])
    if product != shape:
        raise QwenMLXError(
            f"{where} is adapted as {product}, but this model's matrix is {shape}; the adapter belongs to another base."
        )
