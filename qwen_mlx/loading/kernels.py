"""A model's kernels are tried on the machine that loads it, once, where nobody has seen them run (ops/trial)."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..backend import mx, nn
from ..model.cache import RECENT
from ..model.layers import join_rows, matrix_of
from ..model.qwen2 import Qwen2
from ..ops import Matrix, dispatch, trial
from ..ops.trial import MatrixSpec, Product, Spec, Verdict
from . import hub


def prove(model: Qwen2, again: bool = False) -> Verdict | None:
    """Lets a model use the kernels that proved themselves on this machine, and holds the trial if none is kept, or
    `again`. Standard error gets one line about a trial. Returns None where kernels need no trial, as on a CPU."""
    if not dispatch.on_trial():
        return None
    visible = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if visible:
            print(f"\rTrying the kernels {done / total:4.0%}\033[K", end="", file=sys.stderr, flush=True)

    verdict, held = trial.prove(spec_of(model), hub.cache_folder(), again, show)
    verdict.adopt()
    if held:
        line = f"qwen_mlx: kernels tried on {trial.machine()} ({verdict.seconds:.0f} s): {verdict}."
        print("\r\033[K" * visible + line, file=sys.stderr)
    return verdict


def spec_of(model: Qwen2) -> Spec:
    """Everything that the kernels of a model depend on."""
    config, blocks = model.config, model.model.layers
    attention = blocks[0].self_attn  # a rank has some of the model's heads
    counts = collections.Counter(_products(model))
    windows = tuple(dict.fromkeys(block.self_attn.sliding_window or 0 for block in blocks))
    dtype = model.model.norm.weight.dtype
    return Spec(
        dtype=_name(dtype),
        eps=config.rms_norm_eps,
        hidden_size=config.hidden_size,
        n_heads=attention.n_heads,
        n_kv_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        width=_matrix(blocks[0].mlp.down_proj).columns,
        vocab_size=config.vocab_size,
        recent=RECENT,
        windows=windows,
        products=tuple(Product(name, matrices, count) for (name, matrices), count in counts.items()),
    )


def _products(model: Qwen2) -> Iterator[tuple[str, tuple[MatrixSpec, ...]]]:
    """The products of a token, as fused.py forms them."""
    dtype = model.model.norm.weight.dtype
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        qkv = join_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up = join_rows([mlp.gate_proj, mlp.up_proj])
        if len(qkv) <= 2 and all(matrix.low_rank is None for matrix in qkv):
            yield "matvec_qkv", _specs(qkv, dtype)
        else:
            yield from _products_of("matvec_normed", qkv, dtype)
        yield from _products_of("matvec", [_matrix(attention.o_proj)], dtype)
        if len(gate_up) == 1 and gate_up[0].low_rank is None:
            yield "matvec_swiglu", _specs(gate_up, dtype)
        else:
            yield from _products_of("matvec_normed", gate_up, dtype)
        yield from _products_of("matvec", [_matrix(mlp.down_proj)], dtype)
    tied = model.config.tie_word_embeddings
    head = _matrix(model.model.embed_tokens if tied else model.lm_head)
    yield from _products_of("matvec_normed", [head], dtype)
    embedding = _spec(_matrix(model.model.embed_tokens), dtype)
    if embedding.kind != "dense":
        yield "rows", (embedding,)


def _products_of(name: str, matrices: Sequence[Matrix], dtype: mx.Dtype) -> Iterator[tuple[str, tuple[MatrixSpec]]]:
    """A product with each matrix, and with the two of its adapter."""
    for matrix in matrices:
        yield name, (_spec(matrix, dtype),)
        if matrix.low_rank is not None:
            a, b = matrix.low_rank.factors
            yield name, (_spec(a, dtype),)
            yield "matvec", (_spec(b, dtype),)


def _matrix(module: nn.Module) -> Matrix:
    part: Any = getattr(module, "part", module)  # a rank's module has a part of the model's
    return matrix_of(part)


def _specs(matrices: Sequence[Matrix], dtype: mx.Dtype) -> tuple[MatrixSpec, ...]:
    return tuple(_spec(matrix, dtype) for matrix in matrices)


def _spec(matrix: Matrix, dtype: mx.Dtype) -> MatrixSpec:
    packing = matrix.packing
    scales = _name(matrix.arrays[1].dtype) if packing.kind == "affine" else ""
    return MatrixSpec(packing.kind, packing.bits, packing.group_size, matrix.rows, matrix.columns, scales)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
