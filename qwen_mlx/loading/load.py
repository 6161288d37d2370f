"""load(): from a name to (model, tokenizer). The dtype policy lives here and nowhere else.

Policy: activations, norms and biases are float32 on the CPU (MLX's fast path there) and bfloat16 on a GPU; float16
only when asked for, because Qwen2's activations overflow it. On a GPU the packed weights of a file stay packed: Q4_K
and Q6_K byte for byte, others with scales as wide as exactness needs; on the CPU they become float32, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..backend import mx, named_arrays, nn
from ..errors import GGUFError, QwenMLXError
from ..generation.drafts import ModelDraft
from ..gguf import blocks, names
from ..gguf.reader import GGUFFile
from ..model.config import ModelConfig
from ..model.layers import GGUFEmbedding, GGUFLinear, Linear, MergedLinear, QuantizedEmbedding, QuantizedLinear
from ..model.qwen2 import JOINED, JOINED_BIASES, Qwen2
from ..parallel import group as parallel
from ..parallel.shards import Shard, uncut
from ..text.tokenizer import Tokenizer, check_vocabulary
from . import hub
from .sampling_defaults import folder_defaults, gguf_defaults
from .weights import FolderWeights, GGUFWeights, Packing, Weights

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
Progress = Callable[[int, int], None]  # called with bytes done and bytes in all


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    yarn: float | None = None,
    progress: Progress | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Qwen2, Tokenizer]:
    """Loads a Qwen2.5 model and its tokenizer.

    model: a .gguf file (the first part, if split), a folder with config.json and safetensors, a hub id such as
    "Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m", or None for the default, Qwen2.5-Coder-0.5B-Instruct Q4_K_M.
    dtype: of activations and dense weights, "float32", "bfloat16" or "float16"; None: float32 on CPU, bfloat16 on GPU.
    quantized: keep packed weights packed; None: on a GPU only. yarn: extends the context so many times, see
    ModelConfig.with_yarn; None: what the file says. progress: called with (bytes done, bytes in all).
    group: of mx.distributed.init(); every rank calls this, reads its own part of the files (see shards.Shard) and then
    runs the same program. The end of one rank ends all.
    Raises QwenMLXError (GGUFError for a GGUF) naming the file, the tensor, what was found and what was expected.
    """
    if group is not None:
        parallel.join(group)
    path = hub.resolve(model)
    on_gpu = mx.default_device() != mx.cpu
    target = _dtype(dtype) if dtype is not None else (mx.bfloat16 if on_gpu else mx.float32)
    keep_packed = on_gpu if quantized is None else quantized
    try:
        return _load(path, target, keep_packed, yarn, progress or _silent, group)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, UnicodeDecodeError) as error:
        # What no check above this foresaw in files that anyone may have written.
        raise QwenMLXError(
            f"{path}: cannot be loaded; a file of it is damaged or holds nonsense ({error!r})."
        ) from error


def _load(
    path: Path,
    dtype: mx.Dtype,
    keep_packed: bool,
    yarn: float | None,
    progress: Progress,
    group: mx.distributed.Group | None,
) -> tuple[Qwen2, Tokenizer]:
    shard, cut = None, uncut

    def read(config: ModelConfig) -> ModelConfig:
        nonlocal shard, cut
        config = config if yarn is None else config.with_yarn(yarn)
        if group is not None and group.size() > 1:
            shard = Shard(group.rank(), group.size(), config)
            cut = shard.cut
            settings = {"dtype": str(dtype), "quantized": str(keep_packed), "yarn": str(yarn)}
            parallel.check_same(group, path, settings)
        return config

    if path.is_dir():
        config = read(ModelConfig.from_folder(path))
        tokenizer, defaults, factors = Tokenizer.from_folder(path), folder_defaults(path), None
        weights: Weights = FolderWeights(path, config, cut)
    else:
        file = GGUFFile(path)
        config = read(ModelConfig.from_gguf(file))
        weights = GGUFWeights(file, config, cut)
        tokenizer, defaults, factors = (
            Tokenizer.from_gguf(file.metadata),
            gguf_defaults(file),
            _rope_factors(file, config),
        )
    tokenizer.check_fits(config.vocab_size, path)
    qwen = Qwen2(config if shard is None else shard.local, factors)
    _fill(qwen, weights, dtype, keep_packed, progress)
    if shard is not None and group is not None:
        parallel.share(qwen, shard, group)
    qwen.generation_defaults = defaults
    qwen.eval()
    return qwen, tokenizer


def _dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, mx.Dtype) or found not in DTYPES.values():
        raise QwenMLXError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return found


def _silent(done: int, total: int) -> None:
    pass


def _fill(model: Qwen2, weights: Weights, dtype: mx.Dtype, keep_packed: bool, progress: Progress) -> None:
    """Gives every parameter of the model its values, joined ones (see model.JOINED) side by side."""
    targets = [(name, _sources(name), array.size) for name, array in named_arrays(model)]
    # Largest first: the moment of both a tensor and its temporary copy comes while the model is still small.
    targets.sort(key=lambda target: -target[2])
    packings = {
        name: [weights.packing(source) if keep_packed else None for source in sources] for name, sources, _ in targets
    }
    groups = [_alike(sources, packings[name]) for name, sources, _ in targets]
    weights.expect_dense([names for target in groups for names, packing in target if packing is None])
    done, total = 0, sum(weights.nbytes(source) for _, sources, _ in targets for source in sources)
    for (name, sources, _), target in zip(targets, groups):
        nbytes = sum(weights.nbytes(source) for source in sources)
        if [packing for _, packing in target] == [None]:
            _set(model, name, weights.dense(sources).astype(dtype))
        else:
            module = name.removesuffix(".weight")
            old = _get(model, module)
            parts = [_module(weights, names, packing, old, dtype) for names, packing in target]
            _set(model, module, parts[0] if len(parts) == 1 else MergedLinear(parts))
            mx.eval(_get(model, module).parameters())
        mx.eval(_get(model, name) if _has(model, name) else [])
        done += nbytes
        progress(done, total)


def _sources(name: str) -> list[str]:
    """Hugging Face's names of what a parameter of the model holds."""
    path, _, kind = name.rpartition(".")
    if kind in JOINED_BIASES:
        return [f"{path}.{part}.bias" for part in JOINED[JOINED_BIASES[kind]]]
    parent, _, module = path.rpartition(".")
    return [f"{parent}.{part}.{kind}" for part in JOINED[module]] if module in JOINED else [name]


def _alike(sources: list[str], packings: list[Packing]) -> list[tuple[list[str], Packing]]:
    """Runs of sources with one packing: each run becomes one matrix."""
    runs: list[tuple[list[str], Packing]] = []
    for source, packing in zip(sources, packings):
        if runs and runs[-1][1] == packing:
            runs[-1][0].append(source)
        else:
            runs.append(([source], packing))
    return runs


def _module(weights: Weights, names: list[str], packing: Packing, old: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """One matrix of `names`, dense or packed, in place of the dense module `old`."""
    if packing is None:
        array = weights.dense(names).astype(dtype)
        new: nn.Module = Linear(1, 1, bias=False)
        new.weight = array
        return new
    if isinstance(packing, str):
        matrix = ops.raw_matrix(weights.raw(names), packing)
        if isinstance(old, nn.Embedding):
            return GGUFEmbedding(matrix, dtype)
        new = GGUFLinear(matrix)
        if "bias" in old:
            new.bias = old.bias
        return new
    parts = [weights.packed(name) for name in names]
    codes, scales, biases = (mx.concatenate(list(column)) if len(parts) > 1 else column[0] for column in zip(*parts))
    # Scales of another dtype than the activations' would be converted for every product: float32 keeps them exact.
    scales, biases = (array if array.dtype == dtype else array.astype(mx.float32) for array in (scales, biases))
    if isinstance(old, nn.Embedding):
        return QuantizedEmbedding(codes, scales, biases, *packing, dtype)
    new = QuantizedLinear(codes, scales, biases, *packing)
    if "bias" in old:
        new.bias = old.bias  # filled already, or to be
    return new


def _rope_factors(file: GGUFFile, config: ModelConfig) -> np.ndarray | None:
    info = file.tensors.get(names.ROPE_FACTORS)
    if info is None:
        return None
    if info.shape != (config.head_dim // 2,):
        raise GGUFError(
            f"{file.path}: tensor {info.name!r} has shape {info.shape}, expected {(config.head_dim // 2,)}."
        )
    factors: np.ndarray = blocks.dequantize(file.raw(info.name), info.type)[0]
    return factors


def _get(model: nn.Module, path: str) -> Any:
    node: Any = model
    for part in path.split("."):
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def _has(model: nn.Module, path: str) -> bool:
    parent, _, last = path.rpartition(".")
    return hasattr(_get(model, parent) if parent else model, last)


def _set(model: nn.Module, path: str, value: mx.array | nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(_get(model, parent) if parent else model, last, value)


def load_draft(draft: str | os.PathLike[str], tokenizer: Tokenizer, **arguments: Any) -> ModelDraft:
    """Loads a model as a draft for the one that `tokenizer` belongs to; names and arguments as for load().

    Raises QwenMLXError for another vocabulary, before any weights are read.
    """
    path = hub.resolve(draft)
    check_vocabulary(tokenizer.names, Tokenizer.read(path).names, str(draft))
    return ModelDraft(load(path, **arguments)[0])
