"""Random adapters in each form that is read, written from the definitions of those forms, and what they make of a
model's matrices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from safetensors.numpy import save_file

from reference.small_models import RandomModel

EMBEDDING = "model.embed_tokens"


class Part(NamedTuple):
    """W + scale b a, rows lengthened to `magnitude`."""

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None


def random_parts(model: RandomModel, names: list[str], rank: int = 4, dora: bool = False, seed: int = 1) -> dict:
    """Factors for the matrices whose modules end with one of these names, by the module."""
    rng, parts = np.random.default_rng(seed), {}
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        if value.ndim == 2 and module.endswith(tuple(names)):
            rows, columns = value.shape
            a = rng.standard_normal((rank, columns)).astype(np.float32) / np.float32(math.sqrt(columns))
            b = rng.standard_normal((rows, rank)).astype(np.float32) * np.float32(0.1)
            magnitude = np.linalg.norm(value, axis=1) * rng.uniform(0.7, 1.4, rows) if dora else None
            parts[module] = Part(a, b, None if magnitude is None else magnitude.astype(np.float32))
    assert parts
    return parts


def adapt(model: RandomModel, parts: dict[str, Part], scale: float, strength: float = 1.0) -> None:
    """Changes the model's matrices as the adapter says, in float64."""
    for module, (a, b, magnitude) in parts.items():
        weight = model.state_dict()[f"{module}.weight"]
        result = weight.astype(np.float64) + scale * b.astype(np.float64) @ a
        if magnitude is not None:
            result *= (magnitude / np.linalg.norm(result, axis=1))[:, None]
        np.copyto(weight, weight + strength * (result - weight), casting="same_kind")


def write_peft(folder: Path, parts: dict[str, Part], scale: float, **changes: Any) -> Path:
    """A folder of peft's; changes: of adapter_config.json, None removes a field."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b, magnitude) in parts.items():
        prefix = f"base_model.model.{module}"
        if module == EMBEDDING:
            tensors |= {f"{prefix}.lora_embedding_A": b.T, f"{prefix}.lora_embedding_B": a.T}
        else:
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        if magnitude is not None:
            tensors[f"{prefix}.lora_magnitude_vector"] = magnitude
    rank = next(iter(parts.values())).a.shape[0]
    dora = any(part.magnitude is not None for part in parts.values())
    targets = sorted({module.rpartition(".")[2] for module in parts})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": targets, "use_dora": dora}
    write(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", config | changes)
    return folder


def write_mlx_lm(folder: Path, parts: dict[str, Part], scale: float, **changes: Any) -> Path:
    """A folder of mlx-lm's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b, magnitude) in parts.items():
        first, second = (b, a) if module == EMBEDDING else (a.T, b.T)
        tensors |= {f"{module}.lora_a": first, f"{module}.lora_b": second}
        if magnitude is not None:
            tensors[f"{module}.m"] = magnitude
    rank = next(iter(parts.values())).a.shape[0]
    dora = any(part.magnitude is not None for part in parts.values())
    keys = sorted({module.split(".", 3)[3] if ".layers." in module else module for module in parts})
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1}
    config |= {"lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}}
    write(folder / "adapters.safetensors", tensors)
    write_json(folder / "adapter_config.json", config | changes)
    return folder


def write_gguf_adapter(path: Path, parts: dict[str, Part], scale: float, layers: int, **changes: Any) -> Path:
    """An adapter as llama.cpp's converter writes it; changes: of its fields."""
    writer = gguf.GGUFWriter(path, changes.get("architecture", "qwen2"))
    writer.add_type(changes.get("type", "adapter"))
    writer.add_string("adapter.type", changes.get("adapter_type", "lora"))
    rank = next(iter(parts.values())).a.shape[0]
    writer.add_float32("adapter.lora.alpha", changes.get("alpha", scale * rank))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for module, (a, b, _) in parts.items():
        name = names.get_name(module)
        first, second = (b, a.T) if module == EMBEDDING else (a, b)
        for end, array in (("lora_a", first), ("lora_b", second)):
            writer.add_tensor(f"{name}.weight.{end}", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps({name: item for name, item in value.items() if item is not None}))
