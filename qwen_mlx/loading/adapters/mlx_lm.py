"""Adapters in mlx-lm's form: adapter_config.json and adapters.safetensors, of LoRA, DoRA or whole parameters.

The equations and names are those of mlx-lm's tuner/lora.py, dora.py and utils.py (linear_to_lora_layers).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import QwenMLXError
from ..parameters import Parameter
from ..safetensors_files import StoredTensor, open_files, read_tensors
from .change import EMBEDDING, Change, Factors, array_of, parameter_of, require_factors

WEIGHTS = "adapters.safetensors"
_PARTS = ("lora_a", "lora_b", "m")


def read_mlx_lm(folder: Path, config: dict[str, Any], digest: str, shapes: Mapping[str, tuple[int, ...]]) -> Change:
    """The change that a folder of mlx-lm's makes to a model with parameters of these shapes.

    Raises QwenMLXError naming the file, the field or tensor, what it is and what was expected.
    """
    where = folder / "adapter_config.json"
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise QwenMLXError(f"{where}: fine_tune_type is {kind!r}, expected lora, dora or full.")
    tensors = read_tensors(open_files([folder / WEIGHTS]))
    if kind == "full":
        values = {name: _whole(tensor, shapes) for name, tensor in tensors.items()}
        return Change(folder, digest, values=values, ties=True)
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict):
        raise QwenMLXError(f"{where}: lora_parameters is {settings!r}, expected an object with rank and scale.")
    rank, scale = settings.get("rank"), settings.get("scale")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise QwenMLXError(f"{where}: lora_parameters' rank is {rank!r}, expected a positive integer.")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale) or abs(scale) > 1e9:
        raise QwenMLXError(f"{where}: lora_parameters' scale is {scale!r}, expected a number.")
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS:
            raise QwenMLXError(f"{tensor.file}: tensor {name!r} is not of an adapter, expected .lora_a, .lora_b or .m.")
        modules.setdefault(module, {})[part] = tensor
    factors = {
        f"{module}.weight": _factors(folder, module, parts, kind == "dora", (rank, float(scale)), shapes)
        for module, parts in modules.items()
    }
    _require_modules(where, config, settings.get("keys"), set(modules), shapes)
    return Change(folder, digest, factors, ties=True)


def _whole(tensor: StoredTensor, shapes: Mapping[str, tuple[int, ...]]) -> Parameter:
    shape = shapes.get(tensor.name)
    if shape is None or tensor.shape != shape:
        expected = "which this model does not have" if shape is None else f"but this model's is {shape}"
        raise QwenMLXError(f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, {expected}.")
    return parameter_of(tensor, tensor.name)


def _factors(
    folder: Path,
    module: str,
    parts: Mapping[str, StoredTensor],
    dora: bool,
    settings: tuple[int, float],
    shapes: Mapping[str, tuple[int, ...]],
) -> Factors:
    where, (rank, scale) = f"{folder}: {module!r}", settings
    if set(parts) != set(_PARTS if dora else _PARTS[:2]):
        names = f"{', '.join(sorted(parts))}, expected {'lora_a, lora_b and m' if dora else 'lora_a and lora_b'}"
        raise QwenMLXError(f"{where} has {names}; save the adapter again.")
    first, second = array_of(parts["lora_a"]), array_of(parts["lora_b"])
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != rank:
        raise QwenMLXError(
            f"{where} has factors of {first.shape} and {second.shape}, expected matrices of rank {rank}, as "
            "adapter_config.json says."
        )
    # An embedding's are multiplied as they are, a projection's on their sides.
    embedding = f"{module}.weight" == EMBEDDING
    if embedding and dora:
        raise QwenMLXError(f"{where} is an embedding with DoRA, which is not supported; fuse it with mlx_lm.fuse.")
    a, b = (second, first) if embedding else (first.T, second.T)
    require_factors(where, a, b, shapes.get(f"{module}.weight"))
    magnitude = array_of(parts["m"]) if dora else None
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise QwenMLXError(f"{where} has a magnitude of {magnitude.shape}, expected {b.shape[:1]}.")
    return Factors(np.ascontiguousarray(a), np.ascontiguousarray(b) * np.float32(scale), magnitude)


def _require_modules(
    where: Path, config: dict[str, Any], keys: Any, present: set[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises QwenMLXError where the configuration names modules that the tensors lack."""
    layers = config.get("num_layers")
    if keys is None or layers is None:
        return
    listed = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not listed or not isinstance(layers, int) or isinstance(layers, bool):
        raise QwenMLXError(f"{where}: keys are {keys!r} of {layers!r} layers, expected names and an integer.")
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    blocks = {module: re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module) for module in modules}
    count = 1 + max(int(block[1]) for block in blocks.values() if block)
    first = max(0, count - layers) if layers > 0 else 0
    expected = {module for module, block in blocks.items() if module in keys and not block}
    expected |= {m for m, block in blocks.items() if block and block[2] in keys and int(block[1]) >= first}
    for module in sorted(expected - present):
        raise QwenMLXError(
            f"{where.parent}: has no tensors for {module!r}, which {where.name} names, as {len(expected - present)} in "
            "all; the adapter belongs to another model, or a file of it is damaged."
        )
