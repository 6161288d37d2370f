"""load(): from a name to (model, tokenizer). The dtype policy lives here and nowhere else.

Policy: activations, norms and biases are float32 on the CPU (MLX's fast path there) and bfloat16 on a GPU; float16
only when asked for, because Qwen2's activations overflow it. The packed weights of a file stay packed: on a GPU Q4_K
and Q6_K byte for byte, others with scales as wide as exactness needs; on a CPU eight of GGUF's types byte for byte, and
weights of 16 bits stay as they are, too. On a CPU without numba all become float32, once.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import ops
from ..backend import check_process, exact_float32, mx, nn
from ..errors import QwenMLXError, refuses_wrong_arguments
from ..generation.drafts import ModelDraft
from ..gguf.packing import BLOCK_SIZES, DENSE, Packing
from ..model.config import LARGEST_CONTEXT
from ..model.layers import QuantizedEmbedding, QuantizedLinear, remember_joined
from ..model.qwen2 import Qwen2
from ..ops import Matrix
from ..parallel import group as parallel
from ..parallel.shards import Shard
from ..text.tokenizer import Tokenizer, check_vocabulary
from . import hub, kernels, memory
from .adapters.apply import adapted, merged
from .adapters.read import Names
from .checkpoint import open_checkpoint
from .free_memory import require_memory
from .hub.client import say
from .parameters import Delta, Parameter

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections of one input share a buffer
# Errors that Python raises where a file holds nonsense that no check foresaw.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
Progress = Callable[[int, int], None]  # called with bytes done and bytes in all


@refuses_wrong_arguments
def load(
    model: str | os.PathLike[str] | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    yarn: float | None = None,
    adapter: Names = None,
    progress: Progress | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Qwen2, Tokenizer]:
    """Loads a Qwen2.5 model and its tokenizer.

        model, tokenizer = load("Qwen/Qwen2.5-7B-Instruct-GGUF:q4_k_m")

    model: a .gguf file (the first part, if split), a folder with config.json and safetensors, or a hub id; None for the
        default, Qwen2.5-Coder-0.5B-Instruct Q4_K_M.
    dtype: of activations and dense weights, "float32", "bfloat16" or "float16"; None: float32 on a CPU, bfloat16 on a
        GPU.
    quantized: keep packed weights packed, on a CPU those of 16 bits as they are; False: all in `dtype`; None: packed on
        a GPU, and on a CPU with numba.
    yarn: extends the context so many times, see ModelConfig.with_yarn; None: as the file says.
    adapter: PATH or PATH:SCALE of a LoRA or DoRA adapter (a folder of peft's or mlx-lm's, a .gguf, or a hub id), or
        several: it stays beside packed weights, and is merged into dense ones.
    progress: called with (bytes done, bytes in all).
    group: of mx.distributed.init(); every rank calls this, reads its own part of the files (see shards.Shard) and then
        runs the same program. The end of one rank ends all.

    Raises QwenMLXError (GGUFError for a GGUF) naming the file, the tensor, its fault and what was expected.
    """
    check_process()
    if group is not None:
        parallel.connect(group)
    path = hub.resolve(model)
    on_gpu = mx.default_device() != mx.cpu
    target = target_dtype(dtype)
    packed = on_gpu or ops.computes_on_cpu(target) if quantized is None else quantized
    if target == mx.float32:
        exact_float32()
    try:
        return _load(path, target, packed, yarn, adapter, _outside(progress), group)
    except QwenMLXError:
        raise
    except _Outside as error:
        raise error.cause from None
    except UNFORESEEN as error:
        # Anyone may have written the files, and no check foresaw this fault.
        raise QwenMLXError(
            f"{path}: cannot be loaded; a file of it is damaged or holds nonsense ({error!r})."
        ) from error


class _Outside(Exception):
    """An error of the caller's own function, which says nothing about the files."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def _outside(progress: Progress | None) -> Progress | None:
    """`progress`, whose errors are put into _Outside."""
    if progress is None:
        return None

    def call(done: int, total: int) -> None:
        try:
            progress(done, total)
        except Exception as error:
            raise _Outside(error) from error

    return call


def target_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype:
    """The dtype of activations and dense weights; None: the device's. Raises QwenMLXError for another one."""
    if dtype is None:
        return mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    mlx_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(mlx_dtype, mx.Dtype) or mlx_dtype not in DTYPES.values():
        raise QwenMLXError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
    return mlx_dtype


def _load(
    path: Path,
    dtype: mx.Dtype,
    packed: bool,
    yarn: float | None,
    adapter: Names,
    progress: Progress | None,
    group: mx.distributed.Group | None,
) -> tuple[Qwen2, Tokenizer]:
    checkpoint = open_checkpoint(path)
    checkpoint.require_language_head()
    checkpoint = adapted(checkpoint, adapter)
    if group is None or group.rank() == 0:
        for note in checkpoint.notes:
            say(note)
    config = checkpoint.config if yarn is None else checkpoint.config.with_yarn(yarn)
    if config.context_length > checkpoint.config.context_length > LARGEST_CONTEXT:  # after a note that it ends there
        say(f"{path}: with yarn {yarn:g} the context is {config.context_length} tokens")
    parameters, deltas, local, shard = checkpoint.parameters, checkpoint.deltas, config, None
    if group is not None and group.size() > 1:
        shard = Shard(group.rank(), group.size(), config)
        settings = {"dtype": str(dtype), "quantized": str(packed), "yarn": str(yarn)}
        parallel.check_same(group, path, settings | {"adapter": checkpoint.adapter_digest})
        parameters, local = checkpoint.parts(shard.cut), shard.local
        deltas = {name: delta.part(*shard.cut(name)) for name, delta in deltas.items()}
    parameters, beside = _merge(parameters, deltas, dtype, packed)
    memory.prepare(sum(parameter.nbytes for parameter in parameters.values()))
    if mx.default_device() == mx.cpu:
        require_memory(_nbytes(parameters.values(), dtype, packed), path, packed)
    try:
        model = Qwen2(local, checkpoint.rope_factors)
    except ValueError as error:  # such as rotary frequencies beyond any number
        raise QwenMLXError(f"{path}: its configuration cannot be computed: {error}") from None
    compiled = ops.compile_ahead((), [dtype], dtype) if beside else None
    fill(model, parameters, dtype=dtype, packed=packed, progress=progress)
    for file in checkpoint.files:
        file.check_unchanged()
    for name, delta in beside.items():
        _set_low_rank(_get(model, name.removesuffix(".weight")), delta, dtype)
    if compiled is not None:
        compiled()
    if shard is not None and group is not None:
        parallel.share(model, shard, group)
    model.generation_defaults, model.adapter_digest = checkpoint.defaults, checkpoint.adapter_digest
    model.eval()
    kernels.prove(model)
    return model, checkpoint.tokenizer


def _merge(
    parameters: Mapping[str, Parameter], deltas: Mapping[str, Delta], dtype: mx.Dtype, packed: bool
) -> tuple[dict[str, Parameter], dict[str, Delta]]:
    """The parameters, those that become dense in `dtype` merged with what adapters make of them; and the deltas of the
    others, which stay beside them: a packed matrix, or one of fewer bits, could not hold the sum."""
    kinds, narrow = ops.packing_kinds(dtype) if packed else frozenset(), packed and ops.computes_on_cpu(dtype)
    result, beside = dict(parameters), {}
    for name, delta in deltas.items():
        ((run, packing),) = _runs([parameters[name]], kinds)
        if packing == DENSE and _dense_dtype(run, dtype, narrow) == dtype:
            result[name] = merged(parameters[name], delta)
        else:
            beside[name] = delta
    return result, beside


def _set_low_rank(module: nn.Module, delta: Delta, dtype: mx.Dtype) -> None:
    """Gives a module what adapters make of its matrix: see layers.low_rank_of."""
    names = ("lora_a", "lora_b", "lora_row_scale")
    for name, array in zip(names, delta):
        if array is not None:
            module[name] = mx.array(array).astype(dtype)
            mx.eval(module[name])


def fill(
    model: nn.Module,
    parameters: Mapping[str, Parameter],
    *,
    dtype: mx.Dtype,
    packed: bool,
    progress: Progress | None = None,
) -> None:
    """Gives a model the values of its parameters, in `dtype`, or `packed` where their files are.

    Memory: at most a tensor and its copy above the model.
    """
    groups = _groups(parameters.values())
    # Largest first: the moment of both a tensor and its temporary copy comes while the model is still small.
    groups.sort(key=lambda group: -sum(math.prod(parameter.shape) for parameter in group))
    kinds = ops.packing_kinds(dtype) if packed else frozenset()
    runs = [_runs(group, kinds) for group in groups]
    # A CPU's products read weights of 16 bits as they are.
    narrow = packed and ops.computes_on_cpu(dtype)
    dense = [(run, _dense_dtype(run, dtype, narrow)) for group in runs for run, packing in group if packing == DENSE]
    packings = {packing for group in runs for _, packing in group}
    compiled = ops.compile_ahead(packings, {d for run, d in dense if len(run[0].shape) == 2}, dtype)
    needed = (_buffer(run, packing, dtype, narrow) for group in runs for run, packing in group)
    buffers = _buffers([buffer for buffer in needed if buffer is not None])
    done, total = 0, sum(parameter.nbytes for parameter in parameters.values())
    for group, group_runs in zip(groups, runs):
        names = [parameter.name for parameter in group]
        if len(group[0].shape) == 1:
            _set(model, names[0], _read_dense(group, next(buffers), dtype))
        else:
            matrices = [_read(run, packing, dtype, buffers, narrow) for run, packing in group_runs]
            for (run, _), matrix in zip(group_runs, matrices):
                _set_rows(model, run, matrix, dtype)
            remember_joined([_get(model, name.removesuffix(".weight")) for name in names], matrices)
        done += sum(parameter.nbytes for parameter in group)
        if progress:
            progress(done, total)
    compiled()


def _nbytes(parameters: Iterable[Parameter], dtype: mx.Dtype, packed: bool) -> int:
    """Bytes of the model that fill makes, without what it needs for a moment."""
    kinds = ops.packing_kinds(dtype) if packed else frozenset()
    narrow = packed and ops.computes_on_cpu(dtype)
    total = 0
    for run, packing in (run for group in _groups(parameters) for run in _runs(group, kinds)):
        count = math.prod(_stacked_shape(run))
        if packing == DENSE:
            total += count * _dense_dtype(run, dtype, narrow).size
        elif packing.kind in BLOCK_SIZES:
            total += sum(parameter.nbytes for parameter in run)
        else:  # codes, and a scale and a bias in float32
            total += count * packing.bits // 8 + count // packing.group_size * 8
    return total


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Parameters that are read together: the weights of projections of one input, others alone."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        parent, module, kind = (".." + parameter.name).rsplit(".", 2)
        joined = next((names for names in JOINED if module in names), None) if kind == "weight" else None
        groups.setdefault(f"{parent} {joined}" if joined else parameter.name, []).append(parameter)
    return list(groups.values())


def _runs(group: list[Parameter], kinds: frozenset[str]) -> list[tuple[list[Parameter], Packing]]:
    """Neighbours of one packing: each run becomes one matrix."""

    def packing_of(parameter: Parameter) -> Packing:
        usable = [packing for packing in parameter.packings if packing.kind in kinds]
        return usable[0] if usable else DENSE

    return [(list(run), packing) for packing, run in itertools.groupby(group, packing_of)]


def _stacked_shape(run: list[Parameter]) -> tuple[int, ...]:
    return (sum(parameter.shape[0] for parameter in run), *run[0].shape[1:])


def _dense_dtype(run: list[Parameter], dtype: mx.Dtype, narrow: bool) -> mx.Dtype:
    """The dtype of a run that is not packed; `narrow`: matrices keep the file's, if it has 16 bits."""
    stored = {DTYPES.get(parameter.stored_dtype) for parameter in run if len(parameter.shape) == 2}
    own = stored.pop() if narrow and len(stored) == 1 else None
    return dtype if own is None or own == mx.float32 else own


def _is_stored_as(run: list[Parameter], dtype: mx.Dtype) -> bool:
    """True if the files' elements are two bytes in `dtype`, which need no conversion."""
    stored = {DTYPES.get(parameter.stored_dtype) for parameter in run}
    return dtype != mx.float32 and stored == {dtype}


def _buffer(
    run: list[Parameter], packing: Packing, dtype: mx.Dtype, narrow: bool
) -> tuple[tuple[int, ...], mx.Dtype] | None:
    """The shape and dtype of the buffer that a run is read into; None where it is packed, but for blocks on a CPU."""
    shape = _stacked_shape(run)
    if packing == DENSE:
        return shape, mx.uint16 if _is_stored_as(run, _dense_dtype(run, dtype, narrow)) else mx.float32
    if packing.kind not in BLOCK_SIZES or not narrow:
        return None
    return (shape[0], sum(parameter.nbytes for parameter in run) // shape[0]), mx.uint8


def _buffers(shapes: list[tuple[tuple[int, ...], mx.Dtype]]) -> Iterator[mx.array]:
    """Uninitialised arrays to read into. The next one is allocated meanwhile: the system takes longer to hand out fresh
    memory than a core takes to fill it.
    """
    upcoming = None
    for shape, dtype in [*shapes, ((1,), mx.float32)]:
        buffer, upcoming = upcoming, mx.empty(shape, dtype)
        mx.async_eval(upcoming)
        if buffer is not None:
            mx.eval(buffer)
            yield buffer


def _read(run: list[Parameter], packing: Packing, dtype: mx.Dtype, buffers: Iterator[mx.array], narrow: bool) -> Matrix:
    """The matrix of a run's parameters, one above the other."""
    n_rows, n_columns = _stacked_shape(run)
    if packing == DENSE:
        return Matrix(DENSE, n_rows, n_columns, (_read_dense(run, next(buffers), _dense_dtype(run, dtype, narrow)),))
    if packing.kind in BLOCK_SIZES:
        if narrow:  # a CPU's blocks are read to where they stay
            matrix = ops.raw_matrix(_read_into(run, next(buffers)), packing.kind)
        else:
            blocks = [parameter.arrays(packing)[0] for parameter in run]
            matrix = ops.raw_matrix(np.concatenate(blocks) if len(blocks) > 1 else blocks[0], packing.kind)
    else:
        columns = zip(*(parameter.arrays(packing) for parameter in run))
        arrays = [[_as_mlx(array) for array in column] for column in columns]
        codes, *scales = (mx.concatenate(column) if len(column) > 1 else column[0] for column in arrays)
        # Scales of another dtype than the activations' would be converted for every product: float32 is exact.
        scales = [array if array.dtype == dtype else array.astype(mx.float32) for array in scales]
        matrix = Matrix(packing, n_rows, n_columns, (codes, *scales))
    mx.eval(matrix.arrays)
    for parameter in run:
        parameter.release()
    return matrix


def _read_dense(run: list[Parameter], buffer: mx.array, dtype: mx.Dtype) -> mx.array:
    """The values of a run's parameters, one above the other."""
    buffer = _read_into(run, buffer)
    array = buffer.view(dtype) if buffer.dtype == mx.uint16 else buffer.astype(dtype)
    mx.eval(array)
    return array


def _read_into(run: list[Parameter], buffer: mx.array) -> mx.array:
    """Reads a run's parameters, one above the other, into a buffer of MLX's."""
    rows = np.array(buffer, copy=False)
    start = 0
    for parameter in run:
        stop = start + parameter.shape[0]
        parameter.fill(rows[start:stop].reshape(parameter.rows, -1))
        parameter.release()
        start = stop
    return buffer


def _as_mlx(array: np.ndarray) -> mx.array:
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)


def _set_rows(model: nn.Module, run: list[Parameter], matrix: Matrix, dtype: mx.Dtype) -> None:
    """Gives the modules of a run their rows of its matrix, as views; packed modules replace the model's dense ones."""
    start = 0
    for parameter in run:
        path = parameter.name.removesuffix(".weight")
        old, stop = _get(model, path), start + parameter.shape[0]
        part = ops.rows_of(matrix, start, stop)
        if matrix.packing == DENSE and (not isinstance(old, nn.Embedding) or part.arrays[0].dtype == dtype):
            old.weight = part.arrays[0]
        elif isinstance(old, nn.Embedding):
            _set(model, path, QuantizedEmbedding(part, dtype))
        else:
            _set(model, path, QuantizedLinear(part))
        mx.eval(part.arrays)
        start = stop


def _get(model: nn.Module, path: str) -> Any:
    node: Any = model
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node


def _set(model: nn.Module, path: str, value: mx.array | nn.Module) -> None:
    parent, _, last = path.rpartition(".")
    setattr(_get(model, parent) if parent else model, last, value)


def load_draft(
    draft: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    dtype: str | mx.Dtype | None = None,
    quantized: bool | None = None,
    yarn: float | None = None,
    progress: Progress | None = None,
    group: mx.distributed.Group | None = None,
) -> ModelDraft:
    """Loads a model as a draft for the one that `tokenizer` belongs to; names and arguments as for load().

    Raises QwenMLXError for another vocabulary, before any weights are read.
    """
    path = hub.resolve(draft)
    check_vocabulary(tokenizer.names, Tokenizer.read(path).names, str(draft))
    model, _ = load(path, dtype=dtype, quantized=quantized, yarn=yarn, progress=progress, group=group)
    return ModelDraft(model)
