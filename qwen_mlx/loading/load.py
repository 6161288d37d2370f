"""load(): from a name to (model, tokenizer). The dtype policy lives here and nowhere else.

Policy: activations, norms and biases are float32 on the CPU (MLX's fast path there) and bfloat16 on a GPU; float16
only when asked for, because Qwen2's activations overflow it. On a GPU the packed weights of a file stay packed: Q4_K
and Q6_K byte for byte, others with scales as wide as exactness needs; on the CPU they become float32, once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
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
from ..model.layers import QuantizedEmbedding, QuantizedLinear, matrix_of, remember_joined, rows_of
from ..model.qwen2 import Qwen2
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
        parallel.connect(group)
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
    """Gives every parameter of the model its values; projections of one input lie in one buffer, if packed alike."""
    sizes = {name: array.size for name, array in named_arrays(model)}
    groups = _groups(sizes)
    # Largest first: the moment of both a tensor and its temporary copy comes while the model is still small.
    groups.sort(key=lambda names: -sum(sizes[name] for name in names))
    runs = [_alike(weights, names, keep_packed) for names in groups]
    weights.expect_dense([names for run in runs for names, packing in run if packing is None])
    done, total = 0, sum(weights.nbytes(name) for name in sizes)
    for group, run in zip(groups, runs):
        nbytes = sum(weights.nbytes(name) for name in group)
        if group[0].endswith(".bias") or "norm" in group[0]:
            _set(model, group[0], weights.dense(group).astype(dtype))
            mx.eval(_get(model, group[0]))
        else:
            modules = [name.removesuffix(".weight") for name in group]
            matrices = [_matrix(weights, names, packing, dtype) for names, packing in run]
            for (names, _), matrix in zip(run, matrices):
                _set_rows(model, [name.removesuffix(".weight") for name in names], matrix, dtype)
            remember_joined([_get(model, module) for module in modules], matrices)
        done += nbytes
        progress(done, total)


def _groups(names: Iterable[str]) -> list[list[str]]:
    """Parameters that are read together: the weights of projections of one input, others alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = name
        for joined in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            module = name.rpartition(".")[0].rpartition(".")
            if module[2] in joined and name.endswith(".weight"):
                key = f"{module[0]} {joined}"
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _alike(weights: Weights, names: list[str], keep_packed: bool) -> list[tuple[list[str], Packing]]:
    """Runs of parameters with one packing: each becomes one matrix."""
    packings = [weights.packing(name) if keep_packed else None for name in names]
    pairs = itertools.groupby(zip(names, packings), lambda pair: pair[1])
    return [([name for name, _ in run], packing) for packing, run in pairs]


def _matrix(weights: Weights, names: list[str], packing: Packing, dtype: mx.Dtype) -> ops.Matrix:
    """The matrix of some parameters, one above the other, dense or packed."""
    if packing is None:
        array = weights.dense(names).astype(dtype)
        mx.eval(array)
        rows, columns = array.shape
        return ops.Matrix(ops.DENSE, rows, columns, (array,))
    if isinstance(packing, str):
        return ops.raw_matrix(weights.raw(names), packing)
    parts = [weights.packed(name) for name in names]
    codes, scales, biases = (mx.concatenate(list(column)) if len(parts) > 1 else column[0] for column in zip(*parts))
    # Scales of another dtype than the activations' would be converted for every product: float32 keeps them exact.
    scales, biases = (array if array.dtype == dtype else array.astype(mx.float32) for array in (scales, biases))
    mx.eval(codes, scales, biases)
    group_size, bits = packing
    columns = codes.shape[1] * 32 // bits
    return ops.Matrix(ops.Packing("affine", bits, group_size), codes.shape[0], columns, (codes, scales, biases))


def _set_rows(model: Qwen2, paths: list[str], matrix: ops.Matrix, dtype: mx.Dtype) -> None:
    """Puts modules with the rows of a matrix, one above the other, where the model has dense ones."""
    start, modules = 0, []
    for path in paths:
        old = _get(model, path)
        rows = old.weight.shape[0]
        part = rows_of(matrix, start, start + rows)
        start += rows
        if matrix.packing.kind == "dense":
            old.weight = part.arrays[0]
        elif isinstance(old, nn.Embedding):
            _set(model, path, QuantizedEmbedding(part, dtype))
        else:
            new = QuantizedLinear(part)
            if "bias" in old:
                new.bias = old.bias
            _set(model, path, new)
        modules.append(_get(model, path))
    mx.eval([matrix_of(module).arrays for module in modules])


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
