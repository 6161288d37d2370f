"""Matrices with an adapter beside them: every operation gives what it gives with the values of the two together."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from qwen_mlx import ops
from qwen_mlx.ops import DENSE, LowRank, Matrix
from tests.helpers.cases import each
from tests.helpers.packed import raw_blocks

EPS = 1e-6


@pytest.fixture(params=["reference", "cpu", pytest.param("emulated", marks=pytest.mark.emulator)])
def executor(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plain MLX, the CPU's own functions, or the Metal kernels in the emulator."""
    if request.param == "emulated":
        from reference.emulator import emulate

        with emulate(), ops.no_grad():
            yield request.param
        return
    with ops.forced(request.param), ops.no_grad():
        yield request.param


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def pair(kind: str, rows: int, rank: int, scaled: bool, seed: int = 0) -> tuple[Matrix, Matrix]:
    """A packed matrix of 256 columns with an adapter, and a dense one of the same values."""
    raw, values = raw_blocks(rows, 256, kind, seed)
    a, b = random(rank, 256, seed=seed + 1) * 0.06, random(rows, rank, seed=seed + 2)
    row_scale = 1 + 0.3 * random(rows, seed=seed + 3) if scaled else None
    whole = values * (np.array(row_scale)[:, None] if scaled else 1) + np.array(b, np.float64) @ np.array(a)
    dense = Matrix(DENSE, rows, 256, (mx.array(whole.astype(np.float32)),))
    return ops.raw_matrix(raw, kind)._replace(low_rank=LowRank(a, b, row_scale)), dense


def close(got: mx.array, expected: mx.array) -> None:
    assert got.shape == expected.shape
    bound = 1e-5 * float(mx.abs(expected).max())
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=0, atol=bound)


@each("scaled", [False, True], ids=["lora", "dora"])
@each("rank", [3, 32])
@each("kind", ["q4_k", "q6_k"])
def test_products_and_rows(executor: str, kind: str, rank: int, scaled: bool):
    matrix, dense = pair(kind, 48, rank, scaled)
    x, norm, residual = random(1, 1, 256, seed=8), (random(256, seed=9), EPS), random(1, 1, 48, seed=10)
    for arguments in ((), (norm,), (None, residual), (norm, residual)):
        close(ops.matvec(x, matrix, *arguments), ops.matvec(x, dense, *arguments))
    several = random(2, 3, 256, seed=11)
    close(ops.multiply(several, matrix), ops.multiply(several, dense))
    close(ops.multiply(x, matrix), ops.multiply(x, dense))
    close(ops.matvec_swiglu(x, matrix, norm), ops.matvec_swiglu(x, dense, norm))
    ids = mx.array([[5, 0, 47]])
    close(ops.unpack(matrix, mx.float32, ids), dense.arrays[0][ids])
    close(ops.unpack(matrix, mx.float32), dense.arrays[0])
    part, expected = (ops.rows_of(m, 10, 20) for m in (matrix, dense))
    close(ops.multiply(several, part), ops.multiply(several, expected))


@each("both", [False, True], ids=["the first", "both"])
def test_the_step_of_attention(executor: str, both: bool):
    heads, kv_heads, head_dim = 2, 1, 16
    first, second = pair("q4_k", 48, 5, False), pair("q6_k", 16, 4, True, seed=20)
    matrices = [first[0], second[0] if both else second[0].base]
    values = mx.array(raw_blocks(16, 256, "q6_k", 20)[1].astype(np.float32))
    dense = [first[1], second[1] if both else Matrix(DENSE, 16, 256, (values,))]
    x, norm, bias = random(1, 1, 256, seed=8), (random(256, seed=9), EPS), random(64, seed=12)
    recent, position = random(1, 2 * kv_heads, 4, head_dim, seed=13), mx.array([9, 8], mx.int32)
    table = ops.Rotary.plain(head_dim, 1e6).table(9, 1)[0, 0]
    got = ops.matvec_qkv(x, matrices, bias, norm, table, recent, position, heads)
    expected = ops.matvec_qkv(x, dense, bias, norm, table, recent, position, heads)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)
