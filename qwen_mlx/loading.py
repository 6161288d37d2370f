"""load(): from a name to (model, tokenizer). The dtype policy lives here and nowhere else.

Policy: activations, norms and biases are float32 on the CPU (MLX's fast path there) and bfloat16 on a GPU; float16
only when asked for, because Qwen2's activations overflow it. On a GPU the packed weights of a file stay packed, with
scales as wide as exactness needs; on the CPU they become float32, once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import hub
from .backend import mx, nn
from .config import ModelConfig, read_json
from .defaults import folder_defaults, gguf_defaults
from .errors import GGUFError, QwenMLXError
from .gguf import blocks, names
from .gguf.reader import GGUFFile
from .layers import QuantizedEmbedding, QuantizedLinear
from .model import Qwen2
from .tokenizer import Tokenizer

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
Progress = Callable[[int, int], None]  # called with bytes done and bytes in all


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    progress: Progress | None = None,
) -> tuple[Qwen2, Tokenizer]:
    """Loads a Qwen2.5 model and its tokenizer.

    model: a .gguf file (the first part, if split), a folder with config.json and safetensors, a hub id such as
    "Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m", or None for the default, Qwen2.5-Coder-0.5B-Instruct Q4_K_M.
    dtype: of activations and dense weights, "float32", "bfloat16" or "float16"; None: float32 on CPU, bfloat16 on GPU.
    quantized: keep packed weights packed; None: on a GPU only. progress: called with (bytes done, bytes in all).
    Raises QwenMLXError (GGUFError for a GGUF) naming the file, the tensor, what was found and what was expected.
    """
    path = hub.resolve(model)
    on_gpu = mx.default_device() != mx.cpu
    target = _dtype(dtype) if dtype is not None else (mx.bfloat16 if on_gpu else mx.float32)
    keep_packed = on_gpu if quantized is None else quantized
    if path.is_dir():
        return _load_folder(path, target, keep_packed, progress or _silent)
    return _load_gguf(path, target, keep_packed, progress or _silent)


def _dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise QwenMLXError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return found


def _silent(done: int, total: int) -> None:
    pass


def _load_gguf(path: Path, dtype: mx.Dtype, keep_packed: bool, progress: Progress) -> tuple[Qwen2, Tokenizer]:
    file = GGUFFile(path)
    config = ModelConfig.from_gguf(file)
    tokenizer = Tokenizer.from_gguf(file.metadata)
    factors = _rope_factors(file, config)
    model = Qwen2(config, factors)
    found = names.model_tensors(file, config)
    done, total = 0, sum(info.nbytes for info in found.values())
    # Largest first: the moment of both a tensor and its temporary copy comes while the model is still small.
    order = sorted(found.items(), key=lambda item: -math.prod(item[1].shape))
    packed = {name for name, info in order if keep_packed and info.type.affine is not None and len(info.shape) == 2}
    rooms = _rooms([info.shape for name, info in order if name not in packed])
    for name, info in order:
        if name in packed:
            # float32 scales even where float16 would do: MLX would widen them again for every product with bfloat16.
            arrays = [mx.array(array) for array in blocks.affine(file.raw(info.name), info.type, np.float32)]
            _set_packed(model, name, *arrays, info.type.affine.group_size, info.type.affine.bits, dtype)
        else:
            room = next(rooms)
            blocks.dequantize(file.raw(info.name), info.type, np.array(room, copy=False).reshape(-1, info.shape[-1]))
            _set_dense(model, name, room.astype(dtype))
        file.release(info.name)
        done += info.nbytes
        progress(done, total)
    model.generation_defaults = gguf_defaults(file)
    return model.eval(), tokenizer


def _rooms(shapes: list[tuple[int, ...]]) -> Iterator[mx.array]:
    """Uninitialised float32 arrays to dequantize into. The next one is allocated meanwhile: the system takes longer to
    hand out fresh memory than a core takes to fill it.
    """
    upcoming = None
    for shape in [*shapes, (1,)]:
        room, upcoming = upcoming, mx.empty(shape, mx.float32)
        mx.async_eval(upcoming)
        if room is not None:
            mx.eval(room)
            yield room


def _rope_factors(file: GGUFFile, config: ModelConfig) -> np.ndarray | None:
    info = file.tensors.get(names.ROPE_FACTORS)
    if info is None:
        return None
    if info.shape != (config.head_dim // 2,):
        raise GGUFError(
            f"{file.path}: tensor {info.name!r} has shape {info.shape}, expected {(config.head_dim // 2,)}."
        )
    return blocks.dequantize(file.raw(info.name), info.type)[0]


def _load_folder(folder: Path, dtype: mx.Dtype, keep_packed: bool, progress: Progress) -> tuple[Qwen2, Tokenizer]:
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    model = Qwen2(config)
    weights = {name: array for file in safetensors_files(folder) for name, array in load_safetensors(file).items()}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some writers store the shared matrix twice
    quantization = read_json(folder / "config.json").get("quantization") or {}
    done, total = 0, sum(array.nbytes for array in weights.values())
    for name, shape in config.parameter_shapes().items():
        module = name.removesuffix(".weight")
        weight = _take(weights, name, folder)
        done += weight.nbytes
        if f"{module}.scales" in weights:
            scales, biases = _take(weights, f"{module}.scales", folder), _take(weights, f"{module}.biases", folder)
            done += scales.nbytes + biases.nbytes
            group_size, bits = _group_and_bits(quantization, module, folder)
            found = (weight.shape[0], weight.shape[-1] * 32 // bits)
            if found != shape or scales.shape != biases.shape or scales.shape != (shape[0], shape[1] // group_size):
                raise QwenMLXError(
                    f"{folder}: {name!r} holds {found} codes of {bits} bits with scales {scales.shape}, "
                    f"expected {shape} in groups of {group_size}."
                )
            if keep_packed:
                _set_packed(model, name, weight, scales.astype(dtype), biases.astype(dtype), group_size, bits, dtype)
            else:
                wide = [scales.astype(mx.float32), biases.astype(mx.float32)]
                _set_dense(model, name, mx.dequantize(weight, *wide, group_size=group_size, bits=bits).astype(dtype))
        else:
            if weight.shape != shape:
                raise QwenMLXError(f"{folder}: tensor {name!r} has shape {weight.shape}, expected {shape}.")
            _set_dense(model, name, weight.astype(dtype))
        progress(done, total)
    extra = sorted(name for name in weights if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise QwenMLXError(f"{folder}: tensor {extra[0]!r} is not part of this qwen2 model ({len(extra)} such in all).")
    model.generation_defaults = folder_defaults(folder)
    return model.eval(), tokenizer


def _take(weights: dict[str, mx.array], name: str, folder: Path) -> mx.array:
    if name not in weights:
        raise QwenMLXError(
            f"{folder}: tensor {name!r} is missing from its safetensors files; download the folder again."
        )
    return weights.pop(name)


def safetensors_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / Path(str(name)).name for name in read_json(index).get("weight_map", {}).values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        hint = "; it holds PyTorch .bin files, save it again as safetensors" if list(folder.glob("*.bin")) else ""
        raise QwenMLXError(f"{folder}: no .safetensors file{hint}.")
    for file in files:
        if not file.exists():
            raise QwenMLXError(
                f"{folder}: {file.name} is missing, which {index.name} names; download the folder again."
            )
    return files


def load_safetensors(file: Path) -> dict[str, mx.array]:
    """A file's tensors, lazily: MLX reads each when it is evaluated."""
    try:
        return mx.load(str(file))
    except (RuntimeError, ValueError) as error:
        raise QwenMLXError(f"{file}: not a readable safetensors file ({error}); download it again.") from None


def _group_and_bits(quantization: dict[str, Any], module: str, folder: Path) -> tuple[int, int]:
    """From mlx-lm's config: `quantization` holds a default and, per layer, what differs from it."""
    own = quantization.get(module)
    settings = own if isinstance(own, dict) else quantization
    group_size, bits = settings.get("group_size"), settings.get("bits")
    if settings.get("mode", "affine") != "affine" or not isinstance(group_size, int) or not isinstance(bits, int):
        raise QwenMLXError(
            f"{folder}: {module!r} is packed, but config.json's 'quantization' says {settings!r} for it, expected "
            "'group_size' and 'bits' in affine mode."
        )
    return group_size, bits


def _parent(model: nn.Module, path: str) -> tuple[Any, str]:
    *parents, last = path.split(".")
    node: Any = model
    for part in parents:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node, last


def _set_dense(model: nn.Module, name: str, array: mx.array) -> None:
    mx.eval(array)
    parent, last = _parent(model, name)
    setattr(parent, last, array)


def _set_packed(
    model: nn.Module,
    name: str,
    codes: mx.array,
    scales: mx.array,
    biases: mx.array,
    group_size: int,
    bits: int,
    dtype: mx.Dtype,
) -> None:
    mx.eval(codes, scales, biases)
    parent, last = _parent(model, name.removesuffix(".weight"))
    old = getattr(parent, last)
    if isinstance(old, nn.Embedding):
        setattr(parent, last, QuantizedEmbedding(codes, scales, biases, group_size, bits, dtype))
    else:
        new = QuantizedLinear(codes, scales, biases, group_size, bits)
        if "bias" in old:
            new.bias = old.bias  # the file's own, or still to come
        setattr(parent, last, new)
